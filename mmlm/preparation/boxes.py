"""Boxes of V1-2-Plus: ``[0.25, 0.1, 0.5, 1.0]`` becomes ``<box>[[250, 100, 500, 1000]]</box>``.

V1-2 trains on the boxes as LLaVA 1.5 wrote them; V1-2-Plus on whole numbers of 0-1000 between
``<box>`` tokens. What is taken for a box, in the text of any turn of a record that has a picture:

- four numbers with commas between them, in one pair of square brackets, blanks allowed;
- each written with a decimal point and within 0-1: ``0.25``, ``.5``, ``0.0``, ``1.0``. Whole
  numbers are not coordinates of this kind;
- not inside further brackets (``[[...]]`` is a matrix, or converted already);
- x1 <= x2 and y1 <= y2, otherwise it is counted as left.

Numbers are multiplied exactly, as decimals, and rounded to the nearest whole number (a half to the
even one). Everything else in the line stays as it is; a line without a box is copied byte by byte.
"""

import json
import re
from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, Decimal
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mmlm.data.annotation import parse_record
from mmlm.errors import ConfigError, DataError
from mmlm.preparation.files import replacing

_NUMBER = r"\s*(0?\.\d+|1\.0+)\s*"
_FLAT = r"[^\[\]]*"
_NESTED = rf"\[{_FLAT}\[{_FLAT}\](?:{_FLAT}\[{_FLAT}\])*{_FLAT}\]"  # consumed first, to be left
_BOX = re.compile(rf"{_NESTED}|\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]")


@dataclass(frozen=True, kw_only=True)
class BoxReport:
    """What was converted in a file."""

    num_records: int
    """Lines that are not blank."""
    num_changed: int
    """Lines with at least one box."""
    num_boxes: int
    """Boxes that were converted."""
    num_left: int
    """Four numbers in brackets that are no box: their corners are in the wrong order."""
    first_left: str
    """Where the first of those stands, empty without any."""
    broken: tuple[str, ...]
    """Lines that cannot be read, with the reason; they are copied as they are."""


def convert_boxes(text: str) -> tuple[str, int, int]:
    """Convert the boxes of one text.

    Args:
        text: a turn.

    Returns:
        The text, the number of boxes in it, and the number of those that were left.
    """
    num_boxes, num_left = 0, 0

    def convert(match: re.Match[str]) -> str:
        nonlocal num_boxes, num_left
        if match.lastindex is None:
            return match.group()
        left, top, right, bottom = (
            int((Decimal(number) * 1000).to_integral_value(ROUND_HALF_EVEN))
            for number in match.groups()
        )
        if left > right or top > bottom:
            num_left += 1
            return match.group()
        num_boxes += 1
        return f"<box>[[{left}, {top}, {right}, {bottom}]]</box>"

    return _BOX.sub(convert, text), num_boxes, num_left


def convert_file(source: Path, target: Path) -> BoxReport:
    """Write a copy of an annotation file with boxes converted.

    Args:
        source: the published jsonl file; it is not touched.
        target: the copy, replaced if it is there.

    Raises:
        ConfigError: ``target`` is ``source``.
    """
    if target.resolve() == source.resolve():
        raise ConfigError(
            f"{target}: the converted copy would replace the original; choose another"
        )
    num_records, num_changed, num_boxes, num_left, first_left = 0, 0, 0, 0, ""
    broken = []
    with (
        source.open("rb") as lines,
        replacing(target) as file,
        tqdm(desc=target.name, total=source.stat().st_size, unit="B", unit_scale=True) as bar,
    ):
        for number, line in enumerate(lines, start=1):
            bar.update(len(line))
            if line.strip():
                num_records += 1
                try:
                    has_picture = bool(parse_record(line, file=source, line=number).images)
                except DataError as error:
                    broken.append(str(error))
                    has_picture = False
                if has_picture:
                    line, boxes, left = _convert_line(line)
                    num_changed += boxes > 0
                    num_boxes += boxes
                    num_left += left
                    first_left = first_left or (f"{source}:{number}" if left else "")
            file.write(line)
    return BoxReport(
        num_records=num_records,
        num_changed=num_changed,
        num_boxes=num_boxes,
        num_left=num_left,
        first_left=first_left,
        broken=tuple(broken),
    )


def _convert_line(line: bytes) -> tuple[bytes, int, int]:
    entry: dict[str, Any] = json.loads(line)
    num_boxes, num_left = 0, 0
    for turn in entry["conversations"]:
        turn["value"], boxes, left = convert_boxes(turn["value"])
        num_boxes += boxes
        num_left += left
    if num_boxes == 0:
        return line, 0, num_left
    text = json.dumps(entry, ensure_ascii=False)
    return text.encode() + b"\n", num_boxes, num_left
