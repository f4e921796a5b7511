"""Weights from anywhere as named tensors that can be compared: under names of the combined folder.

Nothing of how they were converted is used but the rules between the names: not their configs, not
the plan of the vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from mmlm.checkpoint.manifest import resolve
from mmlm.checkpoint.part_manifest import read_any_manifest
from mmlm.checkpoint.tensor_reader import TensorReader
from mmlm.conversion.hf_reader import HFReader
from mmlm.conversion.hf_source import PROJECTOR_FILE
from mmlm.conversion.name_map import (
    DERIVED_HF_SUFFIXES,
    HF_PREFIXES,
    MODEL_PREFIX,
    TABLE,
    Entry,
    expand,
)
from mmlm.conversion.rules import Copy, Shape


@dataclass(frozen=True, kw_only=True)
class Weights:
    """One side of a comparison."""

    where: str
    """What was opened, for messages."""
    shapes: Mapping[str, Shape]
    """Name -> shape."""
    dtypes: Mapping[str, torch.dtype]
    """Name -> element type."""
    read_rows: Callable[[str, int, int], Tensor]
    """Rows (of the first dimension) of a tensor."""

    @property
    def num_bytes(self) -> int:
        """Size of all tensors."""
        return sum(prod(shape) * self.dtypes[name].itemsize for name, shape in self.shapes.items())


def open_hf(path: Path) -> Weights:
    """Open a combined folder, a folder with ``vision/`` and ``llm/``, or one part or file alone.

    Raises:
        CheckpointError: for a file that is missing or damaged.
    """
    vision, llm = path / "vision", path / "llm"
    readers: dict[str, tuple[HFReader, str]] = {}
    places = [path]
    if vision.is_dir() and llm.is_dir() and not (path / "config.json").is_file():
        places = [vision, vision / PROJECTOR_FILE, llm]
    for place in places:
        reader = HFReader(place)
        names = [name for name in reader.shapes if not name.endswith(DERIVED_HF_SUFFIXES)]
        prefix = _prefix(names)
        readers |= {prefix + name: (reader, name) for name in names}

    def read_rows(name: str, start: int, stop: int) -> Tensor:
        reader, inner = readers[name]
        if not reader.shapes[inner]:
            return reader.read(inner).view(1)
        return reader.read_rows(inner, start, stop)

    return Weights(
        where=str(path),
        # a number without dimensions counts as one row
        shapes={name: reader.shapes[inner] or (1,) for name, (reader, inner) in readers.items()},
        dtypes={name: reader.dtype(inner) for name, (reader, inner) in readers.items()},
        read_rows=read_rows,
    )


def _prefix(names: list[str]) -> str:
    """What the combined folder puts before the names of a part; nothing for names of its own."""
    for part, prefix in HF_PREFIXES.items():
        starts = {hf.split(".")[0] for row in TABLE if row.part == part for hf, _ in row.hf}
        if any(name.split(".")[0] in starts for name in names):
            return prefix
    return ""


def open_megatron(path: Path) -> Weights:
    """Open a checkpoint, saved at any layout, of a whole model or of one part.

    Of the optimizer nothing is looked at.

    Args:
        path: ROOT (its ``latest``) or an iteration's directory.

    Raises:
        CheckpointError: for a checkpoint that is missing or damaged.
    """
    directory = resolve(path)
    reader = TensorReader(directory)
    stored = {key for key in reader.infos if key.startswith(MODEL_PREFIX)}
    entries = [
        entry
        for entry in expand(read_any_manifest(directory).model)
        if MODEL_PREFIX + entry.megatron_name in stored
    ]
    known = {name: entry for entry in entries for name in entry.hf_names}
    stray = stored - {MODEL_PREFIX + entry.megatron_name for entry in entries}
    tensors = _EntryTensors(reader)
    return Weights(
        where=str(directory),
        shapes={
            name: shape
            for entry in entries
            for name, shape in zip(entry.hf_names, tensors.hf_shapes(entry), strict=True)
        }
        | {key: reader.infos[key].shape for key in sorted(stray)},
        dtypes={name: reader.infos[tensors.key(entry)].dtype for name, entry in known.items()}
        | {key: reader.infos[key].dtype for key in stray},
        read_rows=lambda name, start, stop: (
            tensors.read_rows(known[name], name, start, stop)
            if name in known
            else reader.read_rows(name, start, stop)
        ),
    )


class _EntryTensors:
    """HuggingFace tensors out of a checkpoint; those of one Megatron tensor are kept."""

    def __init__(self, reader: TensorReader) -> None:
        self._reader = reader
        self._kept: tuple[str, dict[str, Tensor]] = ("", {})

    @staticmethod
    def key(entry: Entry) -> str:
        return MODEL_PREFIX + entry.megatron_name

    def hf_shapes(self, entry: Entry) -> tuple[Shape, ...]:
        """As the manifest says, or as it is stored where that cannot be the same tensor."""
        stored = self._reader.infos[self.key(entry)].shape
        if prod(stored) != prod(entry.megatron_shape):
            return tuple(stored for _ in entry.hf_names)
        return entry.hf_shapes

    def read_rows(self, entry: Entry, name: str, start: int, stop: int) -> Tensor:
        key = self.key(entry)
        if isinstance(entry.rule, Copy):
            return self._reader.read_rows(key, start, stop)
        if self._kept[0] != key:
            self._kept = ("", {})  # never two of them
            tensors = entry.rule.to_hf(self._reader.read(key))
            self._kept = (key, dict(zip(entry.hf_names, tensors, strict=True)))
        return self._kept[1][name][start:stop]
