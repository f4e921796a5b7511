"""The rows that a residual branch is computed for: every kept row once, shared out evenly."""

from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmlm.layers.kept_rows import KeptRows, add_rows, kept_rows, take_rows


def test_one_rank_takes_the_kept_images() -> None:
    rows = kept_rows([True, False, True, True], 5, 22, num_ranks=1, rank=0)
    assert rows.runs == ((True, 5), (False, 5), (True, 10), (False, 2))
    assert rows.send == rows.receive == (15,)
    assert rows.segment_lengths == (5, 5, 5) and rows.padding == 0 and not rows.inert


def test_nothing_kept_leaves_one_row_of_each_rank() -> None:
    rows = kept_rows([False, False], 5, 12, num_ranks=4, rank=2)
    assert rows.runs == ((True, 1), (False, 2))
    assert rows.inert and rows.segment_lengths == (4,) and rows.padding == 0
    assert rows.send == rows.receive == (0, 0, 1, 0)


@given(
    st.lists(st.booleans(), min_size=1, max_size=7), st.integers(1, 9), st.sampled_from([1, 2, 4])
)
def test_every_kept_row_arrives_once_in_order(
    kept: list[bool], tokens_per_image: int, num_ranks: int
) -> None:
    length = len(kept) * tokens_per_image
    length += -length % num_ranks
    share = length // num_ranks
    wanted = [
        row for row in range(len(kept) * tokens_per_image) if kept[row // tokens_per_image]
    ] or [rank * share for rank in range(num_ranks)]
    ranks = [
        kept_rows(kept, tokens_per_image, length, num_ranks, rank) for rank in range(num_ranks)
    ]
    held = [_held(rows, rank * share) for rank, rows in enumerate(ranks)]
    assert list(chain.from_iterable(held)) == wanted
    arrived = []
    for goal, rows in enumerate(ranks):
        got = []
        for source, other in enumerate(ranks):
            start = sum(other.send[:goal])
            assert other.send[goal] == rows.receive[source]
            got += held[source][start : start + other.send[goal]]
        assert len(got) + rows.padding == -(-len(wanted) // num_ranks)
        arrived += got
        assert sum(rows.segment_lengths) == -(-len(wanted) // num_ranks) * num_ranks
    assert arrived == wanted


def _held(rows: KeptRows, begin: int) -> list[int]:
    found = []
    for flag, count in rows.runs:
        found += list(range(begin, begin + count)) if flag else []
        begin += count
    return found


@pytest.mark.parametrize("kept", [[True, False, True], [False, False, False], [True, True, False]])
def test_rows_are_taken_and_added_where_they_were(kept: list[bool]) -> None:
    x = (
        torch.arange(16.0).view(8, 1, 2).requires_grad_()
    )  # three images of two rows, two of padding
    rows = kept_rows(kept, 2, 8, num_ranks=1, rank=0)
    group = None  # no rank to share with
    out = add_rows(x, take_rows(x, rows, group) * 10, 0.5, rows, group)
    expected = x.detach().clone()
    for image, flag in enumerate(kept):
        if flag:
            expected[2 * image : 2 * image + 2] *= 6
    assert torch.equal(out, expected)
    out.sum().backward()
    factor = torch.tensor([6.0 if flag else 1.0 for flag in kept for _ in range(2)] + [1.0, 1.0])
    assert torch.equal(x.grad, factor.view(8, 1, 1).expand(8, 1, 2))
