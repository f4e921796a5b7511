"""Meta json and json lines: what is read, and what each broken file says."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from mmlm.data.annotation import (
    AnnotationSet,
    Turn,
    file_stamp,
    parse_record,
    read_line,
    read_meta,
    scan_lines,
)
from mmlm.errors import DataError


def write_meta(folder: Path, content: Any) -> Path:
    (folder / "a.jsonl").write_text("{}\n")
    path = folder / "meta.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def entry(folder: Path, **fields: Any) -> dict[str, Any]:
    return {"root": "pictures", "annotation": str(folder / "a.jsonl"), **fields}


def parse(text: str | dict[str, Any]) -> Any:
    line = text if isinstance(text, str) else json.dumps(text)
    return parse_record(line.encode(), file=Path("a.jsonl"), line=7)


def test_sets_keep_the_order_of_the_keys(tmp_path: Path) -> None:
    meta = {
        "z": entry(tmp_path, data_augment=True, repeat_time=2, length=5),
        "a": entry(tmp_path),
    }
    first, second = read_meta(write_meta(tmp_path, meta))
    assert (first.name, first.root, first.data_augment) == ("z", Path("pictures"), True)
    assert (first.repeats, first.length) == (2, 5)
    assert (second.name, second.data_augment, second.repeats) == ("a", False, 1)
    assert second.length is None


@pytest.mark.parametrize(
    ("repeat_time", "used", "repeats"), [(0.5, 3, 1), (0.99, 6, 1), (1, 7, 1), (3, 7, 3)]
)
def test_repeat_time_is_a_share_or_a_number_of_times(
    repeat_time: float, used: int, repeats: int
) -> None:
    entry = AnnotationSet(name="a", root=Path(), annotation=Path(), repeat_time=repeat_time)
    assert (entry.num_used(7), entry.repeats) == (used, repeats)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"meta\.json: the meta is not valid JSON"),
        ([], "must be a JSON object with at least one set"),
        ({}, "must be a JSON object with at least one set"),
        ({"a": 1}, "set 'a': must be an object with the keys root, annotation"),
        ({"a": {"annotation": "a"}}, "set 'a': 'root' must be given"),
        ({"a": {"root": "a"}}, "set 'a': 'annotation' must be given"),
        ({"a": {"root": "a", "annotation": "no.jsonl"}}, "annotation file no.jsonl does not exist"),
        ({"a": {"root": "", "annotation": "", "repeat": 1}}, "unknown key 'repeat'; known are"),
        ({"a": {"root": "", "annotation": "", "repeat_time": 1.5}}, "repeat_time 1.5 must be"),
        ({"a": {"root": "", "annotation": "", "repeat_time": 0}}, "repeat_time 0 must be"),
        ({"a": {"root": "", "annotation": "", "repeat_time": "2"}}, "repeat_time '2' must be"),
        ({"a": {"root": "", "annotation": "", "data_augment": 1}}, "data_augment 1 must be true"),
        ({"a": {"root": "", "annotation": "", "length": 1.5}}, "length 1.5 must be a whole"),
    ],
)
def test_a_broken_meta_says_what_to_change(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_meta(write_meta(tmp_path, content))


def test_a_key_that_stands_twice_in_the_meta_is_named(tmp_path: Path) -> None:
    one = json.dumps(entry(tmp_path))
    for content, key in (
        (f'{{"a": {one}, "b": {one}, "a": {one}}}', "a"),
        (f'{{"a": {one[:-1]}, "root": "other"}}}}', "root"),
    ):
        with pytest.raises(DataError, match=rf"meta\.json: the key '{key}' stands twice .*rename"):
            read_meta(write_meta(tmp_path, content))


def test_a_missing_meta_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no\.json: cannot read the meta json"):
        read_meta(tmp_path / "no.json")


def test_offsets_point_at_lines_and_blank_lines_only_count(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"id": "红"}\n\n  \n{"id": 2}'.encode())
    offsets, lines = scan_lines(path)
    assert lines.tolist() == [1, 4]
    assert [json.loads(read_line(path, offset))["id"] for offset in offsets.tolist()] == ["红", 2]


def test_an_annotation_file_that_vanished_is_named(tmp_path: Path) -> None:
    for read in (lambda path: read_line(path, 0), file_stamp):
        with pytest.raises(DataError, match=r"gone\.jsonl: cannot read the annotation file"):
            read(tmp_path / "gone.jsonl")


def test_a_line_is_read_only_from_the_file_that_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("{}\n")
    stamp = file_stamp(path)
    assert read_line(path, 0, stamp) == b"{}\n"
    os.utime(path, (1, 1))
    assert read_line(path, 0) == b"{}\n"
    with pytest.raises(DataError, match=r"a\.jsonl: the annotation file changed during the run"):
        read_line(path, 0, stamp)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (None, ()),
        ("", ()),
        ([], ()),
        ("a.png", ("a.png",)),
        (["a.png", "b.png"], ("a.png", "b.png")),
    ],
)
def test_image_may_be_absent_empty_a_path_or_a_list(image: Any, expected: tuple[str, ...]) -> None:
    assert parse({"image": image, "conversations": []}).images == expected
    assert parse({"conversations": []}).images == ()


def test_an_id_may_be_absent_or_null() -> None:
    assert parse({"conversations": []}).identity == ""
    assert parse({"id": None, "conversations": []}).identity == ""
    assert parse({"id": 0, "conversations": []}).identity == "0"


def test_a_record_keeps_its_text_as_it_stands() -> None:
    record = parse({"id": 3, "conversations": [{"from": "human", "value": " 你好\n"}]})
    assert record.turns == (Turn(role="human", text=" 你好\n"),)
    assert (record.identity, record.place) == ("3", "a.jsonl:7")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{'id': 1}", r"a\.jsonl:7: not valid JSON .* mend or remove it"),
        ("[" * 100_000, r"a\.jsonl:7: not valid JSON"),
        ("[1]", r"a\.jsonl:7: must be a JSON object, not list"),
        ({"image": 3, "conversations": []}, "'image' must be a path or a list of paths, found 3"),
        ({"image": ["a", ""], "conversations": []}, "'image' must be a path or a list of paths"),
        ({"id": 1}, r"a\.jsonl:7: 'conversations' must be given"),
        ({"conversations": ["hi"]}, r"conversations\[0\] must be an object with 'from'"),
        ({"conversations": [{"from": "human", "value": 1}]}, r"conversations\[0\] must be"),
    ],
)
def test_a_broken_line_is_named_with_its_number(text: str | dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse(text)


def test_half_a_character_is_refused_and_a_whole_one_is_not() -> None:
    """JSON can spell half of a surrogate pair, which no file and no tokenizer can hold."""
    text = b'{"id": "%s", "conversations": [{"from": "human", "value": "a %s b"}]}'
    pair = b"\\ud83d\\uDE42"
    record = parse_record(text % (b"x", pair), file=Path("a.jsonl"), line=3)
    assert record.turns[0].text == "a 🙂 b"
    for fields in ((b"x", b"\\ud83d"), (b"\\uDE42", b"y")):
        with pytest.raises(DataError, match=r"a\.jsonl:3: half a character .*rewrite the text"):
            parse_record(text % fields, file=Path("a.jsonl"), line=3)


def test_bytes_that_are_not_utf8_are_refused_and_a_byte_order_mark_is_not() -> None:
    line = b'{"conversations": [{"from": "human", "value": "a%s"}]}'
    for broken in (b"\xed\xa0\xbd", b"\xff"):  # the bytes of half a surrogate pair; no UTF-8
        with pytest.raises(DataError, match=r"a\.jsonl:3: not valid JSON \('utf-8' codec"):
            parse_record(line % broken, file=Path("a.jsonl"), line=3)
    record = parse_record(b"\xef\xbb\xbf" + line % b"", file=Path("a.jsonl"), line=3)
    assert record.turns[0].text == "a"
