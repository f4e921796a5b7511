"""Rows stay complete and within their length, and come out level."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmlm.data.levelling import Rows, level_rows, spread
from mmlm.data.packing import best_fit_decreasing

CAPACITY = 64
LENGTHS = st.lists(st.integers(1, CAPACITY), min_size=1, max_size=60)

fast = settings(max_examples=60, deadline=None)


def items(rows: Rows) -> list[int]:
    return sorted(item for row in rows for item in row)


def sums(rows: Rows, values: list[float]) -> list[float]:
    return [sum(values[item] for item in row) for row in rows]


@fast
@given(LENGTHS, st.integers(1, 12))
def test_spreading_loses_nothing_and_leaves_no_row_empty(lengths: list[int], num_rows: int) -> None:
    rows = spread(lengths, [float(n) for n in lengths], num_rows, CAPACITY)
    assert len(rows) == num_rows and items(rows) == list(range(len(lengths)))
    assert all(rows) or len(lengths) < num_rows


def test_spreading_goes_to_the_cheapest_row_with_room() -> None:
    assert spread([40, 40, 20], [3.0, 2.0, 1.0], 2, CAPACITY) == [[0], [1, 2]]
    assert spread([40, 60, 20], [3.0, 2.0, 1.0], 2, CAPACITY) == [[0, 2], [1]]


def test_spreading_overfills_the_emptiest_row_where_there_is_no_room() -> None:
    assert spread([40, 50, 30], [3.0, 2.0, 1.0], 2, CAPACITY) == [[0, 2], [1]]


@fast
@given(LENGTHS, st.sampled_from([lambda n: float(n), lambda n: 100.0 - n, lambda n: 1.0]))
def test_rows_that_fit_still_fit_and_become_no_less_level(lengths: list[int], cost: object) -> None:
    costs = [cost(n) for n in lengths]  # type: ignore[operator]
    rows = best_fit_decreasing(lengths, CAPACITY)
    level = level_rows(rows, lengths, costs, CAPACITY)
    assert level is not None and len(level) == len(rows)
    assert items(level) == list(range(len(lengths)))
    assert max(sums(level, [float(n) for n in lengths])) <= CAPACITY
    assert all(level)
    mean = sum(costs) / len(rows)
    before, after = (sum((c - mean) ** 2 for c in sums(r, costs)) for r in (rows, level))
    assert after <= before * (1 + 1e-9)


def test_exchanges_find_room_and_level_costs() -> None:
    # the only way that fits: 40 + 24, 34 + 30, 44 + 20
    lengths = [40, 34, 44, 24, 30, 20]
    rows = level_rows([[0, 1], [2, 3], [4, 5]], lengths, [1.0] * 6, CAPACITY)
    assert rows is not None
    assert sorted(map(sorted, rows)) == [[0, 3], [1, 4], [2, 5]]
    costs = [9.0, 7.0, 5.0, 4.0, 3.0, 2.0]
    rows = level_rows([[0, 1, 2], [3, 4, 5]], [1] * 6, costs, CAPACITY)
    assert rows is not None
    assert sums(rows, costs) == [15.0, 15.0]


def test_levelling_says_when_it_finds_no_room() -> None:
    assert level_rows([[0, 1], [2]], [40, 40, 40], [1.0] * 3, CAPACITY) is None


@pytest.mark.parametrize("num_rows", [1, 3])
def test_rows_without_items_are_left_as_they_are(num_rows: int) -> None:
    rows: Rows = [[0], *[[] for _ in range(num_rows - 1)]]
    assert level_rows(rows, [5], [2.0], CAPACITY) == rows
