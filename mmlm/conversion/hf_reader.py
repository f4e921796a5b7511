"""Reads the tensors of a HuggingFace folder or file, one at a time.

Accepted: a folder with ``*.safetensors`` or ``pytorch_model*.bin`` (one file, or shards with an
index json), or one such file, or a ``.pth``. Where a folder has both formats, safetensors is read.
Pickled files are read with ``weights_only``: no code in them is ever run. Only what is asked for is
in memory, except of files of torch before 1.6, which are read whole.
"""

import os
import pickle
import re
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor

from mmlm.checkpoint.places import Place, announce_reading, read_rows, read_whole
from mmlm.checkpoint.torch_files import is_zip, named_places, refuse_other_content
from mmlm.conversion.rules import Shape
from mmlm.conversion.safetensors_file import loads_unique, safetensors_places
from mmlm.errors import CheckpointError

_INDEX = {
    "safetensors": "model.safetensors.index.json",
    "bin": "pytorch_model.bin.index.json",
}
_PATTERN = {"safetensors": "*.safetensors", "bin": "pytorch_model*.bin"}
_WHOLE_FILES = 2
"""Old files kept in memory: tensors of one rule may lie on both sides of a shard's end."""


class HFReader:
    """Names, shapes and tensors of one HuggingFace part; the tensors are read when asked for."""

    def __init__(self, path: Path, *, once: bool = False) -> None:
        """Open every file of the part and read its names.

        Args:
            path: folder or file.
            once: rows are read once; see `places.read_rows`.

        Raises:
            CheckpointError: naming the file, when one is missing, damaged or not of tensors.
        """
        self.path, self._once = Path(path), once
        self.shapes: dict[str, Shape] = {}
        """Name -> shape."""
        self.files: dict[str, Path] = {}
        """Name -> file that holds it."""
        self._open: dict[Path, _File] = {}
        files, index = _find_files(self.path)
        twice = []
        for file in files:
            for name, shape in self._file(file).shapes.items():
                if name in self.files:
                    twice.append(f"'{name}' in {self.files[name].name} and {file.name}")
                self.shapes[name] = shape
                self.files[name] = file
        if twice:
            raise CheckpointError(f"{self.path}: tensors are there twice: {', '.join(twice)}")
        lost = {
            name: file for name, file in index.items() if self.files.get(name, Path()).name != file
        }
        if lost:
            raise CheckpointError(
                f"{self.path}: the index promises tensors that are not where it says: "
                + ", ".join(f"'{name}' in {file}" for name, file in sorted(lost.items()))
            )

    def dtype(self, name: str) -> torch.dtype:
        """Element type of a tensor."""
        return self._file(self.files[name]).dtype(name)

    def read(self, name: str) -> Tensor:
        """Read one tensor, in its own dtype, on the CPU.

        Raises:
            CheckpointError: naming file and tensor.
        """
        if name not in self.files:
            raise CheckpointError(f"{self.path}: there is no tensor '{name}'")
        file = self.files[name]
        with _readable_errors(file, f"tensor '{name}'"):
            return self._file(file).read(name)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows ``start:stop`` (of the first dimension) of one tensor; errors as in `read`."""
        file = self.files[name]
        with _readable_errors(file, f"tensor '{name}'"):
            return self._file(file).read_rows(name, start, stop)

    def read_block(self, name: str, place: tuple[slice, ...]) -> Tensor:
        """A block of one tensor as a view of the mapped file, of which no more is read.

        Args:
            name: of the tensor.
            place: rows, columns, ...; one slice with a start and a stop a dimension.

        Returns:
            It need not be contiguous.
        """
        file = self.files[name]
        with _readable_errors(file, f"tensor '{name}'"):
            return self._file(file).read_block(name, place)

    def _file(self, file: Path) -> "_File":
        if file not in self._open:
            whole = [each for each in self._open if isinstance(self._open[each], _OldPickle)]
            for each in whole[: 1 - _WHOLE_FILES]:
                del self._open[each]
            with _readable_errors(file, "the file"):
                self._open[file] = _open_file(file, self._once)
        return self._open[file]


class _PlacedFile:
    """One file whose tensors are read from where they lie."""

    def __init__(self, file: Path, places: Mapping[str, Place], once: bool) -> None:
        self._file, self._places, self._once = file, places, once
        self.shapes: dict[str, Shape] = {name: place.shape for name, place in places.items()}
        self._descriptor = os.open(file, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        self._scattered: tuple[str, Tensor] | None = None

    @cached_property
    def _mapped(self) -> torch.UntypedStorage:
        size = self._file.stat().st_size
        storage = torch.UntypedStorage.from_file(str(self._file), shared=False, nbytes=size)
        return cast(torch.UntypedStorage, storage)

    def dtype(self, name: str) -> torch.dtype:
        return self._places[name].dtype

    def read(self, name: str) -> Tensor:
        return read_whole(self._descriptor, self._places[name])

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        place = self._places[name]
        if start == 0:
            announce_reading(self._descriptor, place)
        if place.is_contiguous:
            return read_rows(self._descriptor, place, start, stop, once=self._once)
        if self._scattered is None or self._scattered[0] != name:
            self._scattered = None  # never two of them
            self._scattered = name, self.read(name)
        return self._scattered[1][start:stop]

    def read_block(self, name: str, block: tuple[slice, ...]) -> Tensor:
        place = self._places[name]
        start, rest = divmod(place.offset, place.dtype.itemsize)
        if rest:  # a view must begin at a multiple of the element's size
            return self.read(name)[block]
        whole = torch.empty(0, dtype=place.dtype)
        return whole.set_(self._mapped, start, place.shape, place.stride)[block]


class _OldPickle:
    """One file of the format before torch 1.6, whose tensors cannot be read one by one."""

    def __init__(self, file: Path) -> None:
        content: Any = torch.load(file, map_location="cpu", weights_only=True)
        refuse_other_content(content)
        self._content: dict[str, Tensor] = content
        self.shapes: dict[str, Shape] = {
            name: tuple(tensor.shape) for name, tensor in content.items()
        }

    def dtype(self, name: str) -> torch.dtype:
        return self._content[name].dtype

    def read(self, name: str) -> Tensor:
        return self._content[name].contiguous()

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._content[name][start:stop].contiguous()

    def read_block(self, name: str, block: tuple[slice, ...]) -> Tensor:
        return self._content[name][block]


_File = _PlacedFile | _OldPickle


def _open_file(file: Path, once: bool) -> _File:
    if file.suffix == ".safetensors":
        return _PlacedFile(file, safetensors_places(file), once)
    return _PlacedFile(file, named_places(file), once) if is_zip(file) else _OldPickle(file)


def _find_files(path: Path) -> tuple[list[Path], dict[str, str]]:
    """Files to open, and name -> file name as the index promises (empty without an index)."""
    if path.is_file():
        return [path], {}
    if not path.is_dir():
        raise CheckpointError(f"{path}: there is no such file or folder")
    for kind, index_name in _INDEX.items():
        index_file = path / index_name
        if index_file.is_file():
            index = _read_index(index_file)
            files = [path / name for name in sorted(set(index.values()))]
            missing = [file.name for file in files if not file.is_file()]
            if missing:
                raise CheckpointError(
                    f"{index_file}: names {', '.join(missing)}, which "
                    f"{'is' if len(missing) == 1 else 'are'} missing from {path}"
                )
            return files, index
        files = sorted(path.glob(_PATTERN[kind]))
        if files:
            return files, {}
    raise CheckpointError(
        f"{path}: no weights: neither {_PATTERN['safetensors']} nor {_PATTERN['bin']}"
    )


def _read_index(file: Path) -> dict[str, str]:
    twice: list[str] = []
    try:
        index: Any = loads_unique(file.read_text(encoding="utf-8"), twice)["weight_map"]
        names = set(index.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: not an index with a weight_map: {error!r}") from error
    if twice:
        raise CheckpointError(f"{file}: names tensors twice: {', '.join(map(repr, twice))}")
    outside = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if outside:
        raise CheckpointError(f"{file}: {outside[0]!r} is not the name of a file beside the index")
    return dict(index)


@contextmanager
def _readable_errors(file: Path, what: str) -> Iterator[None]:
    try:
        yield
    except pickle.UnpicklingError as error:
        called = re.search(r"GLOBAL (\S+)", str(error))  # torch's message names it so
        why = (
            f"it holds code, which is never run ({called.group(1)})"
            if called
            else f"damaged, or no file of torch.save ({_first_line(error)})"
        )
        raise CheckpointError(f"{file}: {what} cannot be read: {why}") from error
    except (OSError, EOFError, RuntimeError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"{file}: {what} cannot be read, is the file complete? ({_first_line(error)})"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
