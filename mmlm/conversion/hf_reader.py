"""Reads the tensors of a HuggingFace folder or file, one at a time.

Accepted: a folder with ``*.safetensors`` or ``pytorch_model*.bin`` (one file, or shards with an
index json), or one such file, or a ``.pth``. Where a folder has both formats, safetensors is read.
Pickled files are memory-mapped and read with ``weights_only``: no code in them is ever run.
"""

import json
import pickle
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmlm.conversion.rules import Shape
from mmlm.errors import CheckpointError

_INDEX = {
    "safetensors": "model.safetensors.index.json",
    "bin": "pytorch_model.bin.index.json",
}
_PATTERN = {"safetensors": "*.safetensors", "bin": "pytorch_model*.bin"}
_OPEN_FILES = 2
"""Files kept open: tensors of one rule may lie on both sides of a shard's end."""


class HFReader:
    """Names, shapes and tensors of one HuggingFace part; the tensors are read when asked for."""

    def __init__(self, path: Path) -> None:
        """Open every file of the part and read its names.

        Args:
            path: folder or file.

        Raises:
            CheckpointError: naming the file, when one is missing, damaged or not of tensors.
        """
        self.path = Path(path)
        self.shapes: dict[str, Shape] = {}
        """Name -> shape."""
        self.files: dict[str, Path] = {}
        """Name -> file that holds it."""
        self._open: OrderedDict[Path, _File] = OrderedDict()
        files, index = _find_files(self.path)
        for file in files:
            for name, shape in self._file(file).shapes.items():
                if name in self.files:
                    raise CheckpointError(
                        f"{file}: tensor '{name}' is also in {self.files[name].name}"
                    )
                self.shapes[name] = shape
                self.files[name] = file
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
            while len(self._open) >= _OPEN_FILES:
                self._open.popitem(last=False)
            with _readable_errors(file, "the file"):
                is_safe = file.suffix == ".safetensors"
                self._open[file] = _SafeFile(file) if is_safe else _PickledFile(file)
        self._open.move_to_end(file)
        return self._open[file]


class _SafeFile:
    """One ``.safetensors`` file; memory-mapped."""

    def __init__(self, file: Path) -> None:
        self._handle = safe_open(file, framework="pt", device="cpu")
        names: list[str] = self._handle.keys()
        self.shapes: dict[str, Shape] = {
            name: tuple(self._handle.get_slice(name).get_shape()) for name in names
        }

    def dtype(self, name: str) -> torch.dtype:
        """Element type, found by reading no element."""
        piece = self._handle.get_slice(name)
        dtype: torch.dtype = piece[:0].dtype if piece.get_shape() else self.read(name).dtype
        return dtype

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self._handle.get_tensor(name)
        return tensor

    def read_block(self, name: str, place: tuple[slice, ...]) -> Tensor:
        block: Tensor = self._handle.get_slice(name)[place]
        return block


class _PickledFile:
    """One file of torch.save; memory-mapped unless it is of the format before torch 1.6."""

    def __init__(self, file: Path) -> None:
        content: Any = torch.load(file, map_location="cpu", mmap=_is_zip(file), weights_only=True)
        if not isinstance(content, dict) or not all(
            isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items()
        ):
            raise CheckpointError(f"{file}: holds something else than a dict of named tensors")
        self._content: dict[str, Tensor] = content
        self.shapes: dict[str, Shape] = {
            name: tuple(tensor.shape) for name, tensor in content.items()
        }

    def dtype(self, name: str) -> torch.dtype:
        return self._content[name].dtype

    def read(self, name: str) -> Tensor:
        return self._content[name].contiguous()

    def read_block(self, name: str, place: tuple[slice, ...]) -> Tensor:
        return self._content[name][place]


_File = _SafeFile | _PickledFile


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
    try:
        index: Any = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        names = set(index.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: not an index with a weight_map: {error!r}") from error
    outside = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if outside:
        raise CheckpointError(f"{file}: {outside[0]!r} is not the name of a file beside the index")
    return dict(index)


@contextmanager
def _readable_errors(file: Path, what: str) -> Iterator[None]:
    try:
        yield
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file}: {what} cannot be read: damaged, or it holds code, which is never run "
            f"({_first_line(error)})"
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"{file}: {what} cannot be read, is the file complete? ({_first_line(error)})"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _is_zip(file: Path) -> bool:
    with open(file, "rb") as stream:
        return stream.read(4) == b"PK\x03\x04"
