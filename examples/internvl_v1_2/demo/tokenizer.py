"""Trains a small SentencePiece model on the demo's own text, laid out as the Yi tokenizer is.

As in Yi: ``<unk>`` 0, ``<|startoftext|>`` 1, ``<|endoftext|>`` 2, the ChatML marks at 6 and 7, a
piece for the newline, byte fallback, identity normalisation, no dummy prefix. The nine image and
box tokens are not in it: conversion adds them, as it does for the published weights.
"""

import io
import json
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from mmlm.data.conversation import SYSTEM_MESSAGE

MARKS = ("<|Human|>", "<|Assistant|>", "<|System|>", "<|im_start|>", "<|im_end|>", "\n")
"""User-defined pieces, in order from id 3, as in Yi (whose newline has a later id)."""

ROLE_TEXTS = ("system\n" + SYSTEM_MESSAGE, "user\n", "assistant\n")
"""What the template adds around every conversation; trained on so that it becomes few tokens."""


def train(texts: Iterable[str], vocab_size: int) -> bytes:
    """Train a BPE model; the same texts give the same bytes.

    Args:
        texts: questions and answers, each without any mark of the template.
        vocab_size: pieces asked for, all kinds together; fewer when the text has not enough.

    Returns:
        The serialised SentencePiece model.
    """
    texts = list(texts)
    lines = [part for text in texts for part in text.split("\n") if part]
    roles = [part for text in ROLE_TEXTS for part in text.split("\n") if part]
    lines += roles * max(1, len(texts) // 4)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        character_coverage=1.0,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        split_digits=True,
        max_sentencepiece_length=64,
        split_by_unicode_script=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        bos_piece="<|startoftext|>",
        eos_piece="<|endoftext|>",
        user_defined_symbols=list(MARKS),
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def _mark(content: str) -> dict[str, object]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {"content": content, "special": True, **flags}


def write(folder: Path, model: bytes) -> int:
    """Write the three tokenizer files of a HuggingFace Llama folder.

    Args:
        folder: existing folder; gets ``tokenizer.model``, ``tokenizer_config.json`` and
            ``special_tokens_map.json``.
        model: what `train` returned.

    Returns:
        Number of pieces, the size of the vocabulary.
    """
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    specials = ("<unk>", "<|startoftext|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>")
    config = {
        "add_bos_token": False,
        "add_eos_token": False,
        "added_tokens_decoder": {
            str(processor.piece_to_id(piece)): _mark(piece) for piece in specials
        },
        "bos_token": "<|startoftext|>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "legacy": True,
        "model_max_length": 4096,
        "pad_token": "<unk>",
        "padding_side": "right",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
        "use_default_system_prompt": False,
    }
    roles = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<unk>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer.model").write_bytes(model)
    for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", roles)):
        text = json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True)
        (folder / name).write_text(text + "\n", encoding="utf-8")
    return processor.get_piece_size()
