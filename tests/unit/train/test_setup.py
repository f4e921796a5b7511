"""Where a run begins: its own checkpoint, a named one or fresh weights, and what is refused."""

import dataclasses
from pathlib import Path

import pytest

from mmlm.checkpoint.manifest import ASSETS_DIR, LATEST_FILE, Manifest, iteration_name
from mmlm.config.presets import tiny
from mmlm.config.schema import CheckpointConfig, RunConfig, TrainConfig
from mmlm.errors import CheckpointError, ConfigError
from mmlm.train.setup import checkpoint_root, find_start, load_tokenizer


def write_checkpoint(root: Path, iteration: int, *, has_optimizer: bool = True) -> Path:
    """A checkpoint without tensors, of runs with 8 samples an iteration."""
    folder = root / iteration_name(iteration)
    folder.mkdir(parents=True)
    Manifest(
        iteration=iteration,
        consumed_samples=8 * iteration,
        dtype="fp32",
        model=tiny(),
        run_config=None,
        has_optimizer=has_optimizer,
    ).write(folder)
    (root / LATEST_FILE).write_text(folder.name)
    return folder


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """A run with nothing to load yet."""
    return RunConfig(output_dir=str(tmp_path / "run"), train=TrainConfig(global_batch_size=8))


def test_fresh_weights_need_sizes(config: RunConfig) -> None:
    start = find_start(dataclasses.replace(config, model=tiny()))
    assert (start.checkpoint, start.iteration, start.resumes) == (None, 0, False)
    assert start.model == tiny() and start.assets is None
    with pytest.raises(ConfigError, match="model is not given and there is no checkpoint"):
        find_start(config)


def test_named_checkpoint_gives_weights_and_sizes(config: RunConfig, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "source", 7, has_optimizer=False)
    named = dataclasses.replace(config, checkpoint=CheckpointConfig(load=str(tmp_path / "source")))
    start = find_start(named)
    assert (start.checkpoint, start.iteration, start.resumes) == (folder, 0, False)
    assert start.model == tiny() and start.assets is None
    (folder / ASSETS_DIR).mkdir()
    assert find_start(named).assets == folder / ASSETS_DIR


def test_own_checkpoint_goes_before_the_named_one(config: RunConfig, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", 7)
    own = write_checkpoint(checkpoint_root(config), 3)
    named = dataclasses.replace(config, checkpoint=CheckpointConfig(load=str(tmp_path / "source")))
    start = find_start(named)
    assert (start.checkpoint, start.iteration, start.resumes) == (own, 3, True)


def test_other_sizes_in_the_recipe_are_refused(config: RunConfig) -> None:
    write_checkpoint(checkpoint_root(config), 3)
    assert find_start(dataclasses.replace(config, model=tiny())).iteration == 3
    other = dataclasses.replace(tiny(), ps_version="v2")
    with pytest.raises(ConfigError, match=r"model in the recipe differs.*leave model out"):
        find_start(dataclasses.replace(config, model=other))


def test_weights_alone_cannot_be_resumed(config: RunConfig) -> None:
    write_checkpoint(checkpoint_root(config), 3, has_optimizer=False)
    with pytest.raises(CheckpointError, match=r"has no optimizer state.*use another output_dir"):
        find_start(config)


def test_another_batch_size_cannot_be_resumed(config: RunConfig) -> None:
    write_checkpoint(checkpoint_root(config), 3)
    larger = dataclasses.replace(config, train=TrainConfig(global_batch_size=16))
    with pytest.raises(ConfigError, match=r"24 samples in 3 iterations.*global_batch_size 16"):
        find_start(larger)


def test_tokenizer_must_come_from_somewhere(config: RunConfig) -> None:
    start = find_start(dataclasses.replace(config, model=tiny()))
    with pytest.raises(ConfigError, match=r"data\.tokenizer is empty and the checkpoint keeps no"):
        load_tokenizer(config, start)
