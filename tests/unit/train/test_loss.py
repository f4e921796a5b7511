"""Cross entropy and most likely token over a vocabulary that two ranks share; answers."""

import pytest
import torch
from torch import Tensor

from mmlm.config.schema import ParallelConfig
from mmlm.parallel import topology
from mmlm.train.loss import answer_spans, cross_entropies, vocab_parallel_argmax
from tests.distributed.launch import run_ranks

INF = float("inf")


def make_logits() -> tuple[Tensor, Tensor]:
    """Logits of five positions over 7 tokens padded to 10, and the wanted tokens."""
    logits = 3 * torch.randn(5, 10, generator=torch.Generator().manual_seed(1))
    logits[:, 7:] = -INF
    return logits, torch.tensor([0, 6, 4, 5, 2])


def _losses() -> tuple[Tensor, Tensor]:
    place = topology.initialize(ParallelConfig(tensor_model_parallel_size=2))
    logits, labels = make_logits()
    mine = logits.chunk(2, dim=1)[place.tp_rank].unsqueeze(1).contiguous().requires_grad_()
    losses = cross_entropies(mine.clone(), labels)
    (losses * torch.arange(1.0, 6.0)).sum().backward()
    return losses.detach(), mine.grad[:, 0]


@pytest.mark.distributed
def test_cross_entropy_and_gradient_are_the_plain_ones() -> None:
    logits, labels = make_logits()
    true = logits[:, :7]
    probabilities = true.exp() / true.exp().sum(dim=1, keepdim=True)
    expected = -probabilities[torch.arange(5), labels].log()
    gradient = probabilities.clone()
    gradient[torch.arange(5), labels] -= 1
    gradient *= torch.arange(1.0, 6.0).unsqueeze(1)
    found = run_ranks(2, _losses)
    for losses, _ in found:
        torch.testing.assert_close(losses, expected, rtol=0, atol=5e-6)  # measured 5e-7
    whole = torch.cat([grad for _, grad in found], dim=1)
    torch.testing.assert_close(whole[:, :7], gradient, rtol=0, atol=5e-6)  # measured 5e-7
    assert not whole[:, 7:].any()


ROWS = {
    # 8 tokens, four on each rank
    "on the first rank": ([0, 5, 1, 0, 4, 0, 0, 0], 1),
    "on the second rank": ([0, 5, 1, 0, 4, 0, 6, 0], 6),
    "tie inside a rank": ([0, 0, 1, 0, 0, 7, 7, 7], 5),
    "tie between the ranks": ([0, 0, 3, 0, 3, 0, 0, 0], 2),
    "nothing but padding on the second": ([-2, -3, -1, -9, -INF, -INF, -INF, -INF], 2),
}


def _argmax() -> list[int]:
    place = topology.initialize(ParallelConfig(tensor_model_parallel_size=2))
    logits = torch.tensor([row for row, _ in ROWS.values()]).unsqueeze(1)
    mine = logits.chunk(2, dim=2)[place.tp_rank]
    return vocab_parallel_argmax(mine, place.groups.tp).tolist()


@pytest.mark.distributed
def test_most_likely_token_over_both_ranks() -> None:
    expected = [winner for _, winner in ROWS.values()]
    assert run_ranks(2, _argmax) == [expected, expected]


@pytest.mark.parametrize(
    ("supervised", "lengths", "spans"),
    [
        ("0110", (4,), [[(1, 3)]]),
        ("011011", (6,), [[(1, 3), (4, 6)]]),
        # an answer at the end of a sample and one at the start of the next are two
        ("0111", (3, 1), [[(1, 3)], [(3, 4)]]),
        ("01000010", (3, 2, 3), [[(1, 2)], [], [(6, 7)]]),
        ("", (), []),
    ],
)
def test_answers(
    supervised: str, lengths: tuple[int, ...], spans: list[list[tuple[int, int]]]
) -> None:
    found = answer_spans([flag == "1" for flag in supervised], lengths)
    assert [[(span.start, span.stop) for span in answers] for answers in found] == spans
