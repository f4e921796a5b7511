"""Segments as attention needs them."""

import torch

from mmlm.layers.packed_sequence import PackedSequence


def test_lengths_become_cumulative_lengths() -> None:
    packed = PackedSequence.from_lengths((3, 1, 4), torch.device("cpu"))
    assert packed.segment_lengths == (3, 1, 4)
    for cumulative in (packed.cu_seqlens_q, packed.cu_seqlens_kv):
        assert cumulative.dtype == torch.int32
        assert cumulative.tolist() == [0, 3, 4, 8]
    assert packed.max_seqlen_q == packed.max_seqlen_kv == 4
    # with "thd" megatron-core would take the rotary embedding out of our hands
    assert packed.qkv_format != "thd"
