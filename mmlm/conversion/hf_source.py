"""The tensors of a whole model under the names of the combined folder, from wherever they lie."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from mmlm.conversion.hf_config import HFConfig, read_combined, read_parts
from mmlm.conversion.hf_reader import HFReader
from mmlm.conversion.name_map import DERIVED_HF_SUFFIXES, HF_PREFIXES, Entry, Part, check_tensors
from mmlm.conversion.rules import Shape

PROJECTOR_FILE = "mlp_projector/hermes_2_yi_34b.pth"
"""Where the published ViT folder keeps the projector."""


@dataclass(frozen=True, kw_only=True)
class HFTensors:
    """Opened files; tensors are read when asked for."""

    readers: Mapping[str, tuple[HFReader, str]]
    """Combined name -> reader and the name that it knows."""
    where: str
    """What was opened, for messages."""

    @property
    def shapes(self) -> dict[str, Shape]:
        """Combined name -> shape in the files."""
        return {name: reader.shapes[inner] for name, (reader, inner) in self.readers.items()}

    def shapes_of(self, entry: Entry) -> tuple[Shape, ...]:
        """Shapes in the files of an entry's tensors."""
        found = (self.readers[name] for name in entry.hf_names)
        return tuple(reader.shapes[inner] for reader, inner in found)

    def read(self, name: str) -> Tensor:
        """One tensor, in its own dtype."""
        reader, inner = self.readers[name]
        return reader.read(inner)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of one tensor; see `HFReader.read_rows`."""
        reader, inner = self.readers[name]
        return reader.read_rows(inner, start, stop)

    def read_block(self, name: str, place: tuple[slice, ...]) -> Tensor:
        """A block of one tensor; see `HFReader.read_block`."""
        reader, inner = self.readers[name]
        return reader.read_block(inner, place)

    def dtype(self, name: str) -> torch.dtype:
        """Element type of a tensor."""
        reader, inner = self.readers[name]
        return reader.dtype(inner)

    def file(self, name: str) -> str:
        """File that holds a tensor."""
        reader, inner = self.readers[name]
        return str(reader.files[inner])

    def check(self, entries: tuple[Entry, ...]) -> None:
        """Compare names and shapes with those of a model; see `check_tensors`."""
        expected = {
            name: shape
            for entry in entries
            for name, shape in zip(entry.hf_names, entry.hf_shapes, strict=True)
        }
        check_tensors(self.shapes, expected, self.file, self.where)


@dataclass(frozen=True, kw_only=True)
class HFSource(HFTensors):
    """Three parts or a combined folder, opened."""

    config: HFConfig
    """What the ``config.json`` files say."""
    vision_dir: Path
    """Folder with the ViT's small files."""
    llm_dir: Path
    """Folder with the LLM's small files and the tokenizer."""


def open_part(part: Part, path: Path, *, once: bool = False) -> HFTensors:
    """Open the weights of one part on its own; arguments and errors as in `open_parts`."""
    return HFTensors(readers=_readers(part, path, once), where=str(path))


def open_parts(
    vision: Path,
    llm: Path,
    projector: Path,
    ps_version: Literal["v1", "v2"] = "v1",
    *,
    once: bool = False,
) -> HFSource:
    """Open the three published parts.

    Args:
        vision: folder of the ViT.
        llm: folder of the LLM.
        projector: the projector's ``.pth`` file (or a folder or safetensors file).
        ps_version: pixel shuffle variant that the projector was trained with.
        once: rows are read once; see `places.read_rows`.

    Raises:
        ConfigError: for a ``config.json`` that is missing or unsupported.
        CheckpointError: for a file that is missing or damaged.
    """
    config = read_parts(vision, llm, ps_version)
    readers: dict[str, tuple[HFReader, str]] = {}
    paths: tuple[tuple[Part, Path], ...] = (
        ("vision_model", vision),
        ("vision_projection", projector),
        ("language_model", llm),
    )
    for part, path in paths:
        readers |= _readers(part, path, once)
    return HFSource(
        config=config,
        vision_dir=vision,
        llm_dir=llm,
        readers=readers,
        where=f"{vision}, {projector}, {llm}",
    )


def open_combined(folder: Path, *, once: bool = False) -> HFSource:
    """Open a combined InternVL-Chat folder; arguments and errors as in `open_parts`."""
    config = read_combined(folder)
    reader = HFReader(folder, once=once)
    return HFSource(
        config=config,
        vision_dir=folder,
        llm_dir=folder,
        readers={name: (reader, name) for name in _converted(reader)},
        where=str(folder),
    )


def _readers(part: Part, path: Path, once: bool) -> dict[str, tuple[HFReader, str]]:
    reader = HFReader(path, once=once)
    return {HF_PREFIXES[part] + name: (reader, name) for name in _converted(reader)}


def _converted(reader: HFReader) -> list[str]:
    return [name for name in reader.shapes if not name.endswith(DERIVED_HF_SUFFIXES)]
