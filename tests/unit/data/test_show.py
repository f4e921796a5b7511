"""Samples and rows as text: what is trained on is marked, and data cannot steer a terminal."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmlm.data.lookup import Lookup
from mmlm.data.sample import SampleSettings
from mmlm.data.show import escape, format_row, format_sample
from mmlm.data.strip import Segment
from mmlm.data.tokenizer import Tokenizer
from tests.tiny_data import conversation, write_set

ANSWER = "The square\nis red."


@pytest.fixture
def meta(tmp_path: Path) -> Path:
    for name in ("1.png", "2.png"):
        Image.new("L", (40, 30), 90).save(tmp_path / name)
    two = conversation("First <image> second <image>.", ANSWER, "And?", "\x1b[2Jblue")
    entries = [
        {"id": "two", "image": ["1.png", "2.png"], "conversations": two},
        {"id": "\x1b]0;x\x07", "conversations": conversation("<img>", "a\tb")},
        {"id": "lost", "image": "3.png", "conversations": conversation("What?", "That.")},
    ]
    path = write_set(tmp_path, entries)
    (tmp_path / "tiny.jsonl").write_text((tmp_path / "tiny.jsonl").read_text() + "[]\n")
    return path


def shown(
    meta: Path, tokenizer: Tokenizer, settings: SampleSettings, sample_id: int, **options: bool
) -> str:
    lookup = Lookup(meta)
    look = lookup.look(sample_id, tokenizer, settings)
    return format_sample(look, tokenizer, settings, num_samples=lookup.num_samples, **options)


def test_a_sample_as_the_model_sees_it(
    meta: Path, tokenizer: Tokenizer, settings: SampleSettings, tmp_path: Path
) -> None:
    text = shown(meta, tokenizer, settings, 0)
    assert "\x1b" not in text
    lines = text.split("\n")
    assert lines[0] == "sample 0 of 4: set 'tiny', id 'two'"
    assert lines[1].endswith("tiny.jsonl:1")
    assert f"  image 0   {tmp_path / '1.png'}" in lines
    look = Lookup(meta).look(0, tokenizer, settings)
    assert look.tokens is not None
    first, second = look.tokens.image_positions.reshape(2, 4)[:, 0].tolist()
    assert f"            40 x 30 PNG L -> 56 x 56; tokens {first} to {first + 3}" in lines
    assert f"            40 x 30 PNG L -> 56 x 56; tokens {second} to {second + 3}" in lines
    trained = look.tokens.num_supervised_tokens
    length = len(look.tokens.input_ids)
    assert (
        f"  tokens    {length} (at most 256): 8 of images, {length - 8} of text; "
        f"{trained} are trained on"
    ) in lines
    assert [line for line in lines if line.startswith("    + ")] == [
        "    + The square",
        "    + is red.<|im_end|>",
        "    + \\x1b[2Jblue<|im_end|>",
    ]
    assert "      [image 1: 4 x <IMG_CONTEXT>]" in lines
    assert "      </img> second <img>" in lines


def test_colours_mark_what_is_trained_on(
    meta: Path, tokenizer: Tokenizer, settings: SampleSettings
) -> None:
    text = shown(meta, tokenizer, settings, 0, color=True)
    assert "    + \x1b[32mThe square\x1b[0m\n" in text
    assert "      \x1b[36m[image 0: 4 x <IMG_CONTEXT>]\x1b[0m" in text
    plain = text
    for code in ("\x1b[32m", "\x1b[36m", "\x1b[0m"):
        plain = plain.replace(code, "")
    assert plain == shown(meta, tokenizer, settings, 0)


def test_one_token_a_line(meta: Path, tokenizer: Tokenizer, settings: SampleSettings) -> None:
    lines = shown(meta, tokenizer, settings, 0, list_tokens=True).split("\n")
    look = Lookup(meta).look(0, tokenizer, settings)
    assert look.tokens is not None
    table = [line.split() for line in lines[lines.index("") + 2 :]]
    assert [int(row[0]) for row in table] == list(range(len(look.tokens.input_ids)))
    assert [int(row[1]) for row in table] == look.tokens.input_ids.tolist()
    labels = [-100 if row[-1] == "-" else int(row[-1]) for row in table]
    assert labels == look.tokens.labels.tolist()
    marked = [int(row[0]) for row in table if row[2] == "+" and len(row) == 5]
    assert marked == (np.flatnonzero(look.tokens.labels != -100) + 1).tolist()


@pytest.mark.parametrize(
    ("sample_id", "reason", "also"),
    [
        (1, "literal_special_token: turn 0", "    human: <img>"),
        (2, "image_unreadable", "    + That.<|im_end|>"),
        (3, "malformed_record: must be a JSON object", "sample 3 of 4: set 'tiny'"),
    ],
)
def test_a_sample_that_is_left_out_says_why(
    meta: Path,
    tokenizer: Tokenizer,
    settings: SampleSettings,
    sample_id: int,
    reason: str,
    also: str,
) -> None:
    text = shown(meta, tokenizer, settings, sample_id)
    assert f"  left out  {reason}" in text
    assert also in text
    assert "\x1b" not in text and "\x07" not in text


def test_what_was_cut_or_changed_is_said(meta: Path, tokenizer: Tokenizer) -> None:
    settings = SampleSettings(seq_length=44, image_size=56, embeddings_per_image=4)
    for seq_length in range(40, 80):
        settings = SampleSettings(seq_length=seq_length, image_size=56, embeddings_per_image=4)
        text = shown(meta, tokenizer, settings, 0)
        if "left out" not in text:
            break
    assert f"  tokens    {seq_length}, cut from " in text
    assert "  remark    longer_than_seq_length: " in text


def test_control_characters_are_spelled_out() -> None:
    assert escape("a\x1b[0m\x07\r\n\u200b é 红🙂") == "a\\x1b[0m\\x07\\r\n\\u200b é 红🙂"


def test_a_row_is_a_table(meta: Path, tokenizer: Tokenizer, settings: SampleSettings) -> None:
    look = Lookup(meta).look(0, tokenizer, settings)
    assert look.tokens is not None and look.images is not None
    segments = [
        Segment(sample_id=number, tokens=look.tokens, images=look.images, weight=0.125)
        for number in (7, 1234567)
    ]
    length = len(look.tokens.input_ids)
    lines = format_row("a title", segments, 256).split("\n")
    assert lines[0] == "a title"
    trained = look.tokens.num_supervised_tokens
    assert lines[2].split() == ["0", f"{length - 1}", "7", f"{length}", f"{trained}", "2", "0.125"]
    assert lines[3].split()[:3] == [f"{length}", f"{2 * length - 1}", "1234567"]
    assert lines[4] == f"  {2 * length} of 256 tokens, {2 * length / 256:.1%}"
