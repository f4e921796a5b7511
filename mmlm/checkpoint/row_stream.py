"""Tensors written to a file block by block, so that none need be in memory.

A second thread reads one block ahead. A file that an interrupted run left is gone through as well:
what equals the source is kept, anything else is written.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from mmlm.checkpoint.places import CALL_BYTES

BLOCK_BYTES = 4 * 2**20
"""Of tensors at a time; three or four blocks exist at once. Blocks of 16 MiB, which malloc maps and
unmaps each time, cost three times as much system time."""

_FLUSH_BYTES = 32 * 2**20
"""Written between two requests to the disk."""

RowSource = Callable[[str, int, int], Tensor]
"""Gives rows ``start:stop`` of a tensor, contiguous, in the shape and dtype that were announced."""


@dataclass(frozen=True, kw_only=True)
class Slot:
    """Room for a tensor in a file."""

    key: str
    """What the source is asked for."""
    shape: tuple[int, ...]
    """Its shape; at least one dimension."""
    dtype: torch.dtype
    """Its element type."""
    offset: int
    """Of its first element, bytes from the start of the file."""

    @property
    def row_bytes(self) -> int:
        """Size of one row."""
        return prod(self.shape[1:]) * self.dtype.itemsize


def fill(descriptor: int, slots: Iterable[Slot], source: RowSource, kept_bytes: int = 0) -> None:
    """Write tensors into their slots.

    Args:
        descriptor: file, open for reading and writing.
        slots: in the order in which the source is asked.
        source: is called in another thread, one call at a time, rows of a tensor in order.
        kept_bytes: how much of the file an interrupted run has left; such blocks are compared
            first, and not written if they are right.
    """

    def read(slot: Slot, start: int, stop: int) -> tuple[Slot, int, Tensor]:
        block = source(slot.key, start, stop)
        found = (tuple(block.shape), block.dtype)
        assert found == ((stop - start, *slot.shape[1:]), slot.dtype), (slot, found)
        return slot, start, block

    jobs = ((slot, start, stop) for slot in slots for start, stop in _blocks(slot))
    flusher = _Flusher(descriptor)
    for slot, start, block in _one_ahead(read, jobs):
        raw = block.view(-1).view(torch.uint8).numpy().data
        at = slot.offset + start * slot.row_bytes
        if at + len(raw) <= kept_bytes and _equals(descriptor, at, block):
            continue
        write_at(descriptor, raw, at)
        flusher.wrote(at, len(raw))


class _Flusher:
    """Has the disk write while the rest is made, so that there is little to wait for at the end."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._start, self._end = descriptor, 0, 0

    def wrote(self, offset: int, num_bytes: int) -> None:
        """Remember what was written; from time to time, ask for it to be put on the disk."""
        if offset != self._end:
            self._start = offset
        self._end = offset + num_bytes
        if self._end - self._start >= _FLUSH_BYTES:
            # of pages that are not on the disk yet, this starts the writing and forgets nothing
            size = self._end - self._start
            os.posix_fadvise(self._descriptor, self._start, size, os.POSIX_FADV_DONTNEED)
            self._start = self._end


def write_at(descriptor: int, raw: memoryview | bytes, offset: int) -> None:
    """Write all of some bytes at a place of a file."""
    view, done = memoryview(raw), 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done : done + CALL_BYTES], offset + done)


def open_kept(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Open a file for `fill`, making it if it is not there.

    Returns:
        Descriptor, and how many bytes are in it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    return descriptor, os.fstat(descriptor).st_size


def _blocks(slot: Slot) -> Iterator[tuple[int, int]]:
    num_rows = max(1, BLOCK_BYTES // max(1, slot.row_bytes))
    for start in range(0, slot.shape[0], num_rows):
        yield start, min(start + num_rows, slot.shape[0])


def _equals(descriptor: int, offset: int, block: Tensor) -> bool:
    wanted = block.view(-1).view(torch.uint8)
    found = torch.empty_like(wanted)
    count = os.preadv(descriptor, [found.numpy().data], offset)
    return count == len(wanted) and torch.equal(found, wanted)


def _one_ahead(
    read: Callable[[Slot, int, int], tuple[Slot, int, Tensor]],
    jobs: Iterable[tuple[Slot, int, int]],
) -> Iterator[tuple[Slot, int, Tensor]]:
    waiting: deque[Future[tuple[Slot, int, Tensor]]] = deque()
    with ThreadPoolExecutor(1, "read-ahead") as pool:
        for job in jobs:
            waiting.append(pool.submit(read, *job))
            if len(waiting) == 2:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
