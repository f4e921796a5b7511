"""Norms against their formula, and the mark that sequence parallelism needs."""

from types import SimpleNamespace

import pytest
import torch

from mmlm.layers.norm import LayerNorm, RMSNorm


def settings(dtype: torch.dtype = torch.float32, sp: bool = False) -> SimpleNamespace:
    """What the norms read of a TransformerConfig."""
    return SimpleNamespace(params_dtype=dtype, sequence_parallel=sp)


def test_rms_norm_is_its_formula() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(5, 1, 40), torch.randn(40)
    norm = RMSNorm(settings(), 40, eps=0.1)
    norm.weight.data.copy_(weight)
    expected = x / torch.sqrt((x * x).sum(dim=-1, keepdim=True) / 40 + 0.1) * weight
    # measured 4.8e-7
    torch.testing.assert_close(norm(x), expected, rtol=0, atol=2e-6)


def test_rms_norm_in_bf16_has_a_statistic_in_fp32() -> None:
    """4096 numbers near 3: a sum of squares kept in bf16 would stop growing at about 2048."""
    torch.manual_seed(0)
    x = (3 + 0.01 * torch.randn(2, 4096)).bfloat16()
    norm = RMSNorm(settings(torch.bfloat16), 4096, eps=1e-6)
    wide = x.float()
    expected = wide / torch.sqrt((wide * wide).mean(dim=-1, keepdim=True) + 1e-6)
    assert norm(x).dtype == torch.bfloat16
    # half a unit in the last place of bf16 at 1 is 0.0039
    torch.testing.assert_close(norm(x).float(), expected, rtol=0, atol=0.004)


def test_layer_norm_is_its_formula() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(5, 1, 40), torch.randn(40), torch.randn(40)
    norm = LayerNorm(settings(), 40, eps=0.1)
    norm.weight.data.copy_(weight)
    norm.bias.data.copy_(bias)
    centred = x - x.mean(dim=-1, keepdim=True)
    variance = (centred * centred).sum(dim=-1, keepdim=True) / 40
    # measured 4.8e-7
    torch.testing.assert_close(
        norm(x), centred / torch.sqrt(variance + 0.1) * weight + bias, rtol=0, atol=4e-6
    )


@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
@pytest.mark.parametrize("sp", [False, True])
def test_parameters_carry_the_mark_of_sequence_parallelism(kind: type, sp: bool) -> None:
    for parameter in kind(settings(sp=sp), 8, eps=1e-6).parameters():
        assert parameter.sequence_parallel is sp
