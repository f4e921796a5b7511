"""Signals and the limit of time: the run is saved, says so, and the same command continues it."""

import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mmlm.checkpoint.manifest import resolve
from tests.distributed.stopping import (
    LIMIT_SECONDS,
    curve,
    make_recipe,
    marker,
    ranks,
    said,
    torchrun,
    wait_for,
    wait_for_iterations,
)

TRAIN_ITERS = 60


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_recipe(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def whole(recipe: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The curve of a run that nobody stops."""
    output = tmp_path_factory.mktemp("whole") / "out"
    with torchrun(recipe, output) as process:
        assert process.wait(LIMIT_SECONDS) == 0, said(output)
    assert not (output / "stopped.json").exists()
    return curve(output)


def losses(lines: list[dict[str, Any]]) -> list[tuple[int, float, float]]:
    return [(line["iteration"], line["loss"], line["grad_norm"]) for line in lines]


def assert_stopped(output: Path, reason: str) -> int:
    """The marker, the checkpoint and the curve tell of the same iteration; returns it."""
    told = marker(output)
    assert (told["reason"], told["train_iters"]) == (reason, TRAIN_ITERS)
    done = told["iteration"]
    assert 0 < done < TRAIN_ITERS
    assert resolve(output / "checkpoints").name == f"iter_{done:07d}"
    assert [line["iteration"] for line in curve(output)] == list(range(done))
    assert f"stopped after iteration {done} of {TRAIN_ITERS} by {reason}" in said(output)
    return int(done)


def assert_continues(recipe: str, output: Path, whole: list[dict[str, Any]]) -> None:
    with torchrun(recipe, output) as process:
        assert process.wait(LIMIT_SECONDS) == 0, said(output)
    assert losses(curve(output)) == losses(whole)
    assert not (output / "stopped.json").exists()


@pytest.mark.distributed
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_to_torchrun_saves_and_the_same_command_continues(
    number: signal.Signals, recipe: str, whole: list[dict[str, Any]], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    with torchrun(recipe, output) as process:
        wait_for_iterations(process, output, 3)
        process.send_signal(number)
        assert process.wait(LIMIT_SECONDS) == 1, "torchrun's own status for any signal"
    assert_stopped(output, number.name)
    assert_continues(recipe, output, whole)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("rank", [0, 1])
def test_signal_to_one_rank_stops_all_with_status_0(
    rank: int, recipe: str, whole: list[dict[str, Any]], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    with torchrun(recipe, output) as process:
        wait_for_iterations(process, output, 2)
        ranks(process)[rank].send_signal(signal.SIGUSR1)
        assert process.wait(LIMIT_SECONDS) == 0, said(output)
    assert_stopped(output, "SIGUSR1")


@pytest.mark.slow
@pytest.mark.distributed
def test_second_signal_ends_at_once_even_inside_a_collective(recipe: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with torchrun(recipe, output) as process:
        wait_for_iterations(process, output, 2)
        first, second = ranks(process)
        second.suspend()  # rank 0 waits for it for ever
        time.sleep(1.0)
        first.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        first.send_signal(signal.SIGTERM)  # the same request from another sender
        time.sleep(2.5)
        assert first.is_running()
        began = time.monotonic()
        first.send_signal(signal.SIGTERM)
        second.resume()
        assert process.wait(LIMIT_SECONDS) == 1
        assert time.monotonic() - began < 10
    assert "exitcode  : 143" in said(output)
    assert not (output / "stopped.json").exists()
    assert not (output / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.distributed
def test_limit_of_time(recipe: str, whole: list[dict[str, Any]], tmp_path: Path) -> None:
    output = tmp_path / "out"
    # reached while the first iteration runs
    with torchrun(recipe, output, "train.exit_duration_minutes=0.001") as process:
        assert process.wait(LIMIT_SECONDS) == 0, said(output)
    assert marker(output)["reason"] == "exit_duration_minutes"
    assert marker(output)["iteration"] == 0
    assert "stopped by exit_duration_minutes before the first iteration" in said(output)
    with torchrun(recipe, output, "train.exit_duration_minutes=0.2") as process:
        assert process.wait(LIMIT_SECONDS) == 0, said(output)
    if not (output / "stopped.json").exists():
        pytest.fail("the run was over before its limit of time")
    assert_stopped(output, "exit_duration_minutes")
    assert_continues(recipe, output, whole)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("moment", [0.0, 3.0])
def test_signal_before_the_first_iteration(moment: float, recipe: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with torchrun(recipe, output) as process:
        wait_for(process, lambda: len(ranks(process)) == 2, "start of the ranks")
        time.sleep(moment)
        wait_for(process, lambda: all(_listens(each.pid) for each in ranks(process)), "handler")
        process.send_signal(signal.SIGUSR1)
        assert process.wait(LIMIT_SECONDS) == 1
    assert marker(output) | {"time": ""} == {
        "iteration": 0,
        "train_iters": None,
        "reason": "SIGUSR1",
        "time": "",
    }
    assert curve(output) == []


def _listens(pid: int) -> bool:
    """Whether a process has a handler of its own for SIGUSR1."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) & (1 << (signal.SIGUSR1 - 1)))


@pytest.mark.slow
@pytest.mark.distributed
def test_signal_during_an_evaluation(
    recipe: str, whole: list[dict[str, Any]], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    with torchrun(recipe, output, "train.eval_interval=1") as process:
        wait_for(process, lambda: "evaluation after 1 iter" in said(output), "evaluation")
        wait_for(process, lambda: said(output).count("evaluate: ") > 8, "evaluation")
        ranks(process)[1].send_signal(signal.SIGTERM)
        assert process.wait(LIMIT_SECONDS) == 0, said(output)
    assert_stopped(output, "SIGTERM")
    assert_continues(recipe, output, whole)


@pytest.mark.slow
@pytest.mark.distributed
def test_signals_during_a_save(recipe: str, whole: list[dict[str, Any]], tmp_path: Path) -> None:
    """Saved after every iteration, so that most of the time is saving; asked at three moments."""
    output = tmp_path / "out"
    for _ in range(3):
        with torchrun(recipe, output, "checkpoint.save_interval=1") as process:
            before = len(curve(output))
            wait_for_iterations(process, output, before + 2)
            wait_for(process, lambda: _is_saving(output), "save")
            process.send_signal(signal.SIGUSR1)
            assert process.wait(LIMIT_SECONDS) == 1
        assert_stopped(output, "SIGUSR1")
    assert_continues(recipe, output, whole)


def _is_saving(output: Path) -> bool:
    return any(each.name.startswith(".") for each in os.scandir(output / "checkpoints"))


@pytest.mark.distributed
def test_killed_rank_restarts_and_resumes_by_itself(
    recipe: str, whole: list[dict[str, Any]], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    settings = "checkpoint.save_interval=5"
    with torchrun(recipe, output, settings, words=("--max-restarts", "2")) as process:
        for count in (7, 22):
            wait_for_iterations(process, output, count)
            ranks(process)[count % 2].kill()
            wait_for(process, partial(_has_resumed, output, count), "restart")
        assert process.wait(LIMIT_SECONDS) == 0, said(output)
    assert losses(curve(output)) == losses(whole)


def _has_resumed(output: Path, count: int) -> bool:
    """Lines of iterations that are done again are dropped when the run begins anew."""
    return said(output).count("resumes ") == (1 if count == 7 else 2)
