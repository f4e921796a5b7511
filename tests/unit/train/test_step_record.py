"""Hooks are there while the schedule runs and not after it; what they see is tested elsewhere."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmlm.config.presets import tiny
from mmlm.parallel.stage_plan import make_stage_plan
from mmlm.train.step_record import StepRecord


def watched(record: StepRecord, chunks: list[Any]) -> list[list[str]]:
    """Parts with a hook, chunk by chunk, while the record is open."""
    with record:
        return [
            [name for name, part in vars(chunk).items() if part._forward_hooks] for chunk in chunks
        ]


def stage() -> Any:
    names = ("vision_model", "vision_projection", "language_model")
    return SimpleNamespace(**{name: torch.nn.Identity() for name in names})


@pytest.mark.parametrize("activations", [True, False])
def test_the_last_vision_layer_the_projection_and_the_head_are_watched(activations: bool) -> None:
    model = tiny()
    plan = make_stage_plan(model, 4, "vv|vp|Ett|tL")
    chunks = [stage() for _ in plan.chunks]
    record = StepRecord(
        lambda iterator, chunk: (chunk, print),  # type: ignore[arg-type, return-value]
        chunks,
        plan.chunks,
        model,
        SimpleNamespace(tp_rank=0),  # type: ignore[arg-type]
        activations=activations,
    )
    expected = [[], ["vision_model", "vision_projection"], [], ["language_model"]]
    assert watched(record, chunks) == (expected if activations else [[]] * 4)
    assert not any(part._forward_hooks for chunk in chunks for part in vars(chunk).values())
