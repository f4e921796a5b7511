"""An iteration that is not finite ends on all ranks before it can do harm."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mmlm.train import train_step as module
from mmlm.train.train_step import StepResult, train_step
from tests.distributed.launch import run_ranks


class Recorder:
    """Stands for optimizer and scheduler: notes what is called."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        # a stage whose parts are all frozen has groups without parameters
        self.param_groups: list[dict[str, Any]] = [
            {"lr": 0.25, "params": [1] if dist.get_rank() == 0 else []}
        ]

    def step(self, increment: int) -> None:
        """One step of the scheduler."""
        self.calls.append(f"scheduler {increment}")


def _step(loss: float, norm: float) -> tuple[StepResult, list[str]]:
    recorder: Any = Recorder()

    def step_if_finite(optimizer: Recorder) -> float:
        optimizer.calls.append("optimizer")
        return norm

    place: Any = SimpleNamespace(device=torch.device("cpu"))
    module.forward_backward = lambda *args: loss
    module.step_if_finite = step_if_finite
    nothing: Any = None
    return train_step(nothing, recorder, recorder, nothing, [], place), recorder.calls


@pytest.mark.distributed
def test_good_step_reports_the_rate_on_every_rank() -> None:
    expected = StepResult(loss=1.5, grad_norm=2.0, learning_rate=0.25)
    assert expected.is_finite
    assert run_ranks(2, _step, 1.5, 2.0) == [(expected, ["optimizer", "scheduler 1"])] * 2


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("loss", "norm", "calls"),
    [(math.nan, 1.0, []), (math.inf, 1.0, []), (1.0, math.inf, ["optimizer"])],
)
def test_a_step_that_is_not_finite_moves_no_schedule(
    loss: float, norm: float, calls: list[str]
) -> None:
    for result, done in run_ranks(2, _step, loss, norm):
        assert not result.is_finite
        # a loss that is not finite never reaches the optimizer; no rate is advanced
        assert done == calls
