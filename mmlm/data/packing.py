"""Which samples share a row, and which rows share a microbatch. Pure functions of numbers.

The samples are spread over as few rows as the layout allows, dearest first to the cheapest row;
then pairs of samples change places until rows hold what they can and cost about the same. Where
that finds no place for everything, one more round of rows is tried, and at last best-fit
decreasing, which always finds one. Rows go to data-parallel ranks and microbatches by cost.
"""

import heapq
import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

from mmlm.config.costs import forward_costs
from mmlm.config.model import ModelConfig
from mmlm.data.levelling import Rows, level_rows, spread

Plan = tuple[tuple[tuple[tuple[int, ...], ...], ...], ...]
"""``[data-parallel rank][microbatch][row]`` = numbers of its samples, ascending."""

_FULL = 0.985
"""Fuller than this, rows are not worth trying: some sample finds no place nearly always."""


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
) -> Plan:
    """Pack the samples of one global batch.

    Args:
        lengths: tokens of each sample, from 1 to ``seq_length``.
        costs: of each sample, positive.
        seq_length: tokens of a row.
        micro_batch_size: rows of a microbatch.
        data_parallel_size: ranks that share the batch.
        microbatch_multiple: the microbatches of a rank are a multiple of this.

    Returns:
        The plan. Every rank has the same number of microbatches; a row is empty only where samples
        are fewer than rows.
    """
    multiple = micro_batch_size * data_parallel_size * microbatch_multiple
    rows = _full_rows(lengths, costs, seq_length, multiple)
    row_costs = [sum(costs[item] for item in row) for row in rows]
    row_lengths = [sum(lengths[item] for item in row) for row in rows]
    # Rows cost about the same by now. What is not tokens counts twice, so that ranks get about as
    # many images each, and with them about as many tokens.
    weights = [2 * cost - length for cost, length in zip(row_costs, row_lengths, strict=True)]
    plan = []
    for rank_rows in deal(weights, data_parallel_size):
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


def one_a_row(
    num_samples: int,
    *,
    micro_batch_size: int,
    data_parallel_size: int,
    microbatch_multiple: int = 1,
) -> Plan:
    """Give every sample a row of its own, in order: microbatches go round the ranks, as published.

    Args:
        num_samples: of the global batch.
        micro_batch_size: rows of a microbatch.
        data_parallel_size: ranks that share the batch.
        microbatch_multiple: the microbatches of a rank are a multiple of this.

    Returns:
        The plan; the last rows are empty where the samples are no multiple of what is asked for.
    """
    multiple = micro_batch_size * data_parallel_size * microbatch_multiple
    num_rows = max(1, -(-num_samples // multiple)) * multiple
    rows = [(item,) if item < num_samples else () for item in range(num_rows)]
    starts = range(0, num_rows, micro_batch_size)
    microbatches = [tuple(rows[start : start + micro_batch_size]) for start in starts]
    return tuple(
        tuple(microbatches[rank::data_parallel_size]) for rank in range(data_parallel_size)
    )


def _full_rows(
    lengths: Sequence[int], costs: Sequence[float], capacity: int, multiple: int
) -> Rows:
    """Fill rows, their number a multiple of ``multiple``."""
    fewest = max(1, math.ceil(sum(lengths) / (_FULL * capacity)))
    safe = best_fit_decreasing(lengths, capacity)
    most = -(-len(safe) // multiple) * multiple
    least = min(most, -(-fewest // multiple) * multiple)
    for num_rows in range(least, most + 1, multiple):
        rows = level_rows(spread(lengths, costs, num_rows, capacity), lengths, costs, capacity)
        if rows is not None:
            return rows
    while len(safe) < most:
        donor = max(safe, key=len)
        safe.append([donor.pop()] if len(donor) > 1 else [])
    rows = level_rows(safe, lengths, costs, capacity)
    assert rows is not None, "best-fit decreasing fits, and exchanges make no row longer"
    return rows
