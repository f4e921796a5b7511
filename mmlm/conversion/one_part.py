"""One part on its own: a ViT, a projector or an LLM into a checkpoint of that part.

The vocabulary of an LLM on its own is left as it is: nothing is added for pictures.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from mmlm.checkpoint.part_manifest import PartManifest
from mmlm.config.model import PartsConfig, ProjectionConfig
from mmlm.conversion.assets import write_part_assets
from mmlm.conversion.dtypes import dtype_name
from mmlm.conversion.entry_reader import EntryReader
from mmlm.conversion.hf_config import language_from_hf, read_json, vision_from_hf
from mmlm.conversion.hf_source import HFTensors, open_part
from mmlm.conversion.hf_weights import adapt_vision
from mmlm.conversion.name_map import HF_PREFIXES, Part, expand
from mmlm.conversion.vocabulary import VocabularyPlan
from mmlm.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class OnePart:
    """Opened and checked weights of one part."""

    part: Part
    """Which."""
    path: Path
    """Its folder or file."""
    model: PartsConfig
    """Its sizes."""
    reader: EntryReader
    """Makes the tensors."""

    def write_small_files(self, directory: Path, assets: Path) -> None:
        """Write everything of a checkpoint but its tensors.

        Args:
            directory: of the checkpoint.
            assets: is made, for what lies beside the weights.
        """
        dtype = dtype_name(self.reader.dtypes.values())
        PartManifest(part=self.part, dtype=dtype, model=self.model).write(directory)
        write_part_assets(assets, self.part, self.path)


def open_one_part(
    part: Part,
    path: Path,
    dtype: torch.dtype | None = None,
    *,
    image_size: int | None = None,
    vision_num_layers: int | None = None,
    strict: bool = False,
) -> OnePart:
    """Open one part and check it against its own config.

    Args:
        part: which.
        path: folder of the ViT or the LLM, file of the projector.
        dtype: of all tensors; None keeps each as it is.
        image_size: as for `prepare_weights`.
        vision_num_layers: as for `prepare_weights`.
        strict: as for `prepare_weights`.

    Raises:
        ConfigError: for a ``config.json`` that is missing or unsupported.
        CheckpointError: for weights that are missing, damaged or do not fit the config.
    """
    if part == "vision_projection":
        tensors = open_part(part, path, once=True)
        stored = model = PartsConfig(projection=_projection_sizes(tensors))
    else:
        file = path / "config.json"
        content = read_json(file)
        if part == "vision_model":
            vision = vision_from_hf(content, str(file))
            stored = PartsConfig(vision=vision)
            model = PartsConfig(vision=adapt_vision(vision, image_size, vision_num_layers))
        else:
            stored = model = PartsConfig(language=language_from_hf(content, str(file)))
        tensors = open_part(part, path, once=True)
    tensors.check(expand(stored))
    rows = model.language.vocab_size if model.language else 0
    plan = VocabularyPlan(old_size=rows, new_size=rows, added_tokens={}, new_tokens={})
    reader = EntryReader(tensors, expand(model), plan, dtype, seed=0, strict=strict)
    return OnePart(part=part, path=path, model=model, reader=reader)


def _projection_sizes(tensors: HFTensors) -> ProjectionConfig:
    """Sizes from the first linear layer, because a projector comes without a config."""
    name = HF_PREFIXES["vision_projection"] + "1.weight"
    shape = tensors.shapes.get(name, ())
    if len(shape) != 2:
        raise CheckpointError(f"{tensors.where}: not a projector: there is no matrix '1.weight'")
    return ProjectionConfig(input_size=shape[1], hidden_size=shape[0])
