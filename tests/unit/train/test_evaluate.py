"""A long evaluation moves on with each microbatch, and the watch is told so."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmlm.config.schema import RunConfig
from mmlm.train import evaluate as module


class _Loader:
    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> "_Loader":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def batches(self, iteration: int) -> tuple[None, list[int]]:
        return None, [iteration, iteration]


def test_each_microbatch_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def schedule(model: Any, step: Any, batches: list[int], *, forward_only: bool) -> list[Any]:
        return [step(iter(batches), model) for _ in batches]

    counted: list[int] = []

    def counting(step: Any) -> Any:
        def inner(*args: Any) -> Any:
            counted.append(1)
            return step(*args)

        return inner

    planner = SimpleNamespace(num_iterations=3)
    monkeypatch.setattr(module, "EvaluationPlanner", lambda **_: planner)
    monkeypatch.setattr(module, "packing_cost", lambda _: None)
    monkeypatch.setattr(module, "BatchLoader", _Loader)
    monkeypatch.setattr(module, "run_schedule", schedule)
    step = lambda *_: {"samples": ["score"]}  # noqa: E731
    monkeypatch.setattr(module, "evaluation_forward_step", lambda *_: step)
    monkeypatch.setattr(module, "_report", lambda _, scores: {"scores": len(scores)})
    place: Any = SimpleNamespace(rank=0, tp_rank=0, dp_rank=0, dp_size=1)
    data: Any = SimpleNamespace(table=None)
    sizes: Any = None
    chunks: Any = [torch.nn.Identity()]
    report = module.evaluate(
        chunks, RunConfig(), sizes, data, place, with_pixels=False, counting=counting
    )
    assert report == {"scores": 6} and len(counted) == 6
