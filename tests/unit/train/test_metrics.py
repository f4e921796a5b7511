"""metrics.jsonl and TensorBoard: what is written, by whom, and what a resume drops."""

import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mmlm.data.ledger import LedgerEntry
from mmlm.data.rejection import Reason
from mmlm.data.step_plan import StepPlan
from mmlm.train.metrics import MetricsLog, peak_memory_bytes
from mmlm.train.nonfinite_count import NonfiniteCount
from mmlm.train.stop import Stopper
from mmlm.train.train_step import StepResult
from tests.distributed.launch import run_ranks

CPU = torch.device("cpu")


def plan(iteration: int) -> StepPlan:
    """Four samples in two rows of 16 tokens, one row a rank."""
    return StepPlan(
        iteration=iteration,
        epoch=iteration // 3,
        microbatches=((((0, 1),),), (((2, 3),),)),
        token_weights={},
        num_samples=4,
        num_tokens=24,
        num_supervised_tokens=9,
        num_images=3,
        num_computed_tokens=32,
        pads_rows=True,
        seq_length=16,
    )


def _log(folder: str, start: int, end: int) -> list[dict[str, Any]]:
    place: Any = SimpleNamespace(rank=dist.get_rank(), device=CPU)
    log = MetricsLog(Path(folder), place, start_iteration=start, train_iters=9, show_progress=False)
    lines = [
        log.log(
            plan(iteration),
            StepResult(loss=1 / 3 + iteration, grad_norm=2.0, learning_rate=1e-5 * iteration),
            data_seconds=0.25 * (dist.get_rank() + 1),
        )
        for iteration in range(start, end)
    ]
    log.log_evaluation(end, {"total": {"loss": 0.5, "exact_match": 0.75}})
    log.close()
    return lines


def _log_ledger(folder: str) -> None:
    place: Any = SimpleNamespace(rank=dist.get_rank(), device=CPU)
    log = MetricsLog(Path(folder), place, start_iteration=0, train_iters=9, show_progress=False)
    reasons = [Reason.ODD_TURNS, Reason.LONGER_THAN_SEQ_LENGTH, Reason.ODD_TURNS]
    entries = [
        LedgerEntry(set_name="a", file="a.jsonl", line=line, identity="", reason=reason, detail="")
        for line, reason in enumerate(reasons, start=1)
    ]
    log.log_ledger(SimpleNamespace(ledger=lambda: entries))  # type: ignore[arg-type]
    log.close()


