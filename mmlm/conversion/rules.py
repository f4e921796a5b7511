"""How tensors of HuggingFace and of Megatron turn into each other.

Every rule owns both directions and is a pure permutation of rows: no arithmetic, no change of
dtype, so a round trip is exact to the bit. Letters in shapes: h hidden size, d size of a head, f
width inside the MLP, g query groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Shape = tuple[int, ...]


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
