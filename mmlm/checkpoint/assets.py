"""The small files that travel with a checkpoint: tokenizer and json of the HuggingFace parts.

A run reads them once at its start and writes them into every checkpoint, so deleting the checkpoint
that it started from loses nothing.
"""

from collections.abc import Mapping
from pathlib import Path

TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


def read_assets(folder: Path | None, tokenizer_folder: Path | None = None) -> dict[str, bytes]:
    """Read the assets of a checkpoint.

    Args:
        folder: its ``hf_assets``; may be None or missing.
        tokenizer_folder: where the tokenizer that is used comes from, when it is another; of what
            else lies there (an LLM's weights, say) nothing is taken.

    Returns:
        File name -> content.
    """
    assets = {}
    if folder is not None and folder.is_dir():
        assets = {file.name: file.read_bytes() for file in sorted(folder.iterdir())}
    if tokenizer_folder is not None:
        for name in TOKENIZER_FILES:
            assets.pop(name, None)
            if (tokenizer_folder / name).is_file():
                assets[name] = (tokenizer_folder / name).read_bytes()
    return assets


def write_assets(folder: Path, assets: Mapping[str, bytes]) -> None:
    """Write the assets into a new folder."""
    folder.mkdir()
    for name, content in assets.items():
        (folder / name).write_bytes(content)
