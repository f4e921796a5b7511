"""A checkpoint in HuggingFace's forms: the combined folder, the three parts, or one of them."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mmlm.checkpoint.manifest import ASSETS_DIR, Manifest
from mmlm.checkpoint.part_manifest import read_any_manifest
from mmlm.checkpoint.row_stream import Slot, fill, open_kept, write_at
from mmlm.checkpoint.tensor_reader import TensorReader
from mmlm.checkpoint.torch_files import frame_of
from mmlm.config.model import ModelConfig, PartsConfig
from mmlm.conversion.assets import (
    COMBINED_CONFIG_FILE,
    LLM_CONFIG_FILE,
    VISION_CONFIG_FILE,
    copy_llm_files,
    copy_vision_files,
    read_asset,
)
from mmlm.conversion.dtypes import cast, torch_name
from mmlm.conversion.finite import FiniteCheck
from mmlm.conversion.hf_config import combined_to_hf, language_to_hf, vision_to_hf
from mmlm.conversion.hf_source import PROJECTOR_FILE
from mmlm.conversion.hf_writer import TensorSpec, fill_weights, plan_shards, shard_names
from mmlm.conversion.name_map import (
    HF_PREFIXES,
    MODEL_PREFIX,
    Entry,
    Part,
    check_tensors,
    expand,
    part_name,
)
from mmlm.conversion.rules import megatron_rows
from mmlm.conversion.vocabulary import write_json
from mmlm.errors import CheckpointError

OnBytes = Callable[[int], object]
"""Called with the size of every block that was made."""

PART_FOLDERS: Mapping[Part, str] = {
    "vision_model": "vision",
    "vision_projection": "vision",
    "language_model": "llm",
}
"""Where the three parts lie beside each other."""


class Export:
    """A checkpoint, opened and checked, that is written in HuggingFace's forms.

    Args:
        directory: of an iteration; of a whole model or of one part.
        dtype: of all tensors; None keeps each as it is.
        max_shard_bytes: largest safetensors file, unless one tensor is larger.
        strict: refuse weights that are NaN or infinite, instead of a warning.
    """

    def __init__(
        self,
        directory: Path,
        dtype: torch.dtype | None,
        max_shard_bytes: int,
        *,
        strict: bool = False,
    ) -> None:
        manifest = read_any_manifest(directory)
        self._model = manifest.model
        self._part = None if isinstance(manifest, Manifest) else manifest.part
        self._directory, self._assets = directory, directory / ASSETS_DIR
        self._max_shard_bytes = max_shard_bytes
        self._reader = TensorReader(directory, once=True)
        self._entries = expand(self._model)
        stored = {
            key: info for key, info in self._reader.infos.items() if key.startswith(MODEL_PREFIX)
        }
        check_tensors(
            {key: info.shape for key, info in stored.items()},
            {MODEL_PREFIX + entry.megatron_name: entry.megatron_shape for entry in self._entries},
            lambda _: str(directory),
            str(directory),
        )
        self._dtypes = {key: dtype or info.dtype for key, info in stored.items()}
        self._torch_dtype = torch_name(self._dtypes.values())
        self._rows = {
            name: (entry, number)
            for entry in self._entries
            for number, name in enumerate(entry.hf_names)
        }
        self.check = FiniteCheck(strict=strict)
        """Has looked at everything that was read."""

    @property
    def parts(self) -> tuple[Part, ...]:
        """Which parts the checkpoint holds."""
        there = {entry.part for entry in self._entries}
        return tuple(part for part in HF_PREFIXES if part in there)

    def num_bytes(self, parts: Sequence[Part]) -> int:
        """Size of the tensors of some parts in HuggingFace's form."""
        return sum(spec.num_bytes for part in parts for spec in self._specs(part))

    def combined_files(self) -> list[str]:
        """Files of tensors that `write_combined` makes."""
        return self._shards([spec for part in self.parts for spec in self._specs(part)])

    def part_files(self, part: Part) -> list[str]:
        """Files of tensors that `write_part` makes."""
        return [PROJECTOR_FILE] if part == "vision_projection" else self._shards(self._specs(part))

    def write_combined(self, folder: Path, on_bytes: OnBytes) -> None:
        """The combined InternVL-Chat folder.

        Raises:
            CheckpointError: when the checkpoint holds one part.
        """
        if not isinstance(self._model, ModelConfig):
            raise CheckpointError(
                f"{self._directory}: holds the {self._part} alone; a combined folder needs all "
                f"three parts (--only {self._part} writes this one)"
            )
        specs = [spec for part in self.parts for spec in self._specs(part)]
        fill_weights(folder, specs, self._source("", on_bytes), self._max_shard_bytes)
        write_small_files(folder, self._model, self._assets, self._torch_dtype)

    def write_part(self, part: Part, folder: Path, on_bytes: OnBytes) -> None:
        """One part as it was published; the projector at its published place in the folder.

        Args:
            part: which.
            folder: existing folder.
            on_bytes: called with the size of every block.

        Raises:
            CheckpointError: when the checkpoint does not hold it.
        """
        if part not in self.parts:
            raise CheckpointError(f"{self._directory}: holds the {self._part} alone, not {part}")
        specs = [
            TensorSpec(name=part_name(spec.name)[1], shape=spec.shape, dtype=spec.dtype)
            for spec in self._specs(part)
        ]
        source = self._source(HF_PREFIXES[part], on_bytes)
        if part == "vision_projection":
            file = folder / PROJECTOR_FILE
            file.parent.mkdir(exist_ok=True)
            _fill_torch_file(file, specs, source)
            return
        fill_weights(folder, specs, source, self._max_shard_bytes)
        parts = self._model.parts if isinstance(self._model, ModelConfig) else self._model
        write_part_files(folder, parts, part, self._assets, self._torch_dtype)

    def _shards(self, specs: Sequence[TensorSpec]) -> list[str]:
        return shard_names(len(plan_shards(specs, self._max_shard_bytes)))

    def _specs(self, part: Part) -> list[TensorSpec]:
        return [
            TensorSpec(name=name, shape=shape, dtype=self._dtypes[_key(entry)])
            for entry in self._entries
            if entry.part == part
            for name, shape in zip(entry.hf_names, entry.hf_shapes, strict=True)
        ]

    def _source(self, prefix: str, on_bytes: OnBytes) -> Callable[[str, int, int], Tensor]:
        """Gives rows of HuggingFace's tensors, whose names lack a prefix."""

        def rows(name: str, start: int, stop: int) -> Tensor:
            block = self._read_rows(prefix + name, start, stop)
            on_bytes(block.nbytes)
            return block

        return rows

    def _read_rows(self, name: str, start: int, stop: int) -> Tensor:
        entry, number = self._rows[name]
        key = _key(entry)
        places = megatron_rows(entry.rule, number, start, stop, entry.hf_shapes)
        found = [self._reader.read_rows(key, rows.start, rows.stop) for rows in places]
        block = found[0] if len(found) == 1 else torch.cat(found)
        self.check.look(block, key, str(self._directory))
        return cast(block, self._dtypes[key], key)


