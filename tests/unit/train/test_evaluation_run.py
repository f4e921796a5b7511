"""Settings that an evaluation takes from a checkpoint when no recipe is given."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from mmlm.checkpoint.manifest import LATEST_FILE, Manifest, iteration_name
from mmlm.config.load import to_json
from mmlm.config.presets import tiny
from mmlm.config.schema import DataConfig, ParallelConfig, RunConfig, TrainConfig
from mmlm.errors import CheckpointError
from mmlm.train.evaluation_run import settings_of


def write_checkpoint(root: Path, run_config: dict[str, Any] | None, dtype: str = "bf16") -> Path:
    """A checkpoint without tensors."""
    folder = root / iteration_name(9)
    folder.mkdir()
    Manifest(
        iteration=9,
        consumed_samples=0,
        dtype=dtype,
        model=tiny(),
        run_config=run_config,
        has_optimizer=False,
    ).write(folder)
    (root / LATEST_FILE).write_text(folder.name)
    return folder


@pytest.mark.parametrize("model", [None, tiny()])
def test_settings_are_those_of_the_run_in_one_process(tmp_path: Path, model: Any) -> None:
    run = RunConfig(
        model=model,
        parallel=ParallelConfig(tensor_model_parallel_size=2, pipeline_layout="vvvpE|tttL"),
        data=DataConfig(seq_length=96),
        train=TrainConfig(global_batch_size=4, dtype="fp32"),
    )
    folder = write_checkpoint(tmp_path, to_json(run))
    expected = dataclasses.replace(run, parallel=ParallelConfig())
    assert settings_of(tmp_path) == settings_of(folder) == expected


@pytest.mark.parametrize(
    ("stored", "dtype"), [("bf16", "bf16"), ("fp16", "bf16"), ("mixed", "bf16"), ("fp32", "fp32")]
)
def test_converted_weights_are_judged_in_their_precision(
    tmp_path: Path, stored: str, dtype: Any
) -> None:
    write_checkpoint(tmp_path, None, stored)
    assert settings_of(tmp_path) == RunConfig(train=TrainConfig(dtype=dtype))


def test_settings_of_another_version_are_named(tmp_path: Path) -> None:
    settings = to_json(RunConfig())
    settings["train"]["warmth"] = 3
    folder = write_checkpoint(tmp_path, settings)
    with pytest.raises(CheckpointError) as caught:
        settings_of(tmp_path)
    assert str(caught.value) == (
        f"{folder}: the settings of its run cannot be used: TrainConfig has no field 'warmth'; "
        "give --recipe"
    )


def test_nothing_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="gone: does not exist"):
        settings_of(tmp_path / "gone")
