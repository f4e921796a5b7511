"""Ids, labels and cuts: counted by hand with one id a character, and against the published code."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmlm.data.annotation import AnnotationSet, Record, Turn
from mmlm.data.conversation import SYSTEM_MESSAGE, Piece, render
from mmlm.data.dataset import Dataset
from mmlm.data.image import load_image, preprocess
from mmlm.data.rejection import Reason, Rejection
from mmlm.data.sample import SampleSettings, TokenizedSample, build_sample, measure, tokenize
from mmlm.data.tokenizer import Tokenizer
from mmlm.errors import DataError
from tests.parity.reference_preprocessing import preprocess as preprocess_as_published

SPECIAL = {"<|im_start|>": -1, "<|im_end|>": -2, "<img>": -3, "<IMG_CONTEXT>": -4, "</img>": -5}


class CharacterTokenizer:
    """One id a character (its code point), negative ids for special tokens."""

    img_context_id = SPECIAL["<IMG_CONTEXT>"]
    special_literals = tuple(SPECIAL)

    def encode(self, text: str) -> list[int]:
        parts = re.split("(" + "|".join(map(re.escape, SPECIAL)) + ")", text)
        return [
            number
            for part in parts
            for number in ([SPECIAL[part]] if part in SPECIAL else map(ord, part))
        ]


CHARACTERS: Any = CharacterTokenizer()


def record(*texts: str, images: tuple[str, ...] = ()) -> Record:
    turns = tuple(Turn(role=("human", "gpt")[i % 2], text=text) for i, text in enumerate(texts))
    return Record(file=Path("a.jsonl"), line=3, identity="x", images=images, turns=turns)


def cut(entry: Record, seq_length: int = 1000, system: str = "S") -> TokenizedSample | Rejection:
    settings = SampleSettings(
        seq_length=seq_length, image_size=28, embeddings_per_image=2, system_message=system
    )
    return tokenize(entry, CHARACTERS, settings)


def tokens(entry: Record, seq_length: int = 1000) -> TokenizedSample:
    result = cut(entry, seq_length)
    assert isinstance(result, TokenizedSample), result
    return result


def rejected(entry: Record, seq_length: int = 1000) -> Rejection:
    result = cut(entry, seq_length)
    assert isinstance(result, Rejection)
    return result


def characters(text: str) -> list[int]:
    return CHARACTERS.encode(text)


HEAD = "<|im_start|>system\nS<|im_end|><|im_start|>user\n"  # 1 + 8 + 1 + 1 + 5 = 16 tokens
ANSWER = "<|im_end|><|im_start|>assistant\n"  # 12 tokens


def test_ids_and_labels_of_one_round_by_hand() -> None:
    sample = tokens(record("问", "红"))
    assert sample.input_ids.tolist() == characters(f"{HEAD}问{ANSWER}红<|im_end|>")
    # 16 + 1 + 12 = 29 tokens before the answer: label 28 is the answer, 29 its end, 30 nothing.
    assert sample.labels.tolist() == [-100] * 28 + [ord("红"), -2, -100]
    assert sample.input_ids.dtype == sample.labels.dtype == np.int64
    assert (sample.num_images, sample.num_supervised_tokens) == (0, 2)
    assert sample.image_positions.tolist() == []


def test_every_answer_is_supervised_and_no_question() -> None:
    sample = tokens(record("q", "ab", "r", "c"))
    supervised = sample.labels[sample.labels != -100].tolist()
    assert supervised == [*characters("ab"), -2, ord("c"), -2]
    expected = sample.input_ids[np.flatnonzero(sample.labels != -100) + 1]
    assert supervised == expected.tolist()


def test_two_images_stand_where_their_placeholders_were() -> None:
    sample = tokens(record("a <image> b <image>", "c", images=("1.png", "2.png")))
    block = "<img><IMG_CONTEXT><IMG_CONTEXT></img>"
    text = f"{HEAD}a {block} b {block}{ANSWER}c<|im_end|>"
    assert sample.input_ids.tolist() == characters(text)
    # 16 tokens, "a ", <img>: the first at 19 and 20; </img>, " b ", <img>: the second at 26, 27.
    assert sample.image_positions.tolist() == [19, 20, 26, 27]
    assert sample.num_images == 2


def test_a_cut_keeps_what_is_left_and_labels_nothing_beyond() -> None:
    whole = tokens(record("q", "abcd"))
    sample = tokens(record("q", "abcd"), seq_length=31)  # 29 before, "ab" left
    assert sample.input_ids.tolist() == whole.input_ids[:31].tolist()
    assert sample.labels.tolist() == [-100] * 28 + [ord("a"), ord("b"), -100]


def test_a_cut_before_any_answer_leaves_nothing_to_train_on() -> None:
    rejection = rejected(record("q", "abcd"), seq_length=29)
    assert rejection.reason == Reason.NO_SUPERVISED_TOKEN
    assert "34 tokens; no answer is left after the cut at seq_length 29" in rejection.detail
    assert tokens(record("q", "abcd"), seq_length=30).num_supervised_tokens == 1


def test_a_cut_inside_an_image_is_invalid_and_one_at_its_edge_is_not() -> None:
    entry = record("<image> q", "a", "<image>", "b", images=("1.png", "2.png"))
    # 16 + 4 + 2 + 12 + 2 = 36, then <|im_start|>user\n is 6: the second block is 42 to 45.
    assert tokens(entry).image_positions.tolist() == [17, 18, 43, 44]
    for seq_length in (43, 44, 45):
        rejection = rejected(entry, seq_length)
        assert rejection.reason == Reason.CUT_INSIDE_IMAGE
        assert f"the cut at seq_length {seq_length} falls inside an image" in rejection.detail
    before, after = tokens(entry, 42), tokens(entry, 46)
    assert (before.num_images, before.image_positions.tolist()) == (1, [17, 18])
    assert (after.num_images, after.image_positions.tolist()) == (2, [17, 18, 43, 44])


def test_too_many_images_are_refused() -> None:
    rejection = rejected(record("q", "a", images=("1.png",) * 65))
    assert rejection.reason == Reason.TOO_MANY_IMAGES
    assert "65 images; at most 64 a sample" in rejection.detail


def test_a_broken_template_is_passed_on() -> None:
    assert rejected(record("q", "a", "r")).reason == Reason.ODD_TURNS


def test_labels_equal_the_published_masking(dataset: Dataset, tokenizer: Tokenizer) -> None:
    settings = SampleSettings(seq_length=4096, image_size=56, embeddings_per_image=4)
    texts = ("What?", "\nA line first", "再问", " 红色。\n\n")
    records = [dataset.record(sample_id) for sample_id in range(15)]
    for entry in [*records, record(*texts)]:
        sample = tokenize(entry, tokenizer, settings)
        pieces = render(entry.turns, num_images=len(entry.images), embeddings_per_image=4)
        assert isinstance(sample, TokenizedSample) and isinstance(pieces[0], Piece)
        prompt = "".join(piece.text for piece in pieces)
        assert SYSTEM_MESSAGE in prompt
        assert sample.input_ids.tolist() == tokenizer.encode(prompt)
        turns = [{"from": turn.role, "value": turn.text} for turn in entry.turns]
        published = preprocess_as_published(
            {"image": list(entry.images), "conversations": turns},
            tokenizer.encode,
            tokens_per_image=4,
            max_length=4096,
            pad_id=-1,
            image_end_id=tokenizer.added_tokens["</img>"],
        )
        assert sample.labels.tolist() == published.shifted


def test_boxes_in_answers_are_tokens_and_supervised(tokenizer: Tokenizer) -> None:
    settings = SampleSettings(seq_length=4096, image_size=56, embeddings_per_image=4)
    sample = tokenize(record("where?", "<box>[[1, 2]]</box>"), tokenizer, settings)
    assert isinstance(sample, TokenizedSample)
    supervised = sample.labels[sample.labels != -100].tolist()
    assert supervised[0] == tokenizer.added_tokens["<box>"]
    assert supervised[-2:] == [tokenizer.added_tokens["</box>"], tokenizer.im_end_id]


def test_measure_counts_without_opening_pictures(tokenizer: Tokenizer) -> None:
    settings = SampleSettings(seq_length=256, image_size=56, embeddings_per_image=4)
    entry = record("q", "a", images=("not there.png",))
    sample = tokenize(entry, tokenizer, settings)
    assert isinstance(sample, TokenizedSample)
    found = measure(entry, tokenizer, settings)
    assert (found.num_tokens, found.num_images) == (len(sample.input_ids), 1)
    assert (found.num_supervised_tokens, found.rejection) == (2, None)
    broken = measure(record("q"), tokenizer, settings)
    assert (broken.num_tokens, broken.num_images, broken.num_supervised_tokens) == (0, 0, 0)
    assert broken.rejection is not None and broken.rejection.reason == Reason.ODD_TURNS


def build(entry: Record, root: Path, **options: Any) -> Any:
    settings = SampleSettings(seq_length=256, image_size=28, embeddings_per_image=2)
    parent = AnnotationSet(
        name="tiny",
        root=root,
        annotation=entry.file,
        data_augment=options.pop("data_augment", False),
    )
    arguments = {"sample_id": 5, "seed": 0, "epoch": 0, "with_pixels": True, **options}
    return build_sample(entry, parent, CHARACTERS, settings, **arguments)


def test_pixels_and_image_ids_follow_the_list(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for name in ("1.png", "2.png"):
        pixels = generator.integers(0, 256, (40, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
    entry = record("<image><image>", "a", images=("1.png", "2.png"))
    sample = build(entry, tmp_path)
    expected = [preprocess(load_image(tmp_path / name), 28) for name in entry.images]
    np.testing.assert_array_equal(sample.pixel_values, np.stack(expected))
    assert sample.image_ids.tolist() == [320, 321]
    assert build(entry, tmp_path, with_pixels=False).pixel_values is None
    augmented = build(entry, tmp_path, data_augment=True)
    assert not np.array_equal(augmented.pixel_values, sample.pixel_values)
    again = build(entry, tmp_path, data_augment=True)
    np.testing.assert_array_equal(augmented.pixel_values, again.pixel_values)


def test_text_only_has_no_pixels_but_their_shape(tmp_path: Path) -> None:
    sample = build(record("q", "a"), tmp_path)
    assert sample.pixel_values.shape == (0, 3, 28, 28) and sample.image_ids.shape == (0,)


def test_a_picture_that_vanished_names_sample_and_path(tmp_path: Path) -> None:
    message = r"a\.jsonl:3 \(set 'tiny', id 'x'\): .*gone\.png: the image does not exist"
    with pytest.raises(DataError, match=message):
        build(record("q", "a", images=("gone.png",)), tmp_path)


def test_a_record_that_broke_names_its_place(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl:3 \(set 'tiny', id 'x'\): odd_turns: 1 turns"):
        build(record("q"), tmp_path)


def test_augmentation_that_fails_names_the_record(tmp_path: Path) -> None:
    Image.new("L", (70_000, 1)).save(tmp_path / "long.png")
    entry = record("<image>", "a", images=("long.png",))
    with pytest.raises(
        DataError, match=r"a\.jsonl:3 .*data_augment cannot make a JPEG of 70000 x 1"
    ):
        build(entry, tmp_path, data_augment=True)
    assert build(entry, tmp_path).pixel_values.shape == (1, 3, 28, 28)


def test_a_spelled_special_token_is_left_out_or_followed(tokenizer: Tokenizer) -> None:
    entry = record("What is <|im_start|>?", "A mark.")
    settings = SampleSettings(seq_length=256, image_size=28, embeddings_per_image=2)
    found = tokenize(entry, tokenizer, settings)
    assert isinstance(found, Rejection) and found.reason == Reason.LITERAL_SPECIAL_TOKEN
    found = tokenize(entry, tokenizer, replace(settings, special_literals="tokens"))
    assert isinstance(found, TokenizedSample)
    assert found.input_ids.tolist().count(tokenizer.im_start_id) == 4
