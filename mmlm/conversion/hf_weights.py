"""HuggingFace weights, opened and checked, as Megatron's tensors."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

from mmlm.config.model import ModelConfig, VisionConfig
from mmlm.conversion.block_reader import BlockReader
from mmlm.conversion.dtypes import dtype_name
from mmlm.conversion.entry_reader import EntryReader
from mmlm.conversion.hf_source import PROJECTOR_FILE, HFSource, open_combined, open_parts
from mmlm.conversion.name_map import expand
from mmlm.conversion.vocabulary import VocabularyPlan, plan_vocabulary
from mmlm.errors import CheckpointError, ConfigError

VOCABULARY_SEED = 42
"""Seed of new embedding rows, unless somebody wants another."""


@dataclass(frozen=True, kw_only=True)
class HFWeights:
    """Opened and checked weights; a tensor is read when it is asked for."""

    source: HFSource
    """The files."""
    model: ModelConfig
    """Sizes, with rows for the nine added tokens."""
    vocabulary: VocabularyPlan
    """What becomes of the vocabulary."""
    reader: EntryReader
    """Makes the tensors."""
    seed: int
    """Of new embedding rows."""

    @property
    def tokenizer_dir(self) -> Path:
        """Folder with ``tokenizer.model``."""
        return self.source.llm_dir

    @property
    def dtype(self) -> str:
        """bf16, fp16 or fp32 when all tensors are the same, otherwise mixed."""
        return dtype_name(self.reader.dtypes.values())

    def blocks(self) -> BlockReader:
        """A reader of single blocks of the same tensors."""
        return self.reader.fresh_blocks()


def prepare_weights(
    source: HFSource,
    dtype: torch.dtype | None = None,
    seed: int = VOCABULARY_SEED,
    *,
    image_size: int | None = None,
    vision_num_layers: int | None = None,
    strict: bool = False,
) -> HFWeights:
    """Check opened files against their own config, and plan what changes.

    Args:
        source: the files.
        dtype: of all tensors; None keeps each as it is.
        seed: of new embedding rows, when the vocabulary has to grow.
        image_size: of the pictures, pixels; the position embedding is resized if it is made for
            another. None: as the config says.
        vision_num_layers: layers of the ViT that are kept, from the first; None keeps all.
        strict: refuse weights that are NaN or infinite, instead of a warning.

    Raises:
        ConfigError: for sizes that make no model.
        CheckpointError: for tensors that are missing, stray or of another shape, or a tokenizer
            that does not belong to them.
    """
    sizes = source.config.model
    source.check(expand(source.config.stored_model))
    vocabulary = plan_vocabulary(source.llm_dir, sizes.language.vocab_size)
    language = dataclasses.replace(sizes.language, vocab_size=vocabulary.new_size)
    vision = adapt_vision(sizes.vision, image_size, vision_num_layers)
    model = dataclasses.replace(sizes, language=language, vision=vision)
    return HFWeights(
        source=source,
        model=model,
        vocabulary=vocabulary,
        reader=EntryReader(source, expand(model), vocabulary, dtype, seed, strict=strict),
        seed=seed,
    )


def adapt_vision(
    vision: VisionConfig, image_size: int | None, num_layers: int | None
) -> VisionConfig:
    """A ViT for pictures of another size, or of fewer layers; see `prepare_weights`."""
    if num_layers is not None and not 1 <= num_layers <= vision.num_layers:
        raise ConfigError(
            f"--vision-num-layers {num_layers}: the ViT has layers 1 to {vision.num_layers}"
        )
    try:
        return dataclasses.replace(
            vision,
            image_size=vision.image_size if image_size is None else image_size,
            num_layers=vision.num_layers if num_layers is None else num_layers,
        )
    except ConfigError as error:
        raise ConfigError(f"--image-size {image_size}: {error}") from None


def open_weights(
    folder: Path, *, image_size: int | None = None, vision_num_layers: int | None = None
) -> HFWeights:
    """Open a combined InternVL-Chat folder, or a folder of the published parts.

    Args:
        folder: with ``config.json`` of the combined model; or with ``vision/`` (the projector at
            its published place in it) and ``llm/``, as ``megatron_to_hf.py --parts`` writes them.
        image_size: see `prepare_weights`.
        vision_num_layers: see `prepare_weights`.

    Raises:
        ConfigError: for a ``config.json`` that is unsupported.
        CheckpointError: for weights that are missing, damaged or do not fit the config.
    """
    vision, llm = folder / "vision", folder / "llm"
    if (folder / "config.json").is_file():
        source = open_combined(folder)
    elif vision.is_dir() and llm.is_dir():
        source = open_parts(vision, llm, vision / PROJECTOR_FILE)
    else:
        raise CheckpointError(_not_weights(folder))
    return prepare_weights(source, image_size=image_size, vision_num_layers=vision_num_layers)


def _not_weights(folder: Path) -> str:
    found = "has neither config.json nor vision/ and llm/" if folder.is_dir() else "does not exist"
    return (
        f"{folder}: {found}; give a combined InternVL-Chat folder, or one that holds the ViT as "
        "vision/ and the LLM as llm/"
    )
