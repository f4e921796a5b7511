"""Where the elements of a tensor lie in a file, and how some of its rows are read.

Bytes are read with ``pread``. A memory-mapped file would count as memory of this process, page by
page, until it has been read whole.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

CALL_BYTES = 256 * 2**10
"""Read or written by one system call. Calls of 4 MiB cost four times as much system time, measured
on ext4 and Linux 6."""

_ANNOUNCED_BYTES = 128 * 2**20


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where one tensor lies in a file."""

    offset: int
    """Of its first element, bytes from the start of the file."""
    shape: tuple[int, ...]
    """Its shape."""
    stride: tuple[int, ...]
    """Elements from one index of a dimension to the next."""
    dtype: torch.dtype
    """Its element type."""

    @property
    def is_contiguous(self) -> bool:
        """Whether its elements follow each other without gaps, rows first."""
        found = zip(self.shape, self.stride, contiguous_stride(self.shape), strict=True)
        return all(size == 1 or stride == wanted for size, stride, wanted in found)

    @property
    def extent_bytes(self) -> int:
        """From its first element to the end of its last."""
        if not all(self.shape):
            return 0
        last = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return (last + 1) * self.dtype.itemsize


def contiguous_stride(shape: Sequence[int]) -> tuple[int, ...]:
    """Stride of a tensor whose elements follow each other without gaps."""
    return tuple(prod(shape[dimension + 1 :]) for dimension in range(len(shape)))


def announce_reading(descriptor: int, place: Place) -> None:
    """Tell the system that a tensor will be read, so that the disk has it ready.

    Rows of q, k and v are read in leaps, which the system's own reading ahead does not follow.

    Args:
        descriptor: open file.
        place: of the tensor; of one that is larger than 128 MiB only the beginning is announced.
    """
    size = min(place.extent_bytes, _ANNOUNCED_BYTES)
    if size:
        os.posix_fadvise(descriptor, place.offset, size, os.POSIX_FADV_WILLNEED)


def read_rows(
    descriptor: int, place: Place, start: int, stop: int, *, once: bool = False
) -> Tensor:
    """Read rows ``start:stop`` (of the first dimension) of a tensor.

    Args:
        descriptor: open file.
        place: where the tensor is in it; if it is not contiguous, all of it is read.
        start: first row.
        stop: one past the last.
        once: nobody will read them again: the system need not keep them in its cache, which takes
            a third of the system time of reading gigabytes.

    Raises:
        EOFError: when the file ends before.
    """
    if not place.is_contiguous:
        flat = _read(descriptor, place.offset, place.extent_bytes, place.dtype)
        return flat.as_strided(place.shape, place.stride)[start:stop].contiguous()
    row_bytes = prod(place.shape[1:]) * place.dtype.itemsize
    at, num_bytes = place.offset + start * row_bytes, (stop - start) * row_bytes
    found = _read(descriptor, at, num_bytes, place.dtype).view(stop - start, *place.shape[1:])
    if once and num_bytes:
        os.posix_fadvise(descriptor, at, num_bytes, os.POSIX_FADV_DONTNEED)
    return found


def read_whole(descriptor: int, place: Place) -> Tensor:
    """Read a tensor of any number of dimensions; errors as in `read_rows`."""
    if not place.shape:
        return _read(descriptor, place.offset, place.dtype.itemsize, place.dtype)[0]
    return read_rows(descriptor, place, 0, place.shape[0])


def _read(descriptor: int, offset: int, num_bytes: int, dtype: torch.dtype) -> Tensor:
    raw = torch.empty(num_bytes, dtype=torch.uint8)
    view = raw.numpy().data
    done = 0
    while done < num_bytes:
        count = os.preadv(descriptor, [view[done : done + CALL_BYTES]], offset + done)
        if count == 0:
            raise EOFError(f"the file ends {num_bytes - done} bytes early")
        done += count
    return raw.view(dtype)
