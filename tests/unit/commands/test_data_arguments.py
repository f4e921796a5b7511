"""Where tokenizer and sizes come from: a folder, a checkpoint, HuggingFace weights."""

import argparse
import shutil
from pathlib import Path

import pytest

from mmlm.checkpoint.manifest import ASSETS_DIR, Manifest
from mmlm.commands.data_arguments import (
    add_sample_arguments,
    check_at_least,
    check_meta,
    read_sample_arguments,
    read_source,
    run_seed,
)
from mmlm.config.load import to_json
from mmlm.config.presets import tiny
from mmlm.config.schema import DataConfig, RunConfig, TrainConfig
from mmlm.errors import CheckpointError, ConfigError
from tests.tiny_data import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_sample_arguments(parser)
    parser.add_argument("--seed", type=int)
    return parser.parse_args(words)


def checkpoint(folder: Path, tokenizer: Path, run: RunConfig | None) -> Path:
    folder.mkdir()
    shutil.copytree(tokenizer, folder / ASSETS_DIR)
    Manifest(
        iteration=0,
        consumed_samples=0,
        dtype="fp32",
        model=tiny(),
        run_config=None if run is None else to_json(run),
        has_optimizer=False,
    ).write(folder)
    return folder


def test_a_tokenizer_alone_has_the_published_sizes(tokenizer: Path) -> None:
    found, settings = read_sample_arguments(parse("--tokenizer", str(tokenizer)))
    assert found.folder == tokenizer
    assert (settings.seq_length, settings.image_size) == (2048, 448)
    assert (settings.embeddings_per_image, settings.special_literals) == (256, "exclude")


def test_a_checkpoint_has_the_sizes_of_its_run(tokenizer: Path, tmp_path: Path) -> None:
    data = DataConfig(seq_length=96, special_literals="tokens")
    run = RunConfig(data=data, train=TrainConfig(seed=7))
    folder = checkpoint(tmp_path / "x", tokenizer, run)
    options = parse("--load", str(folder))
    found, settings = read_sample_arguments(options)
    assert found.folder == folder / ASSETS_DIR
    assert (settings.seq_length, settings.image_size) == (96, 56)
    assert (settings.embeddings_per_image, settings.special_literals) == (4, "tokens")
    assert run_seed(options, read_source(options)) == 7
    assert read_source(options).run == run and read_source(options).model == tiny()


def test_converted_weights_have_the_published_run(tokenizer: Path, tmp_path: Path) -> None:
    options = parse("--load", str(checkpoint(tmp_path / "x", tokenizer, None)))
    _, settings = read_sample_arguments(options)
    assert (settings.seq_length, settings.image_size) == (2048, 56)
    assert run_seed(options, read_source(options)) == 42


def test_what_is_given_goes_before_what_is_found(tokenizer: Path, tmp_path: Path) -> None:
    run = RunConfig(data=DataConfig(seq_length=96, special_literals="tokens"))
    folder = checkpoint(tmp_path / "x", tokenizer, run)
    words = ["--load", str(folder), "--seq-length", "64", "--image-size", "112"]
    options = parse(*words, "--special-literals", "exclude", "--seed", "3")
    _, settings = read_sample_arguments(options)
    assert (settings.seq_length, settings.image_size) == (64, 112)
    assert (settings.embeddings_per_image, settings.special_literals) == (16, "exclude")
    assert run_seed(options, read_source(options)) == 3


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["--tokenizer", "X", "--seq-length", "7"], ConfigError, "--seq-length 7: must be at lea"),
        (["--load", "nowhere"], CheckpointError, "nowhere: does not exist"),
        (["--load-hf", "nowhere"], ConfigError, "--load-hf nowhere: does not exist; give a combin"),
        (["--load-hf", "."], ConfigError, "has neither config.json nor vision/ and llm/"),
    ],
)
def test_what_cannot_be_used_is_named(
    tokenizer: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    error: type[Exception],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    options = parse(*[str(tokenizer) if word == "X" else word for word in words])
    with pytest.raises(error, match=message):
        read_sample_arguments(options)


def test_small_numbers_and_missing_files_are_refused(tmp_path: Path) -> None:
    options = argparse.Namespace(global_batch_size=0, row=None)
    check_at_least(options, 0, "global_batch_size", "row")
    with pytest.raises(ConfigError, match="--global-batch-size 0: must be at least 1"):
        check_at_least(options, 1, "row", "global_batch_size")
    with pytest.raises(ConfigError, match=r"META: the file .*nowhere\.json' does not exist"):
        check_meta(str(tmp_path / "nowhere.json"))
