"""The same run twice gives the same bits; each seed decides its own part and nothing else."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmlm.checkpoint.manifest import resolve
from mmlm.checkpoint.tensor_reader import TensorReader
from mmlm.config.load import apply_overrides
from mmlm.config.presets import tiny
from mmlm.config.schema import BackendConfig, CheckpointConfig, RunConfig
from mmlm.data.planners import TrainPlanner
from mmlm.parallel import topology
from mmlm.parallel.backend import resolve_backend
from mmlm.train.determinism import ENVIRONMENT
from mmlm.train.prepare import prepare
from mmlm.train.stop import Stopper
from mmlm.train.trainer import train
from tests.distributed.launch import run_ranks
from tests.distributed.test_trainer import config, curve, world

__all__ = ["world"]


def deterministic_rank(run: RunConfig) -> dict[str, Any]:
    import os

    train(run, topology.initialize(run.parallel), resolve_backend(BackendConfig()))
    return {
        "algorithms": torch.are_deterministic_algorithms_enabled(),
        "benchmark": torch.backends.cudnn.benchmark,
        "environment": {name: os.environ.get(name) for name in ENVIRONMENT},
    }


@pytest.mark.distributed
def test_two_runs_are_equal_to_the_bit(world: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        run = config(world, tmp_path / name, tp=2, pp=2, deterministic=True)
        run = replace(run, data=replace(run.data, num_workers=2))
        for found in run_ranks(4, deterministic_rank, run):
            assert found["algorithms"] and not found["benchmark"]
            assert None not in found["environment"].values()
    first, second = curve(tmp_path / "first"), curve(tmp_path / "second")
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in first] == [line[key] for line in second]
    one, other = (
        TensorReader(resolve(tmp_path / name / "checkpoints")) for name in ("first", "second")
    )
    assert one.infos == other.infos
    for name in one.infos:
        assert torch.equal(one.read(name), other.read(name)), name


def parts_rank(run: RunConfig) -> dict[str, Any]:
    """What each seed decides: fresh weights, the order of the data, and the first losses."""
    place = topology.initialize(run.parallel)
    made = prepare(run, place, resolve_backend(BackendConfig()), Stopper())
    assert isinstance(made.planner, TrainPlanner)
    weights = torch.cat([each.detach().flatten() for each in made.state.chunks[0].parameters()])
    return {"weights": weights.numpy(), "order": made.planner.sample_ids(0)}


@pytest.mark.distributed
def test_each_seed_decides_its_own_part(world: Path, tmp_path: Path) -> None:
    def start(*settings: str) -> tuple[dict[str, Any], float]:
        output = tmp_path / "_".join(settings or ("none",))
        run = config(world, output, train_iters=1)
        fresh = CheckpointConfig(save_interval=0)
        model = replace(tiny(), language=replace(tiny().language, vocab_size=457))
        data = replace(run.data, tokenizer=str(world / "hf" / "llm"))
        run = replace(run, model=model, checkpoint=fresh, data=data)
        run = apply_overrides(run, settings)
        (parts,) = run_ranks(1, parts_rank, run)
        run_ranks(1, deterministic_rank, run)
        return parts, curve(output)[0]["loss"]

    def same(one: dict[str, Any], other: dict[str, Any]) -> dict[str, bool]:
        return {name: np.array_equal(one[name], other[name]) for name in one}

    truth, loss = start()
    for setting, changed in (
        ("data.seed=7", {"order"}),
        ("train.drop_path_seed=7", set()),
        ("train.init_seed=7", {"weights"}),
        ("train.seed=7", {"order", "weights"}),
    ):
        parts, other_loss = start(setting)
        assert {name for name, equal in same(parts, truth).items() if not equal} == changed, setting
        assert other_loss != loss, setting
    explicit = ("data.seed=42", "train.drop_path_seed=42", "train.init_seed=42", "train.seed=9")
    parts, other_loss = start(*explicit)
    assert all(same(parts, truth).values()) and other_loss == loss
