"""Alive, stopped, gone, or not to be seen from here."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from mmlm.parallel.process import ProcessIdentity, ProcessState, state_of, this_process

CODE = """
import dataclasses, json, time
from mmlm.parallel.process import this_process
print(json.dumps(dataclasses.asdict(this_process())), flush=True)
time.sleep(60)
"""


@pytest.fixture
def child() -> Iterator[tuple[subprocess.Popen[str], ProcessIdentity]]:
    import json

    command = [sys.executable, "-c", CODE]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process, ProcessIdentity(**json.loads(process.stdout.readline()))
        process.kill()


def becomes(process: ProcessIdentity, state: ProcessState) -> bool:
    for _ in range(100):
        if state_of(process) == state:
            return True
        time.sleep(0.02)
    return False


def test_life_of_a_process(child: tuple[subprocess.Popen[str], ProcessIdentity]) -> None:
    process, identity = child
    assert identity.pid == process.pid and state_of(identity) == "alive"
    process.send_signal(signal.SIGSTOP)
    assert becomes(identity, "stopped")
    process.send_signal(signal.SIGCONT)
    assert becomes(identity, "alive")
    process.kill()
    assert becomes(identity, "gone"), "a zombie until it is waited for"
    process.wait()
    assert state_of(identity) == "gone"


def test_a_pid_that_was_given_again_is_another_process() -> None:
    assert state_of(this_process()) == "alive"
    assert state_of(replace(this_process(), start="1")) == "gone"


def test_processes_elsewhere_are_not_judged() -> None:
    elsewhere = replace(this_process(), namespace="another boot or container", pid=2**22 + 1)
    assert state_of(elsewhere) == "unknown"
    assert state_of(replace(elsewhere, namespace="")) == "unknown"
    assert this_process().pid == os.getpid()
