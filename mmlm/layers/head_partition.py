"""Which attention heads a tensor-parallel rank holds when the heads do not divide by TP.

Every rank gets the same number of slots; a slot without a true head is padding. A padding head is
a fixed point of the training: its rows of ``linear_qkv`` and its columns of ``linear_proj`` are
zero, so v is 0, so its output is 0, so every gradient into it is 0, so AdamW keeps it at 0. No
mask is needed, only zeros at the start.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class HeadPartition:
    """An even, contiguous spread of ``num_heads`` heads over ``tp_size`` ranks."""

    num_heads: int
    """True heads of the layer."""
    tp_size: int
    """Tensor-parallel ranks."""

    @property
    def slots_per_rank(self) -> int:
        """Heads that each rank computes, padding included."""
        return -(-self.num_heads // self.tp_size)

    @property
    def num_slots(self) -> int:
        """Heads over all ranks, padding included."""
        return self.slots_per_rank * self.tp_size

    def heads(self, tp_rank: int) -> range:
        """Global indices of the true heads in the first slots of ``tp_rank``; may be empty."""
        each, extra = divmod(self.num_heads, self.tp_size)
        start = tp_rank * each + min(tp_rank, extra)
        return range(start, start + each + (tp_rank < extra))

    def zero_padding_(self, local: torch.Tensor, dim: int, tp_rank: int) -> None:
        """Set what belongs to padding heads to zero, in place.

        Args:
            local: this rank's shard; its size along ``dim`` is ``slots_per_rank`` blocks.
            dim: the dimension that is laid out head by head.
            tp_rank: whose shard it is.
        """
        real = local.shape[dim] // self.slots_per_rank * len(self.heads(tp_rank))
        with torch.no_grad():
            local.narrow(dim, real, local.shape[dim] - real).zero_()
