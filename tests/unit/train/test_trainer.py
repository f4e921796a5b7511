"""What is due after an iteration, where a stop comes while a save fails."""

from types import SimpleNamespace
from typing import Any

import pytest

from mmlm.config.schema import CheckpointConfig, RunConfig
from mmlm.train import trainer
from mmlm.train.nonfinite_count import NonfiniteCount


@pytest.mark.parametrize(("fails", "saves"), [(True, 2), (False, 1)])
def test_a_stop_in_a_save_that_fails_saves_again(
    monkeypatch: pytest.MonkeyPatch, fails: bool, saves: int
) -> None:
    calls: list[int] = []
    stopper = SimpleNamespace(reason=None)

    def save(run: Any, aids: Any, done: int, nonfinite: Any) -> None:
        calls.append(done)
        stopper.reason = "SIGTERM"  # what all agree on after the save

    monkeypatch.setattr(trainer, "_save", save)
    monkeypatch.setattr(trainer, "gather_parameters", lambda _: None)
    config = RunConfig(checkpoint=CheckpointConfig(save_interval=3, async_save=False))
    state = SimpleNamespace(model=None)
    run: Any = SimpleNamespace(config=config, train_iters=9, held_out=None, state=state)
    saver = SimpleNamespace(holds=lambda _: not fails)
    aids: Any = SimpleNamespace(stopper=stopper, saver=saver)
    trainer._save_and_evaluate(run, aids, 3, NonfiniteCount())
    assert calls == [3] * saves
