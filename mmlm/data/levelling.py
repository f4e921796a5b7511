"""Rows of about equal cost that hold what they can: spread, then exchanges. Pure functions."""

import heapq
import math
from collections.abc import Sequence

import numpy as np

Rows = list[list[int]]
"""Item numbers of each row."""

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

    A row's penalty is (cost - mean)^2, and so much for every token above the capacity that room
    comes first. Every sum is made one by one and everything else element by element, so that all
    machines find the same rows.
    """

    def __init__(
        self, rows: Rows, lengths: Sequence[int], costs: Sequence[float], capacity: int
    ) -> None:
        num_rows = len(rows)
        self._num_items = len(lengths)
        self._mean = math.fsum(costs) / num_rows
        self._excess = 16.0 * math.fsum(costs) ** 2
        # after the items, a nothing of each row
        self._lengths = np.array([*lengths, *[0] * num_rows], dtype=np.float64)
        self._costs = np.array([*costs, *[0.0] * num_rows], dtype=np.float64)
        self._row = np.array([0] * len(lengths) + list(range(num_rows)), dtype=np.int64)
        for row, items in enumerate(rows):
            self._row[items] = row
        self._room = np.array([capacity - sum(lengths[i] for i in row) for row in rows], np.float64)
        self._away = np.array([math.fsum(costs[i] for i in row) for row in rows]) - self._mean

    @property
    def fits(self) -> bool:
        """Whether no row is too long."""
        return bool(np.all(self._room >= 0))

    def rows(self) -> Rows:
        """Item numbers of each row."""
        rows: Rows = [[] for _ in range(len(self._room))]
        for item, row in enumerate(self._row[: self._num_items].tolist()):
            rows[row].append(item)
        return rows

    def run(self, max_exchanges: int) -> None:
        """Better the worst row again and again, until none can be or all are level."""
        done = np.zeros(len(self._room), dtype=np.bool_)
        for _ in range(max_exchanges):
            penalties = self._away * self._away + self._excess * np.maximum(-self._room, 0.0)
            row = int(np.argmax(np.where(done, -1.0, penalties)))
            if done[row] or penalties[row] <= (_LEVEL * self._mean) ** 2:
                return
            partner = self._best_of(row, least_gain=0.001 * penalties[row])
            if partner is not None:
                done[partner] = False
            elif self._room[row] < 0:
                return  # it stays too long
            else:
                done[row] = True

    def _best_of(self, row: int, least_gain: float) -> int | None:
        """Make the exchange that betters ``row`` and its partner most; return the partner."""
        own = np.flatnonzero(self._row == row)
        room, away = self._room[self._row], self._away[self._row]
        length = self._lengths - self._lengths[own, None]  # [own, all]: what ``row`` would gain
        cost = self._costs - self._costs[own, None]
        # (away of row + cost)^2 + (away - cost)^2, less the same without cost
        change = 2.0 * cost * (cost + (self._away[row] - away))
        too_long = np.maximum(length - self._room[row], 0.0) + np.maximum(-length - room, 0.0)
        too_long -= np.maximum(-room, 0.0) + max(-self._room[row], 0.0)
        change += self._excess * too_long
        change[:, own] = np.inf
        place = int(np.argmin(change))
        if change.flat[place] > -least_gain:
            return None
        given, taken = int(own[place // change.shape[1]]), place % change.shape[1]
        partner = int(self._row[taken])
        for sign, changed in ((1.0, row), (-1.0, partner)):
            self._room[changed] -= sign * (self._lengths[taken] - self._lengths[given])
            self._away[changed] += sign * (self._costs[taken] - self._costs[given])
        for item, new_row in ((given, partner), (taken, row)):
            if item < self._num_items:
                self._row[item] = new_row
        return partner


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
