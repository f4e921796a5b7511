"""Tensors of all ranks on rank 0, in order, and nothing elsewhere."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mmlm.parallel.collect import bring_to_rank_zero
from tests.distributed.launch import run_ranks


def _collect() -> list[tuple[str, Tensor]]:
    rank = dist.get_rank()
    mine = [
        (f"{rank}/{number}", torch.full((number, 2), rank + 0.5, dtype=dtype))
        for number, dtype in enumerate((torch.float32, torch.bfloat16, torch.float64)[: rank + 1])
    ]
    return list(bring_to_rank_zero(mine))


@pytest.mark.distributed
def test_rank_zero_gets_every_tensor_in_the_order_of_the_ranks() -> None:
    first, *others = run_ranks(3, _collect)
    assert others == [[], []]
    assert [note for note, _ in first] == ["0/0", "1/0", "1/1", "2/0", "2/1", "2/2"]
    for note, tensor in first:
        rank, number = map(int, note.split("/"))
        assert tensor.shape == (number, 2) and bool((tensor == rank + 0.5).all())
    assert [tensor.dtype for _, tensor in first][-3:] == [
        torch.float32,
        torch.bfloat16,
        torch.float64,
    ]
