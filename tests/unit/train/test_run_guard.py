"""Two processes want one output directory."""

import errno
import fcntl
import logging
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mmlm.errors import ConfigError
from mmlm.train.run_guard import LOCK_FILE, guard_run

HOLD = """
import os, sys, time
from pathlib import Path
from mmlm.train.run_guard import guard_run
with guard_run(Path(sys.argv[1])):
    if os.fork() == 0:  # a process of its own that outlives it
        time.sleep(float(sys.argv[2]))
        os._exit(0)
    print("held", flush=True)
    sys.stdin.readline()
"""


@contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder, and has a child."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), "5"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_the_second_is_told_who_holds_it(tmp_path: Path) -> None:
    who = rf"is in use by another run \(process \d+ on {re.escape(socket.gethostname())}, started "
    with holder(tmp_path) as other:
        with pytest.raises(ConfigError, match=who) as refusal, guard_run(tmp_path, 0.3):
            pass
        assert f"process {other.pid} on" in str(refusal.value)
        other.communicate("\n")
        with guard_run(tmp_path, 0.0):
            assert f'"pid": {os.getpid()}' in (tmp_path / LOCK_FILE).read_text("utf-8")
    assert (tmp_path / LOCK_FILE).read_text("utf-8") == ""


def test_a_killed_holder_lets_go_though_its_children_live(tmp_path: Path) -> None:
    with holder(tmp_path) as other:
        other.send_signal(signal.SIGKILL)
        other.wait()
        with guard_run(tmp_path, 0.0):
            pass


def test_a_start_waits_for_a_run_that_is_about_to_end(tmp_path: Path) -> None:
    with holder(tmp_path) as other:
        subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -9 {other.pid}"])
        with guard_run(tmp_path, 10.0):
            pass


def test_a_lock_without_a_name_is_a_lock(tmp_path: Path) -> None:
    with holder(tmp_path):
        os.truncate(tmp_path / LOCK_FILE, 0)
        with pytest.raises(ConfigError, match="it has not yet"), guard_run(tmp_path, 0.0):
            pass


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    with caplog.at_level(logging.WARNING), guard_run(tmp_path, 0.0):
        pass
    (record,) = caplog.records
    assert "this file system has no locks (No locks available)" in record.message
