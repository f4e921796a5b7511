"""Rows of about equal cost that hold what they can: spread, then exchanges. Pure functions."""

import heapq
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mmlm.data.annotation import IntArray

Rows = list[list[int]]
"""Item numbers of each row."""

FloatArray = npt.NDArray[np.floating[Any]]

_LEVEL = 0.015
"""Rows whose cost is this near to the mean, as a share of it, are left alone."""

_MAX_EXCHANGES = 250
"""Exchanges looked for in one call; 0.05 ms each for 512 items."""


def spread(lengths: Sequence[int], costs: Sequence[float], num_rows: int, capacity: int) -> Rows:
    """Spread items over a given number of rows, dearest first to the cheapest row with room.

    An item that finds no room goes to the row with most of it, which is then too long.

    Args:
        lengths: of the items.
        costs: of the items, positive.
        num_rows: rows to fill.
        capacity: of a row.

    Returns:
        Item numbers of each row; none is empty unless the items are fewer.
    """
    rows: Rows = [[] for _ in range(num_rows)]
    free = [capacity] * num_rows
    heap = [(0.0, row) for row in range(num_rows)]
    for item in sorted(range(len(lengths)), key=lambda item: (-costs[item], item)):
        passed = []
        while heap and free[heap[0][1]] < lengths[item]:
            passed.append(heapq.heappop(heap))
        if heap:
            cost, row = heapq.heappop(heap)
        else:
            cost, row = max(passed, key=lambda entry: (free[entry[1]], -entry[1]))
            passed.remove((cost, row))
        rows[row].append(item)
        free[row] -= lengths[item]
        for entry in (*passed, (cost + costs[item], row)):
            heapq.heappush(heap, entry)
    return rows


class _Exchange:
    """Rows, and exchanges between them: an item for an item, or for nothing.

    An exchange is judged by the sum over both rows of (cost - mean)^2, plus so much for every token
    above the capacity that room comes first. Every sum is made one by one and everything else
    element by element, so that all machines find the same rows.
    """

    def __init__(
        self, rows: Rows, lengths: Sequence[int], costs: Sequence[float], capacity: int
    ) -> None:
        num_rows = len(rows)
        self._num_items = len(lengths)
        self._capacity = capacity
        self._mean = math.fsum(costs) / num_rows
        self._excess = 16.0 * max(math.fsum(costs), capacity) ** 2
        # after the items, a nothing of each row
        self._lengths = np.array([*lengths, *[0] * num_rows], dtype=np.float64)
        self._costs = np.array([*costs, *[0.0] * num_rows], dtype=np.float64)
        self._row = np.arange(-self._num_items, num_rows)
        for row, items in enumerate(rows):
            self._row[items] = row
        self._row_lengths = _sums(self._row, self._lengths, num_rows)
        self._row_costs = _sums(self._row, self._costs, num_rows)
        self._penalties = self._judge(self._row_lengths, self._row_costs)

    @property
    def fits(self) -> bool:
        """Whether no row is too long."""
        return bool(np.all(self._row_lengths <= self._capacity))

    def rows(self) -> Rows:
        """Item numbers of each row."""
        rows: Rows = [[] for _ in range(len(self._row_lengths))]
        for item, row in enumerate(self._row[: self._num_items].tolist()):
            rows[row].append(item)
        return rows

    def run(self, max_exchanges: int) -> None:
        """Better the worst row again and again, until none can be or all are level."""
        done = np.zeros(len(self._penalties), dtype=np.bool_)
        for _ in range(max_exchanges):
            row = int(np.argmax(np.where(done, -1.0, self._penalties)))
            if done[row] or self._penalties[row] <= (_LEVEL * self._mean) ** 2:
                return
            other = self._best_of(row)
            if other is not None:
                done[other] = False
            elif self._row_lengths[row] > self._capacity:
                return  # it stays too long
            else:
                done[row] = True

    def _best_of(self, row: int) -> int | None:
        """Make the exchange that betters ``row`` and its partner most; return the partner."""
        own = np.flatnonzero(self._row == row)
        length = self._lengths - self._lengths[own, None]  # [own, all]: what ``row`` would gain
        cost = self._costs - self._costs[own, None]
        change = self._judge(self._row_lengths[row] + length, self._row_costs[row] + cost)
        change += self._judge(
            self._row_lengths[self._row] - length, self._row_costs[self._row] - cost
        )
        change -= self._penalties[self._row]
        change[:, own] = np.inf
        place = int(np.argmin(change))
        given, taken = int(own[place // change.shape[1]]), place % change.shape[1]
        if change.flat[place] >= 0.999 * self._penalties[row]:
            return None
        partner = int(self._row[taken])
        for sign, changed in ((1.0, row), (-1.0, partner)):
            self._row_lengths[changed] += sign * (self._lengths[taken] - self._lengths[given])
            self._row_costs[changed] += sign * (self._costs[taken] - self._costs[given])
            self._penalties[changed] = self._judge(
                self._row_lengths[changed], self._row_costs[changed]
            )
        if given < self._num_items:
            self._row[given] = partner
        if taken < self._num_items:
            self._row[taken] = row
        return partner

    def _judge(self, lengths: FloatArray, costs: FloatArray) -> FloatArray:
        away = costs - self._mean
        return away * away + self._excess * np.maximum(lengths - self._capacity, 0.0)


def _sums(rows: IntArray, values: FloatArray, num_rows: int) -> FloatArray:
    """Sum values by row, one after the other."""
    sums: FloatArray = np.bincount(rows, values, num_rows).astype(np.float64)
    return sums


def level_rows(
    rows: Rows, lengths: Sequence[int], costs: Sequence[float], capacity: int
) -> Rows | None:
    """Exchange items between rows until rows are not too long and cost about the same.

    Args:
        rows: item numbers of each row; rows may be too long.
        lengths: of the items.
        costs: of the items, positive.
        capacity: of a row.

    Returns:
        As many rows, with the same items; None where a row stayed too long.
    """
    exchange = _Exchange(rows, lengths, costs, capacity)
    exchange.run(_MAX_EXCHANGES)
    return exchange.rows() if exchange.fits else None
