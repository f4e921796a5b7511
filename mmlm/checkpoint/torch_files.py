"""Files of torch.save without their tensors in memory: where each lies, and room for one.

Such a file is a zip archive whose records are not compressed: ``data.pkl`` says what the tensors
are, ``data/0``, ``data/1``, ... are their elements. torch reads it without elements on the device
meta and writes it without them under `skip_data`; see the notes on serialization in torch's
documentation. No code in a file is ever run (``weights_only``).
"""

import io
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from mmlm.checkpoint.places import Place, contiguous_stride

_ZIP = b"PK\x03\x04"

_META_READS_NOTHING = hasattr(torch.serialization, "_is_meta_location")
"""Since torch 2.11 (pytorch/pytorch#170619); before, elements are read and thrown away."""


def is_zip(file: Path) -> bool:
    """Whether a file is of the format of torch 1.6 and later; elements of older ones lie mixed."""
    with open(file, "rb") as stream:
        return stream.read(len(_ZIP)) == _ZIP


def named_places(file: Path) -> dict[str, Place]:
    """Where the tensors of a file that holds a dict of them lie.

    Args:
        file: for which `is_zip` is true.

    Raises:
        ValueError: when it holds something else.
        pickle.UnpicklingError: when there is code in it.
        RuntimeError: when it is damaged.
    """
    content = _load_without_elements(file)
    refuse_other_content(content)
    return {name: _place(tensor, _offset(tensor)) for name, tensor in content.items()}


def refuse_other_content(content: object) -> None:
    """Raise ValueError for anything but a dict of named tensors."""
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items()
    ):
        raise ValueError("holds something else than a dict of named tensors")


class PlaceFinder:
    """Finds the one tensor of an archive that lies inside a larger file."""

    def __init__(self) -> None:
        self._known: dict[bytes, Place] = {}  # data.pkl of tensors alike is the same

    def find(self, stream: BinaryIO, start: int, length: int) -> Place:
        """Where the tensor lies in the larger file.

        Args:
            stream: the larger file.
            start: of the archive in it.
            length: of the archive.

        Raises:
            ValueError: when there is no archive with one tensor.
        """
        try:
            window = _Window(stream, start, length)
            archive = zipfile.ZipFile(window)
            # torch puts all records into one folder, whose name is free
            (name,) = [each for each in archive.namelist() if each.endswith("/data.pkl")]
            pickled = archive.read(name)
            record = archive.getinfo(name.removesuffix("data.pkl") + "data/0")
            if pickled not in self._known:
                window.seek(0)
                self._known[pickled] = _place(_load_without_elements(cast(BinaryIO, window)), 0)
            place = self._known[pickled]
            if place.extent_bytes > record.file_size:
                raise ValueError(f"{record.file_size} bytes for {place}")
            # local header: 30 bytes, of which the last 4 are the lengths of what follows
            window.seek(record.header_offset + 26)
            lengths = window.read(4)
        except (zipfile.BadZipFile, KeyError, RuntimeError, pickle.UnpicklingError) as error:
            raise ValueError(f"not a tensor of torch.save: {error}") from error
        data = record.header_offset + 30
        data += int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
        return Place(
            offset=start + data + place.offset,
            shape=place.shape,
            stride=place.stride,
            dtype=place.dtype,
        )


@dataclass(frozen=True, kw_only=True)
class Frame:
    """What torch.save writes of some tensors, but for their elements."""

    pieces: tuple[tuple[int, bytes], ...]
    """Where each stretch of bytes begins, and the bytes."""
    num_bytes: int
    """Size of the whole, elements included."""
    offsets: tuple[int, ...]
    """Where the elements of each tensor begin."""


def frame_of(content: Tensor | dict[str, Tensor]) -> Frame:
    """What torch.save writes of one tensor, or of a dict of tensors, but for the elements.

    Args:
        content: contiguous tensors without shared memory, whose elements are never looked at, so
            that ``torch.empty`` of any size costs nothing.
    """
    stream = _Recorder()
    with torch.serialization.skip_data():
        torch.save(content, cast(BinaryIO, stream))
    tensors = list(content.values()) if isinstance(content, dict) else [content]
    assert len(stream.holes) == sum(tensor.numel() > 0 for tensor in tensors), stream.holes
    holes = iter(stream.holes)
    return Frame(
        pieces=tuple(stream.pieces),
        num_bytes=stream.end,
        offsets=tuple(next(holes) if tensor.numel() else 0 for tensor in tensors),
    )


def _place(tensor: Tensor, storage_offset: int) -> Place:
    return Place(
        offset=storage_offset + int(tensor.storage_offset()) * tensor.itemsize,
        shape=tuple(tensor.shape),
        stride=contiguous_stride(tensor.shape) if tensor.is_contiguous() else tensor.stride(),
        dtype=tensor.dtype,
    )


def _load_without_elements(file: Path | BinaryIO) -> Any:
    if _META_READS_NOTHING:
        return torch.load(file, map_location="meta", weights_only=True)
    # late: entering this mode imports torch's compiler, more than a second
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.load(file, map_location="cpu", weights_only=True)


def _offset(tensor: Tensor) -> int:
    """Where the file has the elements, as both ways of loading without them say."""
    offset = tensor.untyped_storage()._checkpoint_offset
    assert offset is not None
    return offset


class _Window(io.RawIOBase):
    """Part of a file as a file."""

    def __init__(self, stream: BinaryIO, start: int, length: int) -> None:
        self._stream, self._start, self._length, self._at = stream, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = (
            offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        )
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(self._length - self._at, 0)
        self._stream.seek(self._start + self._at)
        found = self._stream.read(left if size < 0 else min(size, left))
        self._at += len(found)
        return found

    def readinto(self, buffer: Any) -> int:
        found = self.read(len(buffer))
        buffer[: len(found)] = found
        return len(found)


class _Recorder(io.RawIOBase):
    """Keeps what is written, and where something was left out."""

    def __init__(self) -> None:
        self.pieces: list[tuple[int, bytes]] = []
        self.holes: list[int] = []
        self.end = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.pieces.append((self.end, bytes(data)))
        self.end += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        # torch passes over a tensor's elements with one step forward each, also over headers
        assert whence == io.SEEK_CUR and offset >= 0, (offset, whence)
        self.holes.append(self.end)
        self.end += offset
        return self.end

    def tell(self) -> int:
        return self.end
