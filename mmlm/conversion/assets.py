"""The small files beside the tensors: json of the parts, tokenizer, generation settings.

They travel in a checkpoint's ``hf_assets`` so that an export needs nothing but the checkpoint.
"""

import shutil
from pathlib import Path

from mmlm.checkpoint.assets import TOKENIZER_FILES
from mmlm.conversion.hf_config import Json, read_json
from mmlm.conversion.hf_source import HFSource
from mmlm.conversion.name_map import Part
from mmlm.conversion.vocabulary import VocabularyPlan, write_json, write_tokenizer_files
from mmlm.log import get_logger

VISION_CONFIG_FILE = "vision_config.json"
LLM_CONFIG_FILE = "llm_config.json"
COMBINED_CONFIG_FILE = "internvl_config.json"
"""Only when a combined folder came in: its keys other than the two configs above."""

GENERATION_CONFIG_FILE = "generation_config.json"

_VISION_FILES = ("preprocessor_config.json",)
_LLM_FILES = (GENERATION_CONFIG_FILE,)
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_log = get_logger("mmlm.conversion")


def write_assets(folder: Path, source: HFSource, plan: VocabularyPlan) -> None:
    """Keep everything beside tensors that an export or a training needs.

    Args:
        folder: is made.
        source: where the weights come from.
        plan: which tokens the tokenizer files still lack.
    """
    folder.mkdir()
    write_json(folder / VISION_CONFIG_FILE, source.config.vision)
    write_json(folder / LLM_CONFIG_FILE, source.config.llm)
    if source.config.combined is not None:
        write_json(folder / COMBINED_CONFIG_FILE, source.config.combined)
    write_tokenizer_files(source.llm_dir, folder, plan)
    _copy(source.vision_dir, folder, _VISION_FILES)
    _copy(source.llm_dir, folder, _LLM_FILES)


def write_part_assets(folder: Path, part: Part, source: Path) -> None:
    """Keep everything beside the tensors of one part.

    Args:
        folder: is made.
        part: which.
        source: its folder; the projector's file has nothing beside it.
    """
    folder.mkdir()
    if part == "vision_model":
        write_json(folder / VISION_CONFIG_FILE, read_json(source / "config.json"))
        _copy(source, folder, _VISION_FILES)
    elif part == "language_model":
        write_json(folder / LLM_CONFIG_FILE, read_json(source / "config.json"))
        _copy(source, folder, (*TOKENIZER_FILES, *_LLM_FILES))


def read_asset(folder: Path, name: str) -> Json | None:
    """One of the json files above, or None when the checkpoint was not made from HuggingFace's."""
    file = folder / name
    return read_json(file) if file.is_file() else None


def copy_vision_files(assets: Path, folder: Path) -> None:
    """Put the ViT's small files into an exported folder."""
    _copy(assets, folder, _VISION_FILES)


def copy_llm_files(assets: Path, folder: Path) -> None:
    """Put the tokenizer and the LLM's small files into an exported folder.

    Where the LLM came without generation settings, they are the ids that its config names, as
    transformers makes them.
    """
    if not (assets / "tokenizer.model").is_file():
        _log.warning("%s: no tokenizer.model, so no tokenizer is exported", assets)
    _copy(assets, folder, (*TOKENIZER_FILES, *_LLM_FILES))
    if not (folder / GENERATION_CONFIG_FILE).is_file():
        config = read_asset(assets, LLM_CONFIG_FILE) or {}
        ids = {key: config[key] for key in _TOKEN_IDS if config.get(key) is not None}
        write_json(folder / GENERATION_CONFIG_FILE, {"_from_model_config": True, **ids})


def _copy(source: Path, target: Path, names: tuple[str, ...]) -> None:
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
