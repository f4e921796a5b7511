"""NaN and infinity are found wherever they are, and large finite numbers are not taken for them."""

import logging

import pytest
import torch

from mmlm.conversion.finite import FiniteCheck, is_finite
from mmlm.errors import CheckpointError


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_one_element_is_enough(dtype: torch.dtype):
    block = torch.randn(50, 40).to(dtype)
    assert is_finite(block)
    for value in (float("nan"), float("inf"), -float("inf")):
        for place in ((0, 0), (49, 39), (20, 7)):
            damaged = block.clone()
            damaged[place] = value
            assert not is_finite(damaged)
    both = block.clone()
    both[0, 0], both[1, 1] = float("inf"), -float("inf")
    assert not is_finite(both)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_sum_may_overflow(dtype: torch.dtype):
    assert is_finite(torch.full((100, 100), torch.finfo(dtype).max, dtype=dtype))


def test_other_types_and_nothing():
    assert is_finite(torch.tensor([2**60]))
    assert is_finite(torch.zeros(0, 3))
    assert is_finite(torch.ones(3).to(torch.float8_e4m3fn))
    assert not is_finite(torch.tensor([float("nan")]).to(torch.float8_e4m3fn))


def test_a_warning_names_what_was_found(caplog: pytest.LogCaptureFixture):
    check = FiniteCheck()
    check.look(torch.ones(2), "good", "FILE")
    with caplog.at_level(logging.WARNING, "mmlm.conversion"):
        check.warn()
        assert not caplog.records
        for number in range(12):
            for _ in range(2):
                check.look(torch.tensor([float("nan")]), f"bad{number}", "FILE")
        check.warn()
    (record,) = caplog.records
    message = record.getMessage()
    assert message.startswith("NaN or infinity in 12 tensors: 'bad0' in FILE, 'bad1' in FILE")
    assert message.endswith("'bad9' in FILE and 2 more (--strict refuses them)")


def test_strict_refuses():
    check = FiniteCheck(strict=True)
    with pytest.raises(CheckpointError, match="FILE: tensor 'bad' holds NaN or infinity"):
        check.look(torch.tensor([float("inf")]), "bad", "FILE")
