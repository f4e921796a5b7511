"""Small files of a checkpoint: whose tokenizer they hold, and what is never taken."""

from pathlib import Path

import pytest

from mmlm.checkpoint.assets import TOKENIZER_FILES, read_assets, write_assets


def fill(folder: Path, *names: str) -> Path:
    """Files that say where they come from."""
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(f"{folder.name}/{name}\n\xff".encode("latin-1"))
    return folder


@pytest.fixture
def assets(tmp_path: Path) -> Path:
    """What a conversion leaves."""
    return fill(tmp_path / "hf_assets", *TOKENIZER_FILES, "llm_config.json", "vision_config.json")


def test_everything_in_the_folder_is_kept_byte_by_byte(assets: Path, tmp_path: Path) -> None:
    found = read_assets(assets)
    assert found.keys() == {*TOKENIZER_FILES, "llm_config.json", "vision_config.json"}
    assert found["tokenizer.model"] == b"hf_assets/tokenizer.model\n\xff"
    write_assets(tmp_path / "copy", found)
    assert read_assets(tmp_path / "copy") == found


def test_the_tokenizer_that_is_used_wins_as_a_whole(assets: Path, tmp_path: Path) -> None:
    """A file that it does not have does not stay behind from the other tokenizer either."""
    other = fill(tmp_path / "other", "tokenizer.model", "tokenizer_config.json")
    found = read_assets(assets, other)
    assert {name: content.split(b"/")[0] for name, content in found.items()} == {
        "tokenizer.model": b"other",
        "tokenizer_config.json": b"other",
        "llm_config.json": b"hf_assets",
        "vision_config.json": b"hf_assets",
    }


def test_weights_beside_the_tokenizer_are_never_taken(tmp_path: Path) -> None:
    """``data.tokenizer`` may be the folder of a whole LLM."""
    llm = fill(
        tmp_path / "llm",
        *TOKENIZER_FILES,
        "config.json",
        "model-00001-of-00002.safetensors",
        "pytorch_model.bin",
    )
    assert read_assets(None, llm).keys() == set(TOKENIZER_FILES)


def test_what_is_not_there_is_no_asset(tmp_path: Path) -> None:
    assert read_assets(None) == {}
    assert read_assets(tmp_path / "gone") == {}
    assert read_assets(tmp_path / "gone", tmp_path / "gone too") == {}
