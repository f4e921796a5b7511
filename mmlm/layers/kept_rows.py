"""Which rows of a stream of images a residual branch is computed for when drop path drops images.

A branch of a dropped image is multiplied by 0, so it need not be computed: the rows of the other
images are taken out of the stream, go through the branch, and are added back. With sequence
parallelism each TP rank holds an equal share of the stream but not of the kept rows, so the rows
are shared out anew, which moves only those that change their rank.

Legend: t rows of the whole stream, k kept rows, T tokens of one image, h hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import all_to_all
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class KeptRows:
    """The kept rows of one TP rank; made by `kept_rows`, a pure function of numbers."""

    runs: tuple[tuple[bool, int], ...]
    """This rank's rows as runs of (kept, length), in order."""
    send: tuple[int, ...]
    """Kept rows that this rank gives to each TP rank; without sequence parallelism one number."""
    receive: tuple[int, ...]
    """Kept rows that it gets from each."""
    padding: int
    """Rows of zeros behind what it gets, so that every rank holds as many."""
    segment_lengths: tuple[int, ...]
    """Segments of the kept stream on all ranks together, padding included."""
    inert: bool
    """Every image was dropped: the rows only keep the graph in one piece and are worth nothing."""


def kept_rows(
    kept: Sequence[bool], tokens_per_image: int, num_rows: int, num_ranks: int, rank: int
) -> KeptRows:
    """Work out the kept rows of a rank.

    Where every image is dropped, the first row of each rank stands in: skipping the branch would
    leave its parameters without a gradient on this data-parallel rank only, and the overlapped
    gradient reduction would wait for it forever.

    Args:
        kept: for each image of the stream.
        tokens_per_image: T.
        num_rows: t, a multiple of ``num_ranks``; rows behind the last image are never kept.
        num_ranks: TP ranks that share the stream: 1 without sequence parallelism.
        rank: which of them.
    """
    share = num_rows // num_ranks
    spans = _spans(kept, tokens_per_image) or [(r * share, r * share + 1) for r in range(num_ranks)]
    lengths = [tokens_per_image] * sum(kept) or [num_ranks]
    parts = [_within(spans, r * share, (r + 1) * share) for r in range(num_ranks)]
    begins = [0, *accumulate(sum(end - begin for begin, end in part) for part in parts)]
    even = -(-begins[-1] // num_ranks)
    goals = [min(r * even, begins[-1]) for r in range(num_ranks + 1)]

    def moved(source: int, goal: int) -> int:
        return max(0, min(begins[source + 1], goals[goal + 1]) - max(begins[source], goals[goal]))

    padding = even * num_ranks - begins[-1]
    return KeptRows(
        runs=_runs(parts[rank], rank * share, (rank + 1) * share),
        send=tuple(moved(rank, other) for other in range(num_ranks)),
        receive=tuple(moved(other, rank) for other in range(num_ranks)),
        padding=even - (goals[rank + 1] - goals[rank]),
        segment_lengths=(*lengths, padding) if padding else tuple(lengths),
        inert=not any(kept),
    )


Span = tuple[int, int]


def _spans(kept: Sequence[bool], tokens_per_image: int) -> list[Span]:
    """Where the kept images lie; neighbours joined."""
    spans, image = [], 0
    for flag, run in groupby(kept):
        count = len(list(run))
        if flag:
            spans.append((image * tokens_per_image, (image + count) * tokens_per_image))
        image += count
    return spans


def _within(spans: Sequence[Span], begin: int, end: int) -> list[Span]:
    """The parts of the spans from ``begin`` to ``end``."""
    cut = [(max(first, begin), min(last, end)) for first, last in spans]
    return [(first, last) for first, last in cut if first < last]


def _runs(spans: Sequence[Span], begin: int, end: int) -> tuple[tuple[bool, int], ...]:
    """The rows from ``begin`` to ``end`` as runs of (inside a span, length)."""
    runs = []
    for first, last in spans:
        runs += [(False, first - begin), (True, last - first)]
        begin = last
    runs.append((False, end - begin))
    return tuple((flag, length) for flag, length in runs if length)


def take_rows(x: Tensor, rows: KeptRows, group: torch.distributed.ProcessGroup) -> Tensor:
    """The kept rows of a stream.

    Args:
        x: this rank's rows [t / ranks, 1, h].
        rows: for this rank.
        group: the ranks that share the stream; unused where it is not shared.

    Returns:
        This rank's equal share of the kept rows, [ceil(k / ranks), 1, h].
    """
    pieces = x.split([length for _, length in rows.runs])
    found = [piece for piece, (kept, _) in zip(pieces, rows.runs, strict=True) if kept]
    chosen = torch.cat(found) if found else x[:0]
    if len(rows.send) > 1:
        chosen = all_to_all(group, chosen, list(rows.receive), list(rows.send))
    return F.pad(chosen, (0, 0, 0, 0, 0, rows.padding)) if rows.padding else chosen


def add_rows(
    x: Tensor, branch: Tensor, scale: float, rows: KeptRows, group: torch.distributed.ProcessGroup
) -> Tensor:
    """Add ``scale * branch`` to the kept rows of a stream; the reverse of `take_rows`.

    Args:
        x: this rank's rows [t / ranks, 1, h].
        branch: what was computed from the taken rows, same shape as they.
        scale: of the kept images; 0 is used where no image is kept.
        rows: for this rank.
        group: as in `take_rows`.

    Returns:
        [t / ranks, 1, h].
    """
    branch = branch[: branch.shape[0] - rows.padding]
    if len(rows.send) > 1:
        branch = all_to_all(group, branch, list(rows.send), list(rows.receive))
    branch = branch * (0.0 if rows.inert else scale)
    parts = iter(branch.split([length for kept, length in rows.runs if kept]))
    pieces = x.split([length for _, length in rows.runs])
    rows_out = [
        piece + next(parts) if kept else piece
        for piece, (kept, _) in zip(pieces, rows.runs, strict=True)
    ]
    # a rank without kept rows must still take part in the backward exchange of the others
    return torch.cat([*rows_out, branch[:0]])
