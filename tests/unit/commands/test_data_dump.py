"""``mmlm data dump``: which samples, which settings, and what is refused."""

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mmlm import cli
from mmlm.commands.data_dump import parse_ids
from mmlm.errors import ConfigError
from tests.tiny_data import conversation, make_playground, make_tokenizer, write_set


@pytest.fixture(autouse=True)
def _one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Rank 0 of one; the logger is left as it was found."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    logger = logging.getLogger("mmlm")
    before = (logger.handlers[:], logger.propagate, logger.level)
    yield
    logger.handlers[:], logger.propagate = before[0], before[1]
    logger.setLevel(before[2])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def meta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_playground(tmp_path_factory.mktemp("playground"), num_samples=12, seed=1)


def dump(meta: Path, tokenizer: str, output: Path, *more: str) -> int:
    words = ["--output", str(output), "--image-size", "56", *more]
    return cli.main(["data", "dump", str(meta), "--tokenizer", tokenizer, *words])


def test_help_says_what_is_in_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["data", "dump", "--help"])
    out = capsys.readouterr().out
    assert "I/labels" in out and "HuggingFace's labels are [-100, *labels[:-1]]" in out
    assert all(len(line) <= 100 for line in out.splitlines())


def test_samples_that_are_named(
    meta: Path, tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "x.npz"
    words = ["--ids", "7,0-2,11", "--limit", "4", "--seed", "5", "--epoch", "2"]
    assert dump(meta, tokenizer, output, *words) == 0
    assert f"{output}: 4 samples, " in capsys.readouterr().out
    with np.load(output) as file:
        assert file["sample_ids"].tolist() == [7, 0, 1, 2]
        metadata = {
            name.split("/")[1]: file[name].item()
            for name in file.files
            if name.startswith("metadata/") and name != "metadata/tokenizer"
        }
        assert metadata == {
            "seq_length": 2048,
            "image_size": 56,
            "embeddings_per_image": 4,
            "special_literals": "exclude",
            "seed": 5,
            "epoch": 2,
        }
        assert file["7/pixel_values"].shape[1:] == (3, 56, 56)


def test_all_samples_without_pixels(meta: Path, tokenizer: str, tmp_path: Path) -> None:
    assert dump(meta, tokenizer, tmp_path / "x.npz", "--no-pixels") == 0
    with np.load(tmp_path / "x.npz") as file:
        assert file["sample_ids"].tolist() == list(range(12))
        assert not [name for name in file.files if name.endswith("pixel_values")]


def test_an_augmented_set_depends_on_seed_and_epoch_alone(tokenizer: str, tmp_path: Path) -> None:
    source = make_playground(tmp_path, num_samples=1, seed=1)
    meta = source.with_name("augmented.json")
    meta.write_text(source.read_text().replace('"data_augment": false', '"data_augment": true'))
    pixels = {}
    for name, words in {
        "plain": [],
        "again": ["--seed", "42"],
        "seed": ["--seed", "43"],
        "epoch": ["--epoch", "1"],
    }.items():
        assert dump(meta, tokenizer, tmp_path / f"{name}.npz", *words) == 0
        with np.load(tmp_path / f"{name}.npz") as file:
            pixels[name] = file["0/pixel_values"].tobytes()
    assert pixels["plain"] == pixels["again"]
    assert len(set(pixels.values())) == 3


def test_invalid_samples_are_listed(
    tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = [{"conversations": conversation("q", "a")}]
    entries += [{"conversations": conversation("q")}] * 12
    meta = write_set(tmp_path, entries)
    assert dump(meta, tokenizer, tmp_path / "x.npz") == 0
    out = capsys.readouterr().out
    assert "x.npz: 1 samples, " in out
    assert "  sample 1 cannot be used: odd_turns: 1 turns" in out
    assert out.endswith("  ... and 2 more that cannot be used\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ids", "0,12"], "sample 12 does not exist; the sets have 12 samples"),
        (["--ids", "a"], "--ids 'a': must be numbers and ranges"),
        (["--limit", "0"], "--limit 0: must be at least 1"),
        (["--seed", "-1"], "--seed -1: must be at least 0"),
    ],
)
def test_what_cannot_be_dumped_is_refused_and_leaves_nothing(
    meta: Path,
    tokenizer: str,
    words: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert dump(meta, tokenizer, tmp_path / "x.npz", *words) == 1
    assert f"error: {message}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_there_is_kept_unless_told(
    meta: Path, tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "x.npz"
    output.write_bytes(b"before")
    assert dump(meta, tokenizer, output, "--ids", "0") == 1
    assert "exists already; give another name or --overwrite" in capsys.readouterr().err
    assert output.read_bytes() == b"before"
    assert dump(meta, tokenizer, output, "--ids", "0", "--overwrite") == 0
    assert np.load(output)["sample_ids"].tolist() == [0]


def test_numbers_of_samples() -> None:
    assert parse_ids(None) is None
    assert parse_ids("3, 17,20-22") == [3, 17, 20, 21, 22]
    for text in ("", "1,,2", "-1", "1-", "x", "2.5", "1-2-3"):
        with pytest.raises(ConfigError, match="must be numbers and ranges with commas"):
            parse_ids(text)
    for text in ("1,1", "0-3,2", "5-4"):
        with pytest.raises(ConfigError, match="names no sample, or one of them twice"):
            parse_ids(text)
