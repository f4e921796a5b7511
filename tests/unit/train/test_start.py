"""Where a run begins that reads HuggingFace weights directly."""

import dataclasses
from pathlib import Path

import pytest

from mmlm.checkpoint.manifest import ASSETS_DIR
from mmlm.config.schema import CheckpointConfig, DataConfig, RunConfig
from mmlm.conversion.convert import hf_to_megatron
from mmlm.data.tokenizer import Tokenizer
from mmlm.errors import CheckpointError, ConfigError
from mmlm.train.start import find_start, load_assets, load_tokenizer
from tests.tiny_data import make_tokenizer
from tests.tiny_weights import tiny_llm_config, tiny_vision_config, write_parts


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """Parts whose vocabulary lacks the nine tokens."""
    make_tokenizer(tmp_path / "hf" / "llm")
    write_parts(tmp_path / "hf", tiny_vision_config(), tiny_llm_config(448))
    return tmp_path / "hf"


def run_config(tmp_path: Path, load_hf: Path) -> RunConfig:
    return RunConfig(
        output_dir=str(tmp_path / "run"), checkpoint=CheckpointConfig(load_hf=str(load_hf))
    )


def test_sizes_tokenizer_and_small_files_come_from_the_folder(parts: Path, tmp_path: Path) -> None:
    config = run_config(tmp_path, parts)
    start = find_start(config)
    assert (start.checkpoint, start.resumes, start.iteration) == (None, False, 0)
    assert start.model.language.vocab_size == 448 + 9
    assert load_tokenizer(config, start).folder == parts / "llm"
    converted = hf_to_megatron(
        vision=parts / "vision", llm=parts / "llm", output=tmp_path / "converted"
    )
    assets = load_assets(config, start)
    assert assets == {file.name: file.read_bytes() for file in (converted / ASSETS_DIR).iterdir()}
    (tmp_path / "kept").mkdir()
    for name, content in assets.items():
        (tmp_path / "kept" / name).write_bytes(content)
    kept, used = Tokenizer(tmp_path / "kept"), Tokenizer(parts / "llm")
    assert (kept.fingerprint, kept.added_tokens) == (used.fingerprint, used.added_tokens)


def test_a_named_tokenizer_takes_the_place_of_the_folders(parts: Path, tmp_path: Path) -> None:
    other = make_tokenizer(tmp_path / "other")
    (other / "special_tokens_map.json").write_text('{"eos_token": "<|im_end|>"}\n')
    config = dataclasses.replace(run_config(tmp_path, parts), data=DataConfig(tokenizer=str(other)))
    start = find_start(config)
    assert load_tokenizer(config, start).folder == other
    content = (other / "special_tokens_map.json").read_bytes()
    assert load_assets(config, start)["special_tokens_map.json"] == content


def test_sizes_of_the_recipe_choose_images_and_layers(parts: Path, tmp_path: Path) -> None:
    """Everything else must be as in the files."""
    config = run_config(tmp_path, parts)
    model = find_start(config).model
    smaller = dataclasses.replace(
        model, vision=dataclasses.replace(model.vision, image_size=28, num_layers=2)
    )
    start = find_start(dataclasses.replace(config, model=smaller))
    assert start.model == smaller
    weights = start.open_hf()
    positions = weights.blocks().read(
        "vision_model.position_embedding", (slice(0, 1), slice(0, 5), slice(0, 40))
    )
    assert positions.shape == (1, 5, 40)
    other = dataclasses.replace(model, ps_version="v2")
    with pytest.raises(ConfigError, match=r"differs from the model in .*hf: "):
        find_start(dataclasses.replace(config, model=other))


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="gone: does not exist"):
        find_start(run_config(tmp_path, tmp_path / "gone"))


def test_two_sources_are_refused() -> None:
    with pytest.raises(ConfigError, match="load and load_hf are both given"):
        CheckpointConfig(load="a", load_hf="b")


def test_negative_intervals_are_refused() -> None:
    with pytest.raises(ConfigError, match="export_hf_interval -1 must be at least 0"):
        CheckpointConfig(export_hf_interval=-1)
