"""The demo's SentencePiece model: deterministic, lossless, laid out as Yi's."""

from pathlib import Path

import pytest
import sentencepiece

from examples.internvl_v1_2.demo import tokenizer
from mmlm.data.conversation import SYSTEM_MESSAGE
from mmlm.data.tokenizer import NEW_TOKENS, Tokenizer

TEXTS = [
    "What does the picture show?",
    "a red circle on a white background",
    "左边的图形是什么颜色？",
    "红色",
    "Which number comes after 3?",
] * 20


@pytest.fixture(scope="module")
def model() -> bytes:
    return tokenizer.train(TEXTS, 600)


def test_training_is_deterministic(model: bytes) -> None:
    assert tokenizer.train(TEXTS, 600) == model


def test_ids_are_where_yi_has_them(model: bytes) -> None:
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    wanted = {"<unk>": 0, "<|startoftext|>": 1, "<|endoftext|>": 2}
    wanted |= {"<|im_start|>": 6, "<|im_end|>": 7}
    assert {piece: pieces.piece_to_id(piece) for piece in wanted} == wanted


@pytest.mark.parametrize(
    "text", [*TEXTS[:5], " leading", "two\n\nlines", "never seen: Grüße 🙂 漢字"]
)
def test_round_trip_is_lossless(model: bytes, text: str) -> None:
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert pieces.decode(pieces.encode(text)) == text
    assert 0 not in pieces.encode(text)  # bytes, never <unk>


def test_system_message_is_few_pieces(model: bytes) -> None:
    assert SYSTEM_MESSAGE in tokenizer.ROLE_TEXTS[0]
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert len(pieces.encode(tokenizer.ROLE_TEXTS[0])) <= 8


def test_mmlm_reads_the_folder(model: bytes, tmp_path: Path) -> None:
    size = tokenizer.write(tmp_path, model)
    reader = Tokenizer(tmp_path)
    assert reader.vocab_size == size + len(NEW_TOKENS)
    assert (reader.im_start_id, reader.im_end_id) == (6, 7)
    assert reader.img_context_id == size + 2
