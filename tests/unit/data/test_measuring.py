"""One chunk: sizes, ledger entries, pictures of records whose text is at fault, edited files."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmlm.data.annotation import file_stamp, read_meta, scan_lines
from mmlm.data.length_index import INDEX_DTYPE, identity_hash
from mmlm.data.measuring import Chunk, measure_chunk
from mmlm.data.rejection import Reason
from mmlm.data.sample import SampleSettings
from mmlm.data.tokenizer import Tokenizer
from mmlm.errors import DataError
from tests.tiny_data import conversation, write_set


def make_chunk(
    folder: Path,
    entries: list[dict[str, Any]],
    tokenizer: Tokenizer,
    settings: SampleSettings,
    **more: Any,
) -> Chunk:
    entry = read_meta(write_set(folder, entries, **more))[0]
    offsets, lines = scan_lines(entry.annotation)
    rows = np.zeros(len(lines), dtype=INDEX_DTYPE)
    rows["offset"], rows["line"] = offsets, lines
    return Chunk(
        annotation_set=entry,
        stamp=file_stamp(entry.annotation),
        tokenizer_folder=tokenizer.folder,
        settings=settings,
        rows=rows,
    )


def test_lengths_before_and_after_the_cut(
    tokenizer: Tokenizer, settings: SampleSettings, tmp_path: Path
) -> None:
    entries = [
        {"id": "short", "conversations": conversation("q", "a")},
        {"id": "long", "conversations": conversation("q", "a b " * 300)},
    ]
    chunk = make_chunk(tmp_path, entries, tokenizer, settings)
    measured = measure_chunk(chunk)  # reads the tokenizer itself, as a worker does
    short, long = measured.rows
    assert short["num_tokens"] == short["num_tokens_uncut"] < long["num_tokens"] == 256
    assert long["num_tokens_uncut"] > 600 and long["usable"] == 1
    assert short["identity"] == identity_hash("short") != long["identity"]
    (entry,) = measured.entries
    assert (entry.line, entry.identity, entry.reason) == (2, "long", Reason.LONGER_THAN_SEQ_LENGTH)
    assert entry.detail.startswith(f"{long['num_tokens_uncut']} tokens, cut at seq_length 256; ")
    assert not chunk.rows["num_tokens"].any()


def test_pictures_are_looked_at_even_where_the_text_is_at_fault(
    tokenizer: Tokenizer, settings: SampleSettings, tmp_path: Path
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    entries = [
        {"image": "gone.png", "conversations": conversation("<image>")},
        {"image": ["gone.png", "a.png", "away.png"], "conversations": conversation("q", "a")},
        {
            "image": ["gone.png", "a.png", "away.png"],
            "conversations": conversation("<image>" * 3, "a"),
        },
    ]
    measured = measure_chunk(make_chunk(tmp_path, entries, tokenizer, settings), tokenizer)
    assert [entry.reason for entry in measured.entries] == [
        Reason.ODD_TURNS,
        Reason.IMAGE_COUNT,
        Reason.IMAGE_UNREADABLE,
    ]
    assert "; also " in measured.entries[0].detail
    for entry in measured.entries[1:]:
        assert entry.detail.count("the image does not exist") == 2
    assert not measured.rows["usable"].any() and not measured.rows["num_tokens"].any()


def test_pictures_after_the_cut_are_not_opened(
    tokenizer: Tokenizer, settings: SampleSettings, tmp_path: Path
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    long = conversation("<image>", "a", "a b " * 300 + "<image>", "b")
    entries = [{"image": ["a.png", "gone.png"], "conversations": long}]
    measured = measure_chunk(make_chunk(tmp_path, entries, tokenizer, settings), tokenizer)
    assert measured.rows["num_images"].tolist() == [1] and measured.rows["usable"].all()
    assert measured.entries[0].detail.endswith(
        "the cut takes 2 of 4 supervised tokens and 1 of 2 images"
    )


@pytest.mark.parametrize("data_augment", [False, True])
def test_a_picture_too_long_for_a_jpeg_is_refused_where_the_set_augments(
    data_augment: bool, tokenizer: Tokenizer, settings: SampleSettings, tmp_path: Path
) -> None:
    Image.new("RGB", (66_000, 2)).save(tmp_path / "a.png")
    entries = [{"image": "a.png", "conversations": conversation("<image>", "a")}]
    chunk = make_chunk(tmp_path, entries, tokenizer, settings, data_augment=data_augment)
    measured = measure_chunk(chunk, tokenizer)
    assert measured.rows["usable"].tolist() == [not data_augment]
    assert [entry.reason for entry in measured.entries] == [Reason.IMAGE_UNREADABLE] * data_augment
    assert all("a.png: data_augment cannot make" in entry.detail for entry in measured.entries)


@pytest.mark.parametrize("change", ["edit", "remove"])
def test_a_file_that_changes_meanwhile_is_named(
    change: str, tokenizer: Tokenizer, settings: SampleSettings, tmp_path: Path
) -> None:
    chunk = make_chunk(tmp_path, [{"conversations": conversation("q", "a")}], tokenizer, settings)
    path = chunk.annotation_set.annotation
    path.unlink() if change == "remove" else path.write_text("{}")
    words = {"remove": "cannot read the annotation file", "edit": "changed while it was measured"}
    with pytest.raises(DataError, match=rf"tiny\.jsonl: .*{words[change]}"):
        measure_chunk(chunk, tokenizer)
