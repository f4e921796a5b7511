"""A checkpoint in HuggingFace's forms: the combined folder and the three parts."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from mmlm.checkpoint.manifest import ASSETS_DIR, Manifest
from mmlm.checkpoint.tensor_reader import TensorReader
from mmlm.config.model import ModelConfig
from mmlm.conversion.assets import (
    COMBINED_CONFIG_FILE,
    LLM_CONFIG_FILE,
    VISION_CONFIG_FILE,
    copy_llm_files,
    copy_vision_files,
    read_asset,
)
from mmlm.conversion.dtypes import cast, torch_name
from mmlm.conversion.hf_config import Json, combined_to_hf, language_to_hf, vision_to_hf
from mmlm.conversion.hf_source import PROJECTOR_FILE
from mmlm.conversion.hf_writer import TensorSpec, write_weights
from mmlm.conversion.name_map import MODEL_PREFIX, Entry, check_tensors, expand, part_name
from mmlm.conversion.vocabulary import write_json

OnBytes = Callable[[int], object]
"""Called with the size of every tensor that was made."""


class Export:
    """A checkpoint, opened and checked, that is written in HuggingFace's forms."""

    def __init__(self, directory: Path, dtype: torch.dtype | None, max_shard_bytes: int) -> None:
        self._model = Manifest.read(directory).model
        self._assets = directory / ASSETS_DIR
        self._max_shard_bytes = max_shard_bytes
        self._reader = TensorReader(directory)
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

    @property
    def num_bytes(self) -> int:
        """Size of all tensors in HuggingFace's form."""
        return sum(spec.num_bytes for spec in self._specs(self._entries))

    def write_combined(self, folder: Path, on_bytes: OnBytes) -> None:
        """The combined InternVL-Chat folder."""
        write_weights(
            folder,
            self._specs(self._entries),
            self._tensors(self._entries, on_bytes),
            self._max_shard_bytes,
        )
        write_small_files(folder, self._model, self._assets, self._torch_dtype)

    def write_parts(self, folder: Path, on_bytes: OnBytes) -> None:
        """The three parts as they were published."""
        vision, llm = folder / "vision", folder / "llm"
        for place, part, content in (
            (vision, "vision_model", self._vision_json()),
            (llm, "language_model", self._llm_json()),
        ):
            place.mkdir()
            entries = tuple(entry for entry in self._entries if entry.part == part)
            specs = [
                dataclasses.replace(spec, name=part_name(spec.name)[1])
                for spec in self._specs(entries)
            ]
            write_weights(
                place, specs, self._part_tensors(entries, on_bytes), self._max_shard_bytes
            )
            write_json(place / "config.json", content)
        copy_vision_files(self._assets, vision)
        copy_llm_files(self._assets, llm)
        projector = vision / PROJECTOR_FILE
        projector.parent.mkdir()
        entries = tuple(entry for entry in self._entries if entry.part == "vision_projection")
        torch.save(dict(self._part_tensors(entries, on_bytes)), projector)

    def _specs(self, entries: tuple[Entry, ...]) -> list[TensorSpec]:
        return [
            TensorSpec(name=name, shape=shape, dtype=self._dtypes[_key(entry)])
            for entry in entries
            for name, shape in zip(entry.hf_names, entry.hf_shapes, strict=True)
        ]

    def _tensors(
        self, entries: tuple[Entry, ...], on_bytes: OnBytes
    ) -> Iterator[tuple[str, Tensor]]:
        for entry in entries:
            key = _key(entry)
            tensor = cast(self._reader.read(key), self._dtypes[key], key)
            for name, each in zip(entry.hf_names, entry.rule.to_hf(tensor), strict=True):
                on_bytes(each.nbytes)
                yield name, each

    def _part_tensors(
        self, entries: tuple[Entry, ...], on_bytes: OnBytes
    ) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._tensors(entries, on_bytes):
            yield part_name(name)[1], tensor

    def _vision_json(self) -> Json:
        return vision_to_hf(
            self._model.vision, read_asset(self._assets, VISION_CONFIG_FILE), self._torch_dtype
        )

    def _llm_json(self) -> Json:
        return language_to_hf(
            self._model.language, read_asset(self._assets, LLM_CONFIG_FILE), self._torch_dtype
        )


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


def _key(entry: Entry) -> str:
    return MODEL_PREFIX + entry.megatron_name
