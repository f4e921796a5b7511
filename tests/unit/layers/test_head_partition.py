"""Heads that do not divide: every one exactly once, the rest zero."""

import pytest
import torch

from mmlm.layers.head_partition import HeadPartition


@pytest.mark.parametrize(
    ("num_heads", "tp_size", "num_slots"),
    [(25, 1, 25), (25, 2, 26), (25, 4, 28), (25, 8, 32), (5, 4, 8), (5, 8, 8), (4, 2, 4)],
)
def test_every_head_is_somewhere_once(num_heads: int, tp_size: int, num_slots: int) -> None:
    partition = HeadPartition(num_heads=num_heads, tp_size=tp_size)
    held = [partition.heads(rank) for rank in range(tp_size)]
    assert [head for heads in held for head in heads] == list(range(num_heads))
    assert partition.num_slots == num_slots == partition.slots_per_rank * tp_size
    sizes = {len(heads) for heads in held}
    assert max(sizes) <= partition.slots_per_rank and max(sizes) - min(sizes) <= 1


def test_padding_is_behind_the_heads_of_a_rank() -> None:
    partition = HeadPartition(num_heads=5, tp_size=4)
    rows, columns = torch.ones(2 * 3, 4), torch.ones(4, 2 * 3)
    for tp_rank, real in enumerate((2, 1, 1, 1)):
        for local, dim in ((rows.clone(), 0), (columns.clone(), 1)):
            partition.zero_padding_(local, dim, tp_rank)
            zeros = (local == 0).all(dim=1 - dim)
            assert zeros.tolist() == [index >= 3 * real for index in range(6)]
            assert set(local.unique().tolist()) <= {0.0, 1.0}
