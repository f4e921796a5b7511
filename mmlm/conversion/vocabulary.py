"""The nine tokens that InternVL-Chat adds to the LLM's vocabulary.

Published initialisation: new rows of the head are the mean of all old rows, new rows of the
embedding are drawn from N(0, 0.02). Nothing happens to weights that have the rows already.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from torch import Tensor

from mmlm.conversion.hf_config import read_json
from mmlm.data.tokenizer import NEW_TOKENS
from mmlm.errors import CheckpointError

EMBEDDING = "language_model.embedding.word_embeddings.weight"
"""Global name of the embedding."""

HEAD = "language_model.output_layer.weight"
"""Global name of the head."""

EMBEDDING_STD = 0.02
"""Standard deviation of new embedding rows."""

_MEAN_ROWS = 4096
"""Rows of the head summed at a time, which bounds the memory of the fp64 copy."""

_FLAGS = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}


@dataclass(frozen=True, kw_only=True)
class VocabularyPlan:
    """What becomes of a vocabulary."""

    old_size: int
    """Rows of the embedding and the head in the files."""
    new_size: int
    """Rows afterwards."""
    added_tokens: dict[str, int]
    """Every token that is not in the SentencePiece model -> id, the nine included."""
    new_tokens: dict[str, int]
    """Those of the nine that the tokenizer files lacked -> id."""

    @property
    def num_new_rows(self) -> int:
        """Rows to make."""
        return self.new_size - self.old_size


def plan_vocabulary(tokenizer_dir: Path, vocab_size: int) -> VocabularyPlan:
    """Find which of the nine tokens a tokenizer lacks and which ids they get.

    Args:
        tokenizer_dir: folder with ``tokenizer.model``, and ``added_tokens.json`` or
            ``tokenizer_config.json`` where tokens were added before.
        vocab_size: rows of the embedding in the weight files.

    Raises:
        CheckpointError: when there is no tokenizer, or it knows more tokens than there are rows.
    """
    file = tokenizer_dir / "tokenizer.model"
    try:
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(file))
    except (OSError, RuntimeError) as error:
        found = "missing" if not file.exists() else f"not a SentencePiece model: {error}"
        raise CheckpointError(
            f"{file}: {found}; the vocabulary cannot be completed without the LLM's tokenizer"
        ) from None
    num_pieces = pieces.get_piece_size()
    added = _added_tokens(tokenizer_dir, num_pieces)
    size = max([num_pieces, *(token_id + 1 for token_id in added.values())])
    if size > vocab_size:
        raise CheckpointError(
            f"{tokenizer_dir}: the tokenizer has {size} tokens, the weights {vocab_size} rows: "
            "they do not belong together"
        )
    missing = [
        token
        for token in NEW_TOKENS
        if token not in added and pieces.id_to_piece(pieces.piece_to_id(token)) != token
    ]
    new_tokens = {token: size + number for number, token in enumerate(missing)}
    return VocabularyPlan(
        old_size=vocab_size,
        new_size=max(vocab_size, size + len(missing)),
        added_tokens={**added, **new_tokens},
        new_tokens=new_tokens,
    )


def new_embedding_rows(plan: VocabularyPlan, width: int, seed: int) -> Tensor:
    """fp32 rows [new, width] ~ N(0, 0.02)."""
    generator = torch.Generator().manual_seed(seed)
    return EMBEDDING_STD * torch.randn(plan.num_new_rows, width, generator=generator)


def mean_of_rows(read: Callable[[slice], Tensor], num_rows: int) -> Tensor:
    """fp64 mean [h] of all rows of a matrix, a few thousand in memory at a time.

    Args:
        read: gives the rows of a slice, [rows, h].
        num_rows: of the whole matrix.
    """
    sums = [
        read(slice(start, min(start + _MEAN_ROWS, num_rows))).double().sum(dim=0)
        for start in range(0, num_rows, _MEAN_ROWS)
    ]
    return sum(sums, torch.zeros_like(sums[0])) / num_rows


def write_tokenizer_files(source: Path, target: Path, plan: VocabularyPlan) -> None:
    """Copy a tokenizer, with the new tokens entered wherever HuggingFace looks for them.

    ``tokenizer.json`` of the fast tokenizer is left out: it splits text otherwise than the
    SentencePiece model, and would lack the new tokens.

    Args:
        source: folder to copy from.
        target: existing folder.
        plan: from `plan_vocabulary`.
    """
    (target / "tokenizer.model").write_bytes((source / "tokenizer.model").read_bytes())
    if plan.added_tokens:
        by_id = dict(sorted(plan.added_tokens.items(), key=lambda item: item[1]))
        write_json(target / "added_tokens.json", by_id)
    config_file = source / "tokenizer_config.json"
    if config_file.is_file():
        config = read_json(config_file)
        if plan.new_tokens and "added_tokens_decoder" in config:
            config["added_tokens_decoder"] |= {
                str(token_id): {"content": token, "special": True, **_FLAGS}
                for token, token_id in plan.new_tokens.items()
            }
        write_json(target / "tokenizer_config.json", config)
    map_file = source / "special_tokens_map.json"
    if map_file.is_file():
        special = read_json(map_file)
        if plan.new_tokens:
            old = special.get("additional_special_tokens", [])
            special["additional_special_tokens"] = [*old, *plan.new_tokens]
        write_json(target / "special_tokens_map.json", special)


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write json as HuggingFace does: two spaces, keys in the given order, plain UTF-8."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _added_tokens(folder: Path, num_pieces: int) -> dict[str, int]:
    """Tokens beyond the SentencePiece model, from either file that may list them."""
    added: dict[str, int] = {}
    listed = folder / "added_tokens.json"
    if listed.is_file():
        added |= read_json(listed)
    config_file = folder / "tokenizer_config.json"
    if config_file.is_file():
        decoder = read_json(config_file).get("added_tokens_decoder", {})
        added |= {entry["content"]: int(token_id) for token_id, entry in decoder.items()}
    beyond = {token: token_id for token, token_id in added.items() if token_id >= num_pieces}
    if len(set(beyond.values())) != len(beyond):
        raise CheckpointError(f"{listed}: two tokens have the same id: {beyond}")
    return beyond
