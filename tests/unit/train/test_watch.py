"""The watch in a process of its own: what each phase may take, and which errors it waits for."""

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mmlm.config.schema import ParallelConfig
from mmlm.errors import DataError
from mmlm.parallel import topology
from mmlm.train.watch import Watch, is_lost_connection
from mmlm.train.watch_rules import LONGEST_FACTOR, Phase
from tests.distributed.launch import run_ranks

ALLOWED: tuple[tuple[Phase, int, float], ...] = (
    ("data", 5, 3.5),  # the first iteration
    ("saving", 6, 3.5),
    ("forward-backward", 7, 0.5),
)


def _phases() -> tuple[list[bool], bool, float]:
    """Whether the process was ended in phases that are allowed, and in one that is not."""
    place = topology.initialize(ParallelConfig())
    ended: list[int] = []
    with Watch(place, timeout_minutes=0.03, first_iteration=5, exit_process=ended.append) as watch:
        found = []
        for phase, iteration, seconds in ALLOWED:
            watch.at(phase, iteration)
            time.sleep(seconds)
            found.append(bool(ended))
        counted = watch.counting(lambda iterator, chunk: (torch.zeros(1), None))  # type: ignore
        for _ in range(6):  # longer than 1.8 s together, but it moves
            counted(iter(()), torch.nn.Identity())
            time.sleep(0.5)
        found.append(bool(ended))
        began = time.monotonic()
        while not ended and time.monotonic() - began < 20:
            time.sleep(0.1)
        return found, ended[:1] == [1], time.monotonic() - began


@pytest.mark.distributed
def test_phases_may_take_as_long_as_is_theirs() -> None:
    ((found, stalled, seconds),) = run_ranks(1, _phases)
    assert found == [False] * 4
    assert stalled and seconds > 1.0


def _in_a_collective() -> bool:
    place = topology.initialize(ParallelConfig())
    if dist.get_rank():
        return True  # ends, and its end of the connection with it
    time.sleep(0.5)
    try:
        dist.all_reduce(torch.zeros(1), group=place.control_group)
    except RuntimeError as error:
        return is_lost_connection(error)
    return False


@pytest.mark.distributed
def test_the_error_of_a_collective_whose_other_end_is_gone() -> None:
    assert run_ranks(2, _in_a_collective) == [True, True]


@pytest.mark.parametrize(
    "error",
    [
        DataError("gloo.jpg: connection reset"),
        ValueError("x"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        KeyboardInterrupt(),
    ],
)
def test_errors_of_its_own(error: Any) -> None:
    assert not is_lost_connection(error)


def test_collectives_wait_longer_than_any_phase_may_take() -> None:
    assert topology.COLLECTIVE_FACTOR > LONGEST_FACTOR