def read(folder: Path) -> list[dict[str, Any]]:
    """The lines of the file."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.distributed
def test_lines_of_a_run_and_of_its_resume(tmp_path: Path) -> None:
    first = run_ranks(2, _log, str(tmp_path), 0, 5)
    assert read(tmp_path) == first[0] and first[1][0]["loss"] == first[0][0]["loss"]
    line = first[0][2]
    known = {key: line[key] for key in line if not key.endswith(("_seconds", "_per_second"))}
    assert known.pop("peak_memory_bytes") > 1e6
    assert known == {
        "iteration": 2,
        "loss": 1 / 3 + 2,  # to the last digit
        "grad_norm": 2.0,
        "learning_rate": 2e-5,
        "consumed_samples": 12,
        "epoch": 0,
        "num_tokens": 24,
        "num_supervised_tokens": 9,
        "num_packs": 2,
        "num_microbatches": 1,
        "pack_fill": 0.75,
        "padding_share": 0.25,
        "images_per_pack": 1.5,
        "nonfinite_iterations": 0,
        "nonfinite_in_a_row": 0,
    }
    assert line["data_wait_seconds"] == 0.5  # the slowest rank
    assert line["tokens_per_second"] == 24 / line["iteration_seconds"]
    assert line["samples_per_second"] == 4 / line["iteration_seconds"]

    # killed while writing a line, after the checkpoint of iteration 3
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 5, "lo')
    run_ranks(2, _log, str(tmp_path), 3, 6)
    lines = read(tmp_path)
    assert [each["iteration"] for each in lines] == [0, 1, 2, 3, 4, 5]
    assert lines[:3] == first[0][:3]


@pytest.mark.distributed
def test_tensorboard_has_the_scalars(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_ranks(1, _log, str(tmp_path), 0, 3)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    losses = [(event.step, event.value) for event in board.Scalars("train/loss")]
    assert losses == [(k, pytest.approx(1 / 3 + k, rel=1e-6)) for k in range(3)]
    assert [(e.step, e.value) for e in board.Scalars("eval/exact_match")] == [(2, 0.75)]
    assert "train/iteration" not in board.Tags()["scalars"]


@pytest.mark.distributed
def test_tensorboard_counts_the_ledger(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_ranks(1, _log_ledger, str(tmp_path))
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    found = {
        tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in board.Tags()["scalars"]
    }
    assert found == {
        "data_ledger/excluded/odd_turns": [(0, 2.0)],
        "data_ledger/truncated/longer_than_seq_length": [(0, 1.0)],
    }


@pytest.mark.distributed
def test_a_resume_takes_its_iterations_off_the_board(tmp_path: Path) -> None:
    """A run that came to iteration 4 after its checkpoint of 3 leaves no second value of 3."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_ranks(1, _log, str(tmp_path), 0, 5)
    time.sleep(1.1)  # tensorboard orders its files by the second of their start
    run_ranks(1, _log, str(tmp_path), 3, 6)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("train/loss")] == list(range(6))
    # the first run's evaluation went with its iterations
    assert [event.step for event in board.Scalars("eval/exact_match")] == [5]


def test_memory_is_in_bytes() -> None:
    assert 5e7 < peak_memory_bytes(CPU) < 1e12  # a python with torch is more than 50 MB


def _log_bad(folder: str) -> None:
    place: Any = SimpleNamespace(rank=dist.get_rank(), device=CPU)
    log = MetricsLog(Path(folder), place, start_iteration=0, train_iters=9, show_progress=False)
    bad = StepResult(loss=1.0, grad_norm=float("inf"), learning_rate=1e-5)
    log.log(plan(0), bad, 0.0, nonfinite=NonfiniteCount(total=3, in_a_row=2))
    log.close()


@pytest.mark.distributed
def test_what_is_not_finite_is_null_and_counted(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_ranks(1, _log_bad, str(tmp_path))
    (line,) = read(tmp_path)
    assert "inf" not in (tmp_path / "metrics.jsonl").read_text().lower(), "JSON has no infinity"
    assert line["loss"] == 1.0 and line["grad_norm"] is None
    assert (line["nonfinite_iterations"], line["nonfinite_in_a_row"]) == (3, 2)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert board.Scalars("train/nonfinite_iterations")[0].value == 3
    assert "train/grad_norm" not in board.Tags()["scalars"]


def _told_on_rank_one(folder: str) -> list[str | None]:
    place: Any = SimpleNamespace(rank=dist.get_rank(), device=CPU)
    log = MetricsLog(Path(folder), place, start_iteration=0, train_iters=9, show_progress=False)
    reasons: list[str | None] = []
    with Stopper() as stopper:
        for iteration in range(3):
            if iteration == 1 and dist.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGUSR1)
                while not stopper.code:
                    time.sleep(0.01)
            result = StepResult(loss=1.0, grad_norm=1.0, learning_rate=1.0)
            log.log(plan(iteration), result, 0.0, stopper)
            reasons.append(stopper.reason)
    log.close()
    return reasons


@pytest.mark.distributed
def test_all_ranks_learn_of_a_stop_in_the_same_iteration(tmp_path: Path) -> None:
    found = run_ranks(3, _told_on_rank_one, str(tmp_path))
    assert found == [[None, "SIGUSR1", "SIGUSR1"]] * 3
