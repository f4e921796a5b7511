"""Which samples share a row, and which rows share a microbatch. Pure functions of numbers.

Rows are first made as few as possible (best-fit decreasing), their number is rounded up to what
the layout needs, and the samples are then spread so that rows, data-parallel ranks and microbatches
cost about the same (largest first to the cheapest place).
"""

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

from mmlm.config.costs import forward_costs
from mmlm.config.model import ModelConfig

Rows = list[list[int]]


@dataclass(frozen=True, kw_only=True)
class PackingCost:
    """Time of a sample in units of one token's way through the linear layers of the decoder.

    The defaults are the FLOPs of InternViT-6B with Yi-34B; `packing_cost` derives them for a model.
    """

    per_squared_token: float = 1.25e-5
    """Causal attention: times the square of the sample's tokens."""
    per_image: float = 175.0
    """Vision tower and projection."""

    def of(self, num_tokens: int, num_images: int) -> float:
        """Return the cost of a sample."""
        return num_tokens + self.per_squared_token * num_tokens**2 + self.per_image * num_images


def packing_cost(model: ModelConfig) -> PackingCost:
    """Derive the cost of a sample from multiply-adds of a forward pass.

    Args:
        model: sizes of the three parts.
    """
    costs, num_layers = forward_costs(model), model.language.num_layers
    token = num_layers * costs.decoder_layer_per_token + costs.head_per_token
    pair = num_layers * costs.decoder_layer_per_squared_token
    image = model.vision.num_layers * costs.vision_layer_per_image + costs.projection_per_image
    return PackingCost(per_squared_token=pair / token, per_image=image / token)


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> Rows:
    """Put items into as few rows as best-fit decreasing finds.

    Args:
        lengths: of the items, each from 1 to ``capacity``.
        capacity: of a row.

    Returns:
        Item numbers of each row.
    """
    rows: Rows = []
    spaces: list[tuple[int, int]] = []  # sorted (free, row)
    for item in sorted(range(len(lengths)), key=lambda item: (-lengths[item], item)):
        assert 0 < lengths[item] <= capacity, "the index cuts samples at seq_length"
        place = bisect_left(spaces, (lengths[item], -1))
        if place < len(spaces):
            free, row = spaces.pop(place)
        else:
            free, row = capacity, len(rows)
            rows.append([])
        rows[row].append(item)
        insort(spaces, (free - lengths[item], row))
    return rows


def level_rows(
    lengths: Sequence[int], costs: Sequence[float], num_rows: int, capacity: int
) -> Rows | None:
    """Spread items over a given number of rows, dearest first to the cheapest row with room.

    Args:
        lengths: of the items.
        costs: of the items, positive.
        num_rows: rows to fill.
        capacity: of a row.

    Returns:
        Item numbers of each row, or None where an item found no room.
    """
    rows: Rows = [[] for _ in range(num_rows)]
    free = [capacity] * num_rows
    heap = [(0.0, row) for row in range(num_rows)]
    for item in sorted(range(len(lengths)), key=lambda item: (-costs[item], item)):
        full = []
        while heap and free[heap[0][1]] < lengths[item]:
            full.append(heapq.heappop(heap))
        if not heap:
            return None
        cost, row = heapq.heappop(heap)
        rows[row].append(item)
        free[row] -= lengths[item]
        for entry in (*full, (cost + costs[item], row)):
            heapq.heappush(heap, entry)
    return rows


def deal(costs: Sequence[float], num_groups: int) -> Rows:
    """Deal items into groups of equal count, dearest first to the cheapest group with a free slot.

    Args:
        costs: of the items; their number is a multiple of ``num_groups``.
        num_groups: groups to fill.

    Returns:
        Item numbers of each group.
    """
    slots = len(costs) // num_groups
    groups: Rows = [[] for _ in range(num_groups)]
    heap = [(0.0, group) for group in range(num_groups)]
    for item in sorted(range(len(costs)), key=lambda item: (-costs[item], item)):
        cost, group = heapq.heappop(heap)
        groups[group].append(item)
        if len(groups[group]) < slots:
            heapq.heappush(heap, (cost + costs[item], group))
    return groups


def pack(
    lengths: Sequence[int],
    costs: Sequence[float],
    *,
    seq_length: int,
    micro_batch_size: int,
    data_parallel_size: int,
    microbatch_multiple: int = 1,
) -> tuple[tuple[tuple[tuple[int, ...], ...], ...], ...]:
    """Pack the samples of one global batch.

    Args:
        lengths: tokens of each sample, from 1 to ``seq_length``.
        costs: of each sample, positive.
        seq_length: tokens of a row.
        micro_batch_size: rows of a microbatch.
        data_parallel_size: ranks that share the batch.
        microbatch_multiple: the microbatches of a rank are a multiple of this.

    Returns:
        ``[data-parallel rank][microbatch][row]`` = numbers of its samples, ascending. Every rank
        has the same number of microbatches; a row is empty only where samples are fewer than rows.
    """
    rows = best_fit_decreasing(lengths, seq_length)
    multiple = micro_batch_size * data_parallel_size * microbatch_multiple
    num_rows = max(1, -(-len(rows) // multiple)) * multiple
    rows = level_rows(lengths, costs, num_rows, seq_length) or _spread(rows, num_rows)
    row_costs = [sum(costs[item] for item in row) for row in rows]
    plan = []
    for rank_rows in deal(row_costs, data_parallel_size):
        rank_costs = [row_costs[row] for row in rank_rows]
        groups = deal(rank_costs, len(rank_rows) // micro_batch_size)
        group_costs = [sum(rank_costs[item] for item in group) for group in groups]
        # Dearest first on every rank, so that ranks run microbatches of about equal cost together.
        order = sorted(range(len(groups)), key=group_costs.__getitem__, reverse=True)
        plan.append(
            tuple(
                tuple(tuple(sorted(rows[rank_rows[item]])) for item in groups[group])
                for group in order
            )
        )
    return tuple(plan)


def _spread(rows: Rows, num_rows: int) -> Rows:
    """Give the rows that rounding up added a sample each, while some row has more than one."""
    rows = [list(row) for row in rows]
    while len(rows) < num_rows:
        donor = max(rows, key=len)
        rows.append([donor.pop()] if len(donor) > 1 else [])
    return rows
