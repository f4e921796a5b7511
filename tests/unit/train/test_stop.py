"""One rank's side of a stop: signals, the limit of time, and the marker."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmlm.train.stop import (
    MARKER_FILE,
    Stopper,
    StopRequested,
    reason_of,
    remove_marker,
    write_marker,
)


def wait_for_code(stopper: Stopper) -> int:
    deadline = time.monotonic() + 5
    while not stopper.code and time.monotonic() < deadline:
        time.sleep(0.01)
    return stopper.code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_a_request(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with Stopper() as stopper:
        assert stopper.code == 0
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # the same request again: from torchrun and from Slurm
        assert wait_for_code(stopper) == number
        assert stopper.reason is None, "not agreed yet"
        stopper.learn(stopper.code)
        assert stopper.reason == number.name
    assert signal.getsignal(number) is before
    assert signal.set_wakeup_fd(-1) == -1


def test_the_limit_of_time() -> None:
    assert Stopper(0.0).code == 0
    stopper = Stopper(0.001)
    time.sleep(0.1)
    assert reason_of(stopper.code) == "exit_duration_minutes"
    assert reason_of(0) is None


def test_another_rank_is_enough_and_an_agreement_stays() -> None:
    stopper = Stopper()
    stopper.learn(int(signal.SIGUSR1))
    stopper.learn(0)
    assert stopper.reason == "SIGUSR1"


def interrupted() -> None:
    os.kill(os.getpid(), signal.SIGUSR1)
    time.sleep(5)


def test_long_work_is_interrupted_and_nothing_else() -> None:
    with Stopper() as stopper:
        began = time.monotonic()
        with pytest.raises(StopRequested, match=r"^SIGUSR1$"), stopper.interruptible():
            interrupted()
        assert time.monotonic() - began < 4
        time.sleep(0.1)
        with pytest.raises(StopRequested), stopper.interruptible():
            pytest.fail("it was asked before")


def test_an_error_of_interrupted_work_is_the_interruption() -> None:
    def break_pool(number: int) -> None:
        stopper._signal = number
        raise ValueError("a process of a pool was killed")

    stopper = Stopper()
    with pytest.raises(ValueError, match="pool"), stopper.interruptible():
        break_pool(0)
    with pytest.raises(StopRequested, match="SIGTERM"), stopper.interruptible():
        break_pool(signal.SIGTERM)


SECOND = """
import ctypes, signal
from mmlm.train.stop import Stopper
with Stopper():
    print("listens", flush=True)
    # in C with the signals of this thread blocked, as in a collective: no handler in Python runs
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGUSR1])
    ctypes.CDLL(None).sleep(60)
"""


def test_a_second_signal_ends_the_process() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SECOND],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "listens\n"
        process.send_signal(signal.SIGTERM)
        time.sleep(2.2)
        assert process.poll() is None
        process.send_signal(signal.SIGUSR1)
        assert process.wait(5) == 128 + signal.SIGUSR1


def test_marker(tmp_path: Path) -> None:
    remove_marker(tmp_path)
    write_marker(tmp_path / "new", iteration=7, train_iters=60, reason="SIGUSR1")
    assert [each.name for each in (tmp_path / "new").iterdir()] == [MARKER_FILE]
    content = json.loads((tmp_path / "new" / MARKER_FILE).read_text("utf-8"))
    assert content.pop("time").endswith("+00:00")
    assert content == {"iteration": 7, "train_iters": 60, "reason": "SIGUSR1"}
    remove_marker(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []
