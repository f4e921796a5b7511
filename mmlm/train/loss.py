"""The loss of a microbatch and, for evaluation, how its answers were predicted.

Legend: k supervised positions, v vocabulary rows of this rank.
"""

from collections.abc import Sequence
from itertools import groupby

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from torch import Tensor


def cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of each supervised position over the vocabulary of all TP ranks.

    Args:
        logits: fp32 [k, 1, v], this rank's vocabulary rows; overwritten.
        labels: int64 [k].

    Returns:
        fp32 [k], the same on every TP rank.
    """
    return vocab_parallel_cross_entropy(logits, labels.unsqueeze(1)).squeeze(1)


@torch.no_grad()
def vocab_parallel_argmax(logits: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Most likely token of each position over the whole vocabulary; ties go to the lowest id.

    Args:
        logits: [k, 1, v], this rank's vocabulary rows.
        group: tensor-parallel group; all of its ranks must call.

    Returns:
        int64 [k].
    """
    best, index = logits.squeeze(1).max(dim=-1)
    index = index + group.rank() * logits.shape[-1]
    every_best = [torch.empty_like(best) for _ in range(group.size())]
    every_index = [torch.empty_like(index) for _ in range(group.size())]
    dist.all_gather(every_best, best.contiguous(), group=group)
    dist.all_gather(every_index, index.contiguous(), group=group)
    winner = torch.stack(every_best).argmax(dim=0, keepdim=True)
    return torch.stack(every_index).gather(0, winner).squeeze(0)


def answer_spans(supervised: Sequence[bool], segment_lengths: Sequence[int]) -> list[list[slice]]:
    """Find the answers: maximal runs of supervised positions inside one segment.

    Args:
        supervised: for each position of the stream.
        segment_lengths: lengths of the segments, in order.

    Returns:
        For each segment its answers, as slices of the stream; empty where nothing is supervised.
    """
    answers, start = [], 0
    for length in segment_lengths:
        position, spans = start, []
        for wanted, run in groupby(supervised[start : start + length]):
            end = position + len(list(run))
            if wanted:
                spans.append(slice(position, end))
            position = end
        answers.append(spans)
        start += length
    return answers
