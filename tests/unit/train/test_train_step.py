"""An iteration that is not finite ends on all ranks before it can do harm."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mmlm.train import train_step as module
from mmlm.train.train_step import DivergenceError, StepResult, train_step
from tests.distributed.launch import run_ranks


class Recorder:
    """Stands for optimizer and scheduler: notes what is called."""

    def __init__(self, norm: float) -> None:
        self.norm = norm
        self.calls: list[str] = []
        # a stage whose parts are all frozen has groups without parameters
        self.param_groups: list[dict[str, Any]] = [
            {"lr": 0.25, "params": [1] if dist.get_rank() == 0 else []}
        ]

    def step(self, increment: int | None = None) -> tuple[bool, float, None]:
        """One step of the optimizer, or of the scheduler."""
        self.calls.append("optimizer" if increment is None else f"scheduler {increment}")
        return True, self.norm, None


def _step(loss: float, norm: float) -> tuple[StepResult | str, list[str]]:
    recorder: Any = Recorder(norm)
    place: Any = SimpleNamespace(device=torch.device("cpu"))
    module.forward_backward = lambda *args: loss
    nothing: Any = None
    try:
        result = train_step(nothing, recorder, recorder, nothing, [], place)
    except DivergenceError as error:
        return str(error), recorder.calls
    return result, recorder.calls


@pytest.mark.distributed
def test_good_step_reports_the_rate_on_every_rank() -> None:
    expected = StepResult(loss=1.5, grad_norm=2.0, learning_rate=0.25)
    assert run_ranks(2, _step, 1.5, 2.0) == [(expected, ["optimizer", "scheduler 1"])] * 2


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("loss", "norm", "calls"),
    [(float("nan"), 1.0, []), (float("inf"), 1.0, []), (1.0, float("inf"), ["optimizer"])],
)
def test_divergence_is_an_error(loss: float, norm: float, calls: list[str]) -> None:
    for message, done in run_ranks(2, _step, loss, norm):
        assert message.startswith(f"the training diverged: loss {loss}, gradient norm")
        assert "start again from the last checkpoint with a lower learning rate" in message
        # a loss that is not finite never reaches the weights; no rate is advanced
        assert done == calls
