"""Bring tensors of all ranks to rank 0, one at a time."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def bring_to_rank_zero(
    items: Sequence[tuple[Any, Tensor]], group: dist.ProcessGroup | None = None
) -> Iterator[tuple[Any, Tensor]]:
    """Send this rank's tensors, or receive everybody's; every rank must run it to its end.

    Only the notes are gathered as objects: gathered tensors would all be padded to the size of the
    largest, and rank 0 would hold as many of them as there are ranks.

    Args:
        items: (note, tensor) pairs of this rank; a note is something small that can be pickled.
        group: all ranks, over gloo; the default group when None.

    Yields:
        On rank 0 every pair of every rank, in the order of the ranks, the tensor on the CPU;
        nothing on the others.
    """
    mine = [(note, tuple(tensor.shape), tensor.dtype) for note, tensor in items]
    notes: list[list[tuple[Any, tuple[int, ...], torch.dtype]]] = [[]] * dist.get_world_size()
    dist.gather_object(mine, notes if dist.get_rank() == 0 else None, dst=0, group=group)
    if dist.get_rank():
        for _, tensor in items:
            if tensor.numel():
                dist.send(tensor.detach().cpu().contiguous(), dst=0, group=group)
        return
    for note, tensor in items:
        yield note, tensor.detach().cpu()
    for source, of_rank in enumerate(notes[1:], start=1):
        for note, shape, dtype in of_rank:
            received = torch.empty(shape, dtype=dtype)
            if received.numel():
                dist.recv(received, src=source, group=group)
            yield note, received