def write_small_files(folder: Path, model: ModelConfig, assets: Path, torch_dtype: str) -> None:
    """Everything of the combined folder beside its weights: config.json and the tokenizer.

    Args:
        folder: existing folder.
        model: sizes.
        assets: folder of what the weights came with; may be empty or missing.
        torch_dtype: torch's name of the element type, e.g. ``bfloat16``.
    """
    vision = vision_to_hf(model.vision, read_asset(assets, VISION_CONFIG_FILE), torch_dtype)
    llm = language_to_hf(model.language, read_asset(assets, LLM_CONFIG_FILE), torch_dtype)
    original = read_asset(assets, COMBINED_CONFIG_FILE)
    content = combined_to_hf(model, vision, llm, original, torch_dtype)
    write_json(folder / "config.json", content)
    copy_vision_files(assets, folder)
    copy_llm_files(assets, folder)


def write_part_files(
    folder: Path, model: PartsConfig, part: Part, assets: Path, torch_dtype: str
) -> None:
    """Everything of the ViT's or the LLM's folder beside its weights.

    Args:
        folder: existing folder.
        model: sizes, of this part at least.
        part: vision_model or language_model.
        assets: as in `write_small_files`.
        torch_dtype: as in `write_small_files`.
    """
    if part == "vision_model":
        assert model.vision is not None
        content = vision_to_hf(model.vision, read_asset(assets, VISION_CONFIG_FILE), torch_dtype)
        copy_vision_files(assets, folder)
    else:
        assert model.language is not None
        content = language_to_hf(model.language, read_asset(assets, LLM_CONFIG_FILE), torch_dtype)
        copy_llm_files(assets, folder)
    write_json(folder / "config.json", content)


def _fill_torch_file(
    file: Path, specs: Sequence[TensorSpec], source: Callable[[str, int, int], Tensor]
) -> None:
    """Write a dict of tensors as torch.save does, some rows at a time."""
    frame = frame_of({spec.name: torch.empty(spec.shape, dtype=spec.dtype) for spec in specs})
    slots = [
        Slot(key=spec.name, shape=spec.shape, dtype=spec.dtype, offset=offset)
        for spec, offset in zip(specs, frame.offsets, strict=True)
    ]
    descriptor, kept_bytes = open_kept(file)
    try:
        for at, piece in frame.pieces:
            write_at(descriptor, piece, at)
        fill(descriptor, slots, source, kept_bytes)
        os.ftruncate(descriptor, frame.num_bytes)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _key(entry: Entry) -> str:
    return MODEL_PREFIX + entry.megatron_name
