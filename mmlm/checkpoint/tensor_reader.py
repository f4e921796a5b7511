"""Reads single tensors of a checkpoint, or some rows of one, whatever layout wrote it."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from mmlm.checkpoint.metadata import TensorInfo, read_metadata
from mmlm.checkpoint.places import Place, announce_reading, read_rows, read_whole
from mmlm.checkpoint.torch_files import PlaceFinder
from mmlm.errors import CheckpointError

_OPEN_FILES = 16
"""Pieces of one tensor lie in as many files as there are TP ranks."""


def _close(streams: dict[str, BinaryIO]) -> None:
    for stream in streams.values():
        stream.close()


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """A block of a tensor that one rank has written."""

    offsets: tuple[int, ...]
    """Where it begins in the tensor."""
    sizes: tuple[int, ...]
    """Its shape."""
    file: str
    """Name of the file."""
    start: int
    """Of its archive in the file, bytes."""
    length: int
    """Of its archive, bytes."""


class TensorReader:
    """Reads single tensors of a checkpoint, whatever layout wrote it; not collective.

    Only what is asked for is in memory, beside a piece of it that one rank has written.

    Args:
        directory: of an iteration.
        once: rows are read once; see `places.read_rows`.
    """

    def __init__(self, directory: Path, *, once: bool = False) -> None:
        self.directory, self._once = directory, once
        metadata = read_metadata(directory)
        self._pieces: dict[str, list[_Piece]] = {}
        self.infos: dict[str, TensorInfo] = {}
        """Key -> shape and dtype."""
        for key, entry in metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                continue
            self.infos[key] = TensorInfo(shape=tuple(entry.size), dtype=entry.properties.dtype)
            self._pieces[key] = [
                _Piece(
                    offsets=tuple(chunk.offsets),
                    sizes=tuple(chunk.sizes),
                    file=info.relative_path,
                    start=info.offset,
                    length=info.length,
                )
                for chunk in entry.chunks
                for info in [metadata.storage_data[MetadataIndex(key, chunk.offsets)]]
            ]
        self._finder = PlaceFinder()
        self._places: dict[tuple[str, int], Place] = {}
        self._streams: dict[str, BinaryIO] = {}
        weakref.finalize(self, _close, self._streams)

    def read(self, key: str) -> Tensor:
        """Return the whole tensor of a key, in its stored dtype, on the CPU.

        Raises:
            CheckpointError: when the key is missing or its file is damaged.
        """
        self._refuse_unknown(key)
        if self.infos[key].shape:
            return self.read_rows(key, 0, self.infos[key].shape[0])
        with self._readable(key):
            (piece,) = self._pieces[key]
            return read_whole(self._stream(piece.file).fileno(), self._place(key, piece))

    def read_rows(self, key: str, start: int, stop: int) -> Tensor:
        """Return rows ``start:stop`` (of the first dimension) of a tensor; errors as in `read`."""
        self._refuse_unknown(key)
        shape = (stop - start, *self.infos[key].shape[1:])
        with self._readable(key):
            parts = list(self._parts(key, start, stop))
            if len(parts) == 1 and parts[0][1].shape == shape:
                return parts[0][1]
            block = torch.empty(shape, dtype=self.infos[key].dtype)
            for place, part in parts:
                block[place] = part
            found = sum(part.numel() for _, part in parts)
            if found != block.numel():
                raise ValueError(f"{block.numel() - found} elements are nowhere")
            return block

    def _parts(self, key: str, start: int, stop: int) -> Iterator[tuple[tuple[slice, ...], Tensor]]:
        """What each piece has of some rows, with its place among them."""
        for piece in self._pieces[key]:
            first = max(start, piece.offsets[0])
            last = min(stop, piece.offsets[0] + piece.sizes[0])
            if first < last:
                place = self._place(key, piece)
                if first == piece.offsets[0]:
                    announce_reading(self._stream(piece.file).fileno(), place)
                by = piece.offsets[0]
                descriptor = self._stream(piece.file).fileno()
                columns = (
                    slice(offset, offset + size)
                    for offset, size in zip(piece.offsets[1:], piece.sizes[1:], strict=True)
                )
                yield (
                    (slice(first - start, last - start), *columns),
                    read_rows(descriptor, place, first - by, last - by, once=self._once),
                )

    def _place(self, key: str, piece: _Piece) -> Place:
        if (piece.file, piece.start) in self._places:
            return self._places[piece.file, piece.start]
        place = self._finder.find(self._stream(piece.file), piece.start, piece.length)
        found, wanted = (place.shape, place.dtype), (piece.sizes, self.infos[key].dtype)
        if found != wanted:
            raise ValueError(f"{piece.file} holds {found}, the metadata says {wanted}")
        self._places[piece.file, piece.start] = place
        return place

    def _stream(self, name: str) -> BinaryIO:
        if name not in self._streams:
            while len(self._streams) >= _OPEN_FILES:
                self._streams.pop(next(iter(self._streams))).close()
            self._streams[name] = open(self.directory / name, "rb")  # noqa: SIM115
        return self._streams[name]

    def _refuse_unknown(self, key: str) -> None:
        if key not in self.infos:
            raise CheckpointError(f"{self.directory}: there is no tensor '{key}'")

    @contextmanager
    def _readable(self, key: str) -> Iterator[None]:
        try:
            yield
        except (OSError, EOFError, ValueError) as error:
            raise CheckpointError(
                f"{self.directory}: tensor '{key}' could not be read: "
                f"{type(error).__name__}: {error}"
            ) from error
