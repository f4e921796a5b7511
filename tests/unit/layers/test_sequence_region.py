"""Entering and leaving a sequence region: values and gradients against doing neither."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmlm.config.schema import ParallelConfig
from mmlm.layers.sequence_region import (
    enter_sequence_region,
    leave_sequence_region,
    local_part,
    outside_sequence_region,
    pad_stream,
    padding_tokens,
)
from mmlm.parallel import topology
from tests.distributed.launch import run_ranks


def settings(*, sequence_parallel: bool) -> Any:
    return SimpleNamespace(sequence_parallel=sequence_parallel, tensor_model_parallel_size=2)


def _through(upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A token-wise function inside a region of two ranks; what comes out, and gradients."""
    groups = topology.initialize(ParallelConfig(tensor_model_parallel_size=2)).groups
    config = settings(sequence_parallel=True)
    x = torch.arange(18.0).view(6, 1, 3).requires_grad_()
    inside = enter_sequence_region(x, config, groups)
    rows = local_part(torch.arange(6.0), config, groups)
    out = leave_sequence_region(inside**2, config, groups)
    (out * upstream).sum().backward()
    return out.detach(), x.grad, rows


@pytest.mark.distributed
def test_values_and_gradients_are_those_without_a_region() -> None:
    upstream = torch.linspace(-1, 1, 18).view(6, 1, 3)
    x = torch.arange(18.0).view(6, 1, 3)
    for rank, (out, gradient, rows) in enumerate(run_ranks(2, _through, upstream)):
        assert torch.equal(out, x**2)
        # a reduce-scatter on leaving would give twice as much
        torch.testing.assert_close(gradient, 2 * x * upstream, rtol=0, atol=0)
        assert rows.tolist() == [[0, 1, 2], [3, 4, 5]][rank]


def test_without_sequence_parallelism_nothing_happens() -> None:
    config, x = settings(sequence_parallel=False), torch.zeros(5, 1, 2)
    groups: Any = None
    assert enter_sequence_region(x, config, groups) is x
    assert leave_sequence_region(x, config, groups) is x
    assert local_part(x, config, groups) is x
    assert outside_sequence_region(config) is config
    assert padding_tokens(5, config) == 0


def test_padding_is_zero_rows_behind() -> None:
    config = settings(sequence_parallel=True)
    assert [padding_tokens(n, config) for n in (1, 2, 17, 34)] == [1, 0, 1, 0]
    padded = pad_stream(torch.ones(5, 1, 2), 1)
    assert padded[:, 0, 0].tolist() == [1, 1, 1, 1, 1, 0]
    assert outside_sequence_region(config).sequence_parallel is False
    assert config.sequence_parallel is True
