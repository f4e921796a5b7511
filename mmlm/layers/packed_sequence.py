"""Where the segments of a packed stream begin and end, as attention needs it."""

from dataclasses import dataclass
from itertools import accumulate

import torch
from megatron.core.packed_seq_params import PackedSeqParams


@dataclass
class PackedSequence(PackedSeqParams):
    """Segments of one flat token stream; attention never crosses them.

    A subclass of megatron-core's ``PackedSeqParams`` that also keeps the lengths as Python numbers:
    no layer has to copy them from the device. ``qkv_format`` is not "thd" on purpose: megatron-core
    then hands q, k, v on as [t, 1, heads, d] and applies the rotary embedding row by row, which,
    with rows gathered by position, restarts in each segment.
    """

    segment_lengths: tuple[int, ...] = ()
    """Tokens of each segment, in order; their sum is the length of the stream."""

    @classmethod
    def from_lengths(
        cls, lengths: tuple[int, ...], device: torch.device, **fields: object
    ) -> "PackedSequence":
        """Build the cumulative lengths (int32, on ``device``) of segments of ``lengths`` tokens."""
        # made on the CPU first: given a device, torch.tensor would wait for all work on it
        cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        cu_seqlens = cu_seqlens.to(device, non_blocking=True)
        return cls(
            qkv_format="packed",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=max(lengths),
            max_seqlen_kv=max(lengths),
            segment_lengths=tuple(lengths),
            **fields,
        )
