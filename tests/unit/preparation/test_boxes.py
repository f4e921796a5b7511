"""What is a box, and what it becomes."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmlm.errors import ConfigError, DataError
from mmlm.preparation.boxes import convert_boxes, convert_file
from tests.preparation_helpers import files_below, record


@pytest.mark.parametrize(
    ("text", "converted"),
    [
        ("[0.25, 0.1, 0.5, 1.0]", "<box>[[250, 100, 500, 1000]]</box>"),
        ("[0.57,0.29,0.58,0.30]", "<box>[[570, 290, 580, 300]]</box>"),
        ("[ .5 , 0.0, 1.000, 0.75 ]", "<box>[[500, 0, 1000, 750]]</box>"),
        ("[0.1234, 0.1235, 0.1245, 0.9996]", "<box>[[123, 124, 124, 1000]]</box>"),
        ("[x] [0.0, 0.0, 0.0, 0.0]]", "[x] <box>[[0, 0, 0, 0]]</box>]"),
        ("A [0.1, 0.2, 0.3, 0.4].", "A <box>[[100, 200, 300, 400]]</box>."),
        (
            "[0.1, 0.2, 0.3, 0.4] and [0.5, 0.5, 0.5, 0.5]",
            "<box>[[100, 200, 300, 400]]</box> and <box>[[500, 500, 500, 500]]</box>",
        ),
    ],
)
def test_boxes(text: str, converted: str) -> None:
    assert convert_boxes(text) == (converted, converted.count("<box>"), 0)


@pytest.mark.parametrize(
    "text",
    [
        "[0, 0, 1, 1]",
        "[0.1, 0.2, 0.3]",
        "[0.1, 0.2, 0.3, 0.4, 0.5]",
        "[0.1, 0.2, 0.3, 1.1]",
        "[0.1, 0.2, 0.3, 2.0]",
        "[-0.1, 0.2, 0.3, 0.4]",
        "[10.1, 0.2, 0.3, 0.4]",
        "[0.1, 0.2, 0.3, 4e-1]",
        "(0.1, 0.2, 0.3, 0.4)",
        "[[0.1, 0.2, 0.3, 0.4]]",
        "[ [0.1, 0.2, 0.3, 0.4] ]",
        "[[0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.4]]",
        "[boxes: [0.1, 0.2, 0.3, 0.4]]",
        "[0.1 0.2 0.3 0.4]",
        "<box>[[100, 200, 300, 400]]</box>",
        "x[0.1, 0.2, 0.3, ]",
    ],
)
def test_what_is_no_box_stays(text: str) -> None:
    assert convert_boxes(text) == (text, 0, 0)


@pytest.mark.parametrize("text", ["[0.5, 0.2, 0.3, 0.4]", "[0.1, 0.5, 0.3, 0.4]"])
def test_corners_in_the_wrong_order_are_counted(text: str) -> None:
    assert convert_boxes(text) == (text, 0, 1)


@given(st.lists(st.integers(0, 1000), min_size=4, max_size=4))
def test_thousandths_are_exact(numbers: list[int]) -> None:
    left, right = sorted(numbers[::2])
    top, bottom = sorted(numbers[1::2])
    text = "[" + ", ".join(f"{number / 1000:.3f}" for number in (left, top, right, bottom)) + "]"
    assert convert_boxes(text)[0] == f"<box>[[{left}, {top}, {right}, {bottom}]]</box>"


def test_file(tmp_path: Path) -> None:
    source, target = tmp_path / "a.jsonl", tmp_path / "plus" / "a.jsonl"
    box = "[0.1, 0.2, 0.3, 0.4]"
    lines = [
        record(0, "coco/1.jpg", f"Describe {box}.", "Ein Bär 熊."),
        record(1, "coco/1.jpg", "Where?", f"{box} or {box}"),
        '{"id":2,   "image":"x.jpg","conversations":[{"from":"human","value":"no box"}]}',
        record(3, None, f"text only {box}"),
        "",
        record(4, "coco/1.jpg", "Where?", "[0.9, 0.2, 0.3, 0.4]"),
    ]
    text = "\n".join(lines)  # the last line has no end
    source.write_text(text, encoding="utf-8")
    report = convert_file(source, target)
    assert source.read_text(encoding="utf-8") == text
    new = target.read_text(encoding="utf-8").split("\n")
    assert [new[k] == lines[k] for k in range(6)] == [False, False, True, True, True, True]
    converted = "<box>[[100, 200, 300, 400]]</box>"
    assert json.loads(new[0])["conversations"] == [
        {"from": "human", "value": f"<image>\nDescribe {converted}."},
        {"from": "gpt", "value": "Ein Bär 熊."},
    ]
    assert json.loads(new[1])["conversations"][1]["value"] == f"{converted} or {converted}"
    assert (report.num_records, report.num_changed, report.num_boxes) == (5, 2, 3)
    assert (report.num_left, report.first_left) == (1, f"{source}:6")
    assert convert_file(source, target) == report
    assert "\n".join(new) == target.read_text(encoding="utf-8")


def test_original_is_never_replaced(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text(record(0, "1.jpg"))
    (tmp_path / "link.jsonl").symlink_to(source)
    with pytest.raises(ConfigError, match="the converted copy would replace the original"):
        convert_file(source, tmp_path / "link.jsonl")


def test_broken_lines_are_named_and_copied(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    lines = [record(0, "1.jpg"), "{", '"[0.1, 0.2, 0.3, 0.4]"', record(1, "1.jpg")]
    source.write_text("\n".join(lines))
    report = convert_file(source, tmp_path / "b.jsonl")
    assert (tmp_path / "b.jsonl").read_bytes() == source.read_bytes()
    assert report.num_records == 4
    assert [message.partition(": ")[0] for message in report.broken] == [
        f"{source}:2",
        f"{source}:3",
    ]


def test_file_in_the_way_leaves_no_copy(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text(record(0, "1.jpg"))
    (tmp_path / "plus").write_text("in the way")
    with pytest.raises(DataError, match=r"plus/a.jsonl: cannot be written"):
        convert_file(source, tmp_path / "plus" / "a.jsonl")
    assert files_below(tmp_path) == ["a.jsonl", "plus"]
