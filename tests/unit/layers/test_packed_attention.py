"""Packed attention against explicit softmax, segment by segment and head by head."""

import math
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from mmlm.layers.packed_attention import PackedAttention
from mmlm.layers.packed_sequence import PackedSequence

HEAD_SIZE = 6


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], causal: bool
) -> Tensor:
    """[t, n, d], [t, g, d], [t, g, d] -> [t, n * d]."""
    out = torch.zeros_like(query)
    ends = list(accumulate(lengths))
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        for head in range(query.shape[1]):
            group = head // (query.shape[1] // key.shape[1])
            scores = query[start:end, head] @ key[start:end, group].T / math.sqrt(HEAD_SIZE)
            if causal:
                future = torch.ones(end - start, end - start).triu(1).bool()
                scores = scores.masked_fill(future, float("-inf"))
            out[start:end, head] = scores.softmax(dim=-1) @ value[start:end, group]
    return out.flatten(1)


def attention(causal: bool, num_heads: int = 4, num_groups: int = 2) -> PackedAttention:
    """The module, without process groups."""
    config: Any = SimpleNamespace(
        attention_dropout=0.0,
        context_parallel_size=1,
        kv_channels=HEAD_SIZE,
        num_attention_heads=num_heads,
        num_query_groups=num_groups,
    )
    mask = AttnMaskType.causal if causal else AttnMaskType.no_mask
    return PackedAttention(config, 1, mask, "self", pg_collection=None)


def inputs(num_tokens: int, num_heads: int, num_groups: int) -> list[Tensor]:
    """q, k, v of the stream."""
    generator = torch.Generator().manual_seed(num_tokens)
    return [
        torch.randn(num_tokens, 1, heads, HEAD_SIZE, generator=generator)
        for heads in (num_heads, num_groups, num_groups)
    ]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("num_groups", [1, 2, 4])
@pytest.mark.parametrize("lengths", [(12,), (5, 5, 5), (3, 3, 1, 7, 7, 2, 1), (1,)])
def test_outputs_and_gradients(causal: bool, num_groups: int, lengths: tuple[int, ...]) -> None:
    mine = [x.requires_grad_() for x in inputs(sum(lengths), 4, num_groups)]
    plain = [x.detach().clone().requires_grad_() for x in mine]
    packed = PackedSequence.from_lengths(lengths, torch.device("cpu"))
    module = attention(causal, 4, num_groups)
    out = module(*mine, None, packed_seq_params=packed)
    expected = plain_attention(*(x[:, 0] for x in plain), lengths, causal)
    assert out.shape == (sum(lengths), 1, 4 * HEAD_SIZE)
    # measured 4e-7 (outputs) and 1.4e-6 (gradients)
    torch.testing.assert_close(out[:, 0], expected, rtol=0, atol=5e-6)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (out[:, 0] * upstream).sum().backward()
    (expected * upstream).sum().backward()
    for one, other in zip(mine, plain, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=1e-5)


def test_without_segments_the_stream_is_one() -> None:
    query, key, value = inputs(9, 4, 2)
    expected = plain_attention(query[:, 0], key[:, 0], value[:, 0], (9,), True)
    out = attention(causal=True)(query, key, value, None)
    torch.testing.assert_close(out[:, 0], expected, rtol=0, atol=5e-6)  # measured 3e-7


def test_bf16_is_computed_in_fp32_and_rounded_once() -> None:
    lengths = (4, 4, 9)
    mine = [x.bfloat16().requires_grad_() for x in inputs(sum(lengths), 4, 2)]
    plain = [x.detach().float().requires_grad_() for x in mine]
    packed = PackedSequence.from_lengths(lengths, torch.device("cpu"))
    out = attention(causal=True)(*mine, None, packed_seq_params=packed)
    expected = plain_attention(*(x[:, 0] for x in plain), lengths, True)
    assert out.dtype == torch.bfloat16
    # one rounding to bf16 is a relative error of at most 2^-8 (half of it in the mean)
    torch.testing.assert_close(out[:, 0].float(), expected, rtol=2**-8, atol=1e-6)
    out.float().sum().backward()
    expected.sum().backward()
    for one, other in zip(mine, plain, strict=True):
        assert one.grad.dtype == torch.bfloat16
        torch.testing.assert_close(one.grad.float(), other.grad, rtol=2**-8, atol=1e-6)
