"""How tensors of HuggingFace and of Megatron turn into each other.

Every rule owns both directions and is a pure permutation of rows: no arithmetic, no change of
dtype, so a round trip is exact to the bit. Letters in shapes: h hidden size, d size of a head, f
width inside the MLP, g query groups.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Shape = tuple[int, ...]

RowRun = tuple[int, slice]
"""Rows of one of a row's HuggingFace tensors: its place among them, and which rows."""


class Rule(Protocol):
    """Both directions between the HuggingFace tensors of a row and its one Megatron tensor."""

    def to_megatron(self, tensors: Sequence[Tensor]) -> Tensor:
        """HuggingFace tensors in the order of the row's names -> the Megatron tensor."""
        ...

    def to_hf(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """The Megatron tensor -> contiguous HuggingFace tensors in the order of the names."""
        ...

    def megatron_shape(self, shapes: Sequence[Shape]) -> Shape:
        """Shape of the Megatron tensor, from those of the HuggingFace tensors."""
        ...

    def row_runs(self, start: int, stop: int, shapes: Sequence[Shape]) -> list[RowRun]:
        """Where rows ``start:stop`` of the Megatron tensor lie, as runs in their order.

        Args:
            start: first row.
            stop: one past the last; rows are those of the true shape.
            shapes: of the HuggingFace tensors.
        """
        ...


def megatron_rows(
    rule: Rule, number: int, start: int, stop: int, shapes: Sequence[Shape]
) -> list[slice]:
    """Where rows ``start:stop`` of one HuggingFace tensor lie in the Megatron tensor, in order.

    Args:
        rule: of the row.
        number: which of the row's HuggingFace tensors.
        start: first row.
        stop: one past the last.
        shapes: of the HuggingFace tensors.
    """
    found, end = [], 0
    for place, rows in rule.row_runs(0, rule.megatron_shape(shapes)[0], shapes):
        first, end = end, end + rows.stop - rows.start
        low, high = max(start, rows.start), min(stop, rows.stop)
        if place == number and low < high:
            found.append((low, slice(first + low - rows.start, first + high - rows.start)))
    return [rows for _, rows in sorted(found, key=lambda run: run[0])]


def _pieces(start: int, stop: int, block: int) -> Iterator[tuple[int, slice]]:
    """Cut ``start:stop`` at multiples of ``block``: number of the block, and rows inside it."""
    while start < stop:
        number, first = divmod(start, block)
        last = min(stop - number * block, block)
        yield number, slice(first, last)
        start = number * block + last


def _moved(rows: slice, by: int) -> slice:
    return slice(rows.start + by, rows.stop + by)


@dataclass(frozen=True, kw_only=True)
class Copy:
    """Same tensor under another name."""

    def to_megatron(self, tensors: Sequence[Tensor]) -> Tensor:
        (tensor,) = tensors
        return tensor

    def to_hf(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return (tensor,)

    def megatron_shape(self, shapes: Sequence[Shape]) -> Shape:
        (shape,) = shapes
        return shape

    def row_runs(self, start: int, stop: int, shapes: Sequence[Shape]) -> list[RowRun]:
        return [(0, slice(start, stop))]


@dataclass(frozen=True, kw_only=True)
class StackedQkv:
    """One tensor on both sides: all q, all k, all v <-> q, k, v of head 0, of head 1, ..."""

    num_attention_heads: int
    """Heads, the same for q, k and v."""

    def to_megatron(self, tensors: Sequence[Tensor]) -> Tensor:
        (stacked,) = tensors  # [3 * heads * d, h]
        by_head = stacked.view(3, self.num_attention_heads, -1, stacked.shape[-1])
        return by_head.transpose(0, 1).reshape(stacked.shape)

    def to_hf(self, tensor: Tensor) -> tuple[Tensor, ...]:
        by_head = tensor.view(self.num_attention_heads, 3, -1, tensor.shape[-1])
        return (by_head.transpose(0, 1).reshape(tensor.shape),)

    def megatron_shape(self, shapes: Sequence[Shape]) -> Shape:
        (shape,) = shapes
        return shape

    def row_runs(self, start: int, stop: int, shapes: Sequence[Shape]) -> list[RowRun]:
        size = shapes[0][0] // (3 * self.num_attention_heads)
        runs = []
        for number, rows in _pieces(start, stop, size):
            head, kind = divmod(number, 3)
            runs.append((0, _moved(rows, (kind * self.num_attention_heads + head) * size)))
        return runs


@dataclass(frozen=True, kw_only=True)
class GroupedQkv:
    """q, k, v <-> one tensor, group by group: the queries of the group, its key, its value."""

    num_query_groups: int
    """Key/value heads; each serves an equal number of consecutive query heads."""
    kv_channels: int
    """d, the size of one head."""

    def to_megatron(self, tensors: Sequence[Tensor]) -> Tensor:
        hidden_size = tensors[0].shape[-1]  # [heads * d, h], [g * d, h], [g * d, h]
        grouped = [each.view(self.num_query_groups, -1, hidden_size) for each in tensors]
        return torch.cat(grouped, dim=1).reshape(-1, hidden_size)

    def to_hf(self, tensor: Tensor) -> tuple[Tensor, ...]:
        grouped = tensor.view(self.num_query_groups, -1, tensor.shape[-1])
        rows = [grouped.shape[1] - 2 * self.kv_channels, self.kv_channels, self.kv_channels]
        return tuple(
            each.reshape(-1, tensor.shape[-1]).contiguous() for each in grouped.split(rows, dim=1)
        )

    def megatron_shape(self, shapes: Sequence[Shape]) -> Shape:
        return (sum(shape[0] for shape in shapes), shapes[0][1])

    def row_runs(self, start: int, stop: int, shapes: Sequence[Shape]) -> list[RowRun]:
        queries = shapes[0][0] // self.num_query_groups
        runs = []
        for group, in_group in _pieces(start, stop, queries + 2 * self.kv_channels):
            end = 0
            for place, count in enumerate((queries, self.kv_channels, self.kv_channels)):
                first, end = end, end + count
                rows = slice(max(in_group.start, first), min(in_group.stop, end))
                if rows.start < rows.stop:
                    runs.append((place, _moved(rows, group * count - first)))
        return runs


@dataclass(frozen=True, kw_only=True)
class GateUp:
    """gate [f, h] and up [f, h] <-> the gate's rows, then those of up [2f, h]."""

    def to_megatron(self, tensors: Sequence[Tensor]) -> Tensor:
        gate, up = tensors
        return torch.cat((gate, up))

    def to_hf(self, tensor: Tensor) -> tuple[Tensor, ...]:
        gate, up = tensor.chunk(2)
        return gate, up

    def megatron_shape(self, shapes: Sequence[Shape]) -> Shape:
        return (sum(shape[0] for shape in shapes), shapes[0][1])

    def row_runs(self, start: int, stop: int, shapes: Sequence[Shape]) -> list[RowRun]:
        return list(_pieces(start, stop, shapes[0][0]))
