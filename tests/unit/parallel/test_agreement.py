"""Work of rank 0 reaches all ranks, and so do its errors, whatever they are."""

import errno
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from mmlm.config.schema import ParallelConfig
from mmlm.errors import DataError, MmlmError
from mmlm.parallel import topology
from mmlm.parallel.agreement import on_rank_zero
from tests.distributed.launch import run_ranks


def _ask() -> tuple[object, str, bool]:
    answer = on_rank_zero(lambda: {"from": dist.get_rank()})

    def fail() -> None:
        raise DataError(f"line 3 is broken, says rank {dist.get_rank()}")

    with pytest.raises(DataError) as caught:
        on_rank_zero(fail)
    return answer, str(caught.value), caught.value.on_every_rank


@pytest.mark.distributed
def test_results_and_errors_are_those_of_rank_zero() -> None:
    """All ranks know the error, so rank 0 alone prints it."""
    expected = ({"from": 0}, "line 3 is broken, says rank 0", True)
    assert run_ranks(3, _ask) == [expected] * 3


def _system_errors(folder: str) -> list[tuple[type, str, bool]]:
    control_group = topology.initialize(ParallelConfig()).control_group

    def missing() -> bytes:
        return Path(folder, "gone").read_bytes()

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def speechless() -> None:
        raise OSError("the file system is not there")

    found = []
    for function in (missing, full, speechless):
        with pytest.raises(MmlmError) as caught:
            on_rank_zero(function, control_group)
        found.append((type(caught.value), str(caught.value), caught.value.on_every_rank))
    return found


@pytest.mark.distributed
def test_errors_of_the_system_are_one_line_everywhere(tmp_path: Path) -> None:
    expected = [
        (MmlmError, f"{tmp_path / 'gone'}: No such file or directory", True),
        (MmlmError, "a file: No space left on device", True),
        (MmlmError, "a file: the file system is not there", True),
    ]
    assert run_ranks(2, _system_errors, str(tmp_path)) == [expected] * 2


def _bug() -> tuple[type, str, float]:
    control_group = topology.initialize(ParallelConfig()).control_group
    began = time.monotonic()
    with pytest.raises(Exception) as caught:  # noqa: PT011 (its type is what is asked)
        on_rank_zero(lambda: {}["seed"], control_group)
    return type(caught.value), str(caught.value), time.monotonic() - began


@pytest.mark.distributed
def test_a_bug_on_rank_zero_leaves_nobody_waiting() -> None:
    """The group would wait for a day; rank 0 keeps the exception and its traceback."""
    first, *others = run_ranks(3, _bug, timeout_seconds=60.0)
    assert first[:2] == (KeyError, "'seed'")
    assert [other[:2] for other in others] == [(MmlmError, "rank 0 failed: KeyError('seed')")] * 2
    assert all(seconds < 10.0 for *_, seconds in (first, *others))
