"""Items one by one, and a process that dies; the stages' tests have several processes."""

import os
import signal

import pytest

from mmlm.errors import DataError
from mmlm.preparation.pool import default_workers, map_unordered


def double(number: int) -> int:
    return 2 * number


def die(number: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_results_of_all_items() -> None:
    assert default_workers() >= 1
    assert list(map_unordered(double, [1, 2, 3], workers=1)) == [2, 4, 6]
    assert list(map_unordered(double, [], workers=4)) == []


def test_death_of_a_process_is_named() -> None:
    with pytest.raises(DataError, match=r"a process was killed .* lower --workers from 2"):
        list(map_unordered(die, [1, 2], workers=2))
