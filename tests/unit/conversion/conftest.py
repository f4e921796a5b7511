"""Tiny HuggingFace parts with a tokenizer, written once a combination."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_data import make_tokenizer
from tests.tiny_weights import TINY_VISION_CONFIG, FileFormat, tiny_llm_config, write_parts

WriteParts = Callable[..., Path]


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer without the nine tokens."""
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def num_pieces(tokenizer_dir: Path) -> int:
    """Tokens of that tokenizer."""
    import sentencepiece

    model = str(tokenizer_dir / "tokenizer.model")
    return int(sentencepiece.SentencePieceProcessor(model_file=model).get_piece_size())


@pytest.fixture
def write_tiny_parts(tmp_path: Path, tokenizer_dir: Path, num_pieces: int) -> WriteParts:
    """Writes ``in/vision`` and ``in/llm`` with a tokenizer; returns ``in``."""

    def write(
        *,
        dtype: torch.dtype = torch.float32,
        file_format: FileFormat = "safetensors",
        shards: int = 1,
        num_new_rows: int = 9,
        folder: str = "in",
        **llm_changes: Any,
    ) -> Path:
        place = tmp_path / folder
        llm = tiny_llm_config(num_pieces + num_new_rows, **llm_changes)
        write_parts(place, TINY_VISION_CONFIG, llm, 3, dtype, file_format, shards)
        for file in tokenizer_dir.iterdir():
            (place / "llm" / file.name).write_bytes(file.read_bytes())
        return place

    return write
