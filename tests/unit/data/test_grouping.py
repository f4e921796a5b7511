"""Groups by length, against HuggingFace's own code and by hand."""

import numpy as np
import pytest
import torch
from transformers.trainer_pt_utils import get_length_grouped_indices

from mmlm.data.grouping import even_chunks, group_by_length


@pytest.mark.parametrize(("num_samples", "batch_size"), [(1000, 4), (1000, 3), (37, 8), (5, 8)])
def test_grouping_is_what_huggingface_does(num_samples: int, batch_size: int) -> None:
    lengths = np.random.default_rng(num_samples).integers(5, 60, num_samples)
    order = torch.randperm(num_samples, generator=torch.Generator().manual_seed(3)).numpy()
    theirs = get_length_grouped_indices(
        lengths.tolist(), batch_size, generator=torch.Generator().manual_seed(3)
    )
    assert group_by_length(order, lengths, batch_size).tolist() == theirs


def test_the_order_that_is_grouped_stays_as_it_was() -> None:
    order = np.arange(20)
    order.setflags(write=False)
    assert group_by_length(order, np.arange(20), 2).tolist()[:6] == [19, 2, 1, 0, 7, 6]


def test_even_chunks_by_hand() -> None:
    """Longest first, each to the chunk with least in it that has a place."""
    samples, lengths = np.array([9, 8, 7, 6, 5, 4]), np.array([10, 90, 40, 20, 30, 60])
    assert even_chunks(samples, lengths, 3).tolist() == [8, 5, 9, 4, 7, 6]


def test_chunks_that_do_not_come_out_even_are_dealt_round() -> None:
    samples, lengths = np.array([4, 3, 2, 1, 0]), np.array([10, 50, 40, 20, 30])
    assert even_chunks(samples, lengths, 2).tolist() == [3, 1, 2, 4, 0]
