"""The meta json that names the sets, and the json lines of each set.

A set is one annotation file. Sets are concatenated in the order of the meta's keys; a set with
``repeat_time`` r below 1 gives its first int(N * r) records, an integer above 1 repeats the whole
list. Blank lines are not records, but they count in line numbers.
"""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mmlm.errors import DataError

IntArray = npt.NDArray[np.int64]

FileStamp = tuple[int, int]
"""Size in bytes and time of the last change in nanoseconds: tells whether a file was edited."""

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_META_KEYS = ("root", "annotation", "data_augment", "repeat_time", "length")


@dataclass(frozen=True, kw_only=True)
class AnnotationSet:
    """One entry of the meta json."""

    name: str
    """Key in the meta json."""
    root: Path
    """Folder that image paths start from."""
    annotation: Path
    """The jsonl file."""
    data_augment: bool = False
    """Re-encode pictures as JPEG of random quality before the resize."""
    repeat_time: float = 1
    """Below 1: the share of records that is used; an integer above 1: times the list is used."""
    length: int | None = None
    """Number of records that the meta promises, if it does."""

    @property
    def repeats(self) -> int:
        """How many times the used records appear in an epoch."""
        return max(1, int(self.repeat_time))

    def num_used(self, num_records: int) -> int:
        """Return how many of the file's first records are used, before repeating."""
        return int(num_records * self.repeat_time) if self.repeat_time < 1 else num_records


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One entry of ``conversations``."""

    role: str
    """``human``, ``gpt`` or whatever the file says."""
    text: str
    """As in the file, never stripped."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One line of a jsonl file."""

    file: Path
    """The jsonl file."""
    line: int
    """Line number, from 1."""
    identity: str
    """The record's own ``id``, or an empty string."""
    images: tuple[str, ...]
    """Image paths below the set's root; empty for text only."""
    turns: tuple[Turn, ...]
    """The conversation as it stands in the file."""

    @property
    def place(self) -> str:
        """Where the record stands: ``file:line``."""
        return f"{self.file}:{self.line}"


def read_meta(path: str | Path) -> tuple[AnnotationSet, ...]:
    """Read the meta json.

    Args:
        path: a json file ``{set name: {root, annotation, data_augment, repeat_time, length}}``.

    Returns:
        The sets in the order of the keys.

    Raises:
        DataError: the file or an annotation file is missing, or an entry breaks a rule.
    """
    path = Path(path)
    try:
        meta = json.loads(path.read_bytes(), object_pairs_hook=_without_doubles)
    except OSError as error:
        raise DataError(
            f"{path}: cannot read the meta json ({error.strerror}); set data.meta to a file"
        ) from error
    except ValueError as error:
        raise DataError(f"{path}: the meta is not valid JSON ({error}); mend the file") from error
    except _DoubleKey as error:
        raise DataError(
            f"{path}: the key '{error}' stands twice in one object; only the last would count, "
            "rename or remove one"
        ) from error
    if not isinstance(meta, dict) or not meta:
        raise DataError(f"{path}: the meta must be a JSON object with at least one set")
    return tuple(_parse_set(path, name, entry) for name, entry in meta.items())


class _DoubleKey(Exception):
    """A key of a JSON object that stands there twice."""


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _DoubleKey(key)
        found[key] = value
    return found


def _parse_set(path: Path, name: str, entry: Any) -> AnnotationSet:
    place = f"{path}: set '{name}'"
    if not isinstance(entry, dict):
        raise DataError(f"{place}: must be an object with the keys {', '.join(_META_KEYS)}")
    for key in entry:
        if key not in _META_KEYS:
            raise DataError(f"{place}: unknown key '{key}'; known are {', '.join(_META_KEYS)}")
    for key in ("root", "annotation"):
        if not isinstance(entry.get(key), str):
            raise DataError(f"{place}: '{key}' must be given, as text")
    repeat_time = entry.get("repeat_time", 1)
    number = isinstance(repeat_time, int | float) and not isinstance(repeat_time, bool)
    if not number or repeat_time <= 0 or (repeat_time > 1 and repeat_time != int(repeat_time)):
        raise DataError(
            f"{place}: repeat_time {repeat_time!r} must be a share between 0 and 1 or a whole "
            "number; remove the set to leave it out"
        )
    data_augment = entry.get("data_augment", False)
    if not isinstance(data_augment, bool):
        raise DataError(f"{place}: data_augment {data_augment!r} must be true or false")
    length = entry.get("length")
    if length is not None and (not isinstance(length, int) or isinstance(length, bool)):
        raise DataError(f"{place}: length {length!r} must be a whole number")
    annotation = Path(entry["annotation"])
    if not annotation.is_file():
        raise DataError(
            f"{place}: annotation file {annotation} does not exist; relative paths start at the "
            "working directory"
        )
    return AnnotationSet(
        name=name,
        root=Path(entry["root"]),
        annotation=annotation,
        data_augment=data_augment,
        repeat_time=repeat_time,
        length=length,
    )


def scan_lines(path: Path) -> tuple[IntArray, IntArray]:
    """Find the records of a jsonl file without parsing them.

    Args:
        path: the jsonl file.

    Returns:
        Byte offset and line number (from 1) of every line that is not blank, int64 [n] each.
    """
    offsets, lines = [], []
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                offsets.append(offset)
                lines.append(number)
            offset += len(line)
    return np.array(offsets, dtype=np.int64), np.array(lines, dtype=np.int64)


def file_stamp(path: Path) -> FileStamp:
    """Return what changes when ``path`` is edited.

    Raises:
        DataError: the file is gone.
    """
    try:
        return _stamp(path.stat())
    except OSError as error:
        raise DataError(
            f"{path}: cannot read the annotation file ({error.strerror}); the meta json names it"
        ) from error


def read_line(path: Path, offset: int, stamp: FileStamp | None = None) -> bytes:
    """Return the line of ``path`` that starts at byte ``offset`` (one seek).

    Args:
        path: the jsonl file.
        offset: bytes.
        stamp: of the file as it was measured; None for a file that is not known yet.

    Raises:
        DataError: the file is gone, or was edited since.
    """
    try:
        with path.open("rb") as file:
            if stamp is not None and _stamp(os.fstat(file.fileno())) != stamp:
                raise DataError(
                    f"{path}: the annotation file changed during the run; start again, and its "
                    "length index will be built anew"
                )
            file.seek(offset)
            return file.readline()
    except OSError as error:
        raise DataError(
            f"{path}: cannot read the annotation file ({error.strerror}); it was there when the "
            "length index was built"
        ) from error


def _stamp(status: os.stat_result) -> FileStamp:
    return status.st_size, status.st_mtime_ns


def parse_record(text: bytes, *, file: Path, line: int) -> Record:
    """Parse one json line.

    Args:
        text: the line.
        file: where it is from, for messages.
        line: its number, from 1, for messages.

    Returns:
        The record; roles and texts are not judged here.

    Raises:
        DataError: not JSON, or not of the published form.
    """
    place = f"{file}:{line}"
    try:
        # strictly: json itself lets the bytes of half a surrogate pair pass
        entry = json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{place}: not valid JSON ({error}); every line must be one JSON object, mend or "
            "remove it"
        ) from error
    if _SURROGATE.search(text):
        try:
            json.dumps(entry, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{place}: half a character ({error.reason}, such as \\ud83d without its other "
                "half); rewrite the text"
            ) from error
    if not isinstance(entry, dict):
        raise DataError(f"{place}: must be a JSON object, not {type(entry).__name__}")
    identity = entry.get("id")
    return Record(
        file=file,
        line=line,
        identity="" if identity is None else str(identity),
        images=_parse_images(place, entry.get("image")),
        turns=_parse_turns(place, entry.get("conversations")),
    )


def _parse_images(place: str, image: Any) -> tuple[str, ...]:
    if image is None or image == "" or image == []:
        return ()
    images = image if isinstance(image, list) else [image]
    if not all(isinstance(name, str) and name for name in images):
        raise DataError(f"{place}: 'image' must be a path or a list of paths, found {image!r}")
    return tuple(images)


def _parse_turns(place: str, conversations: Any) -> tuple[Turn, ...]:
    if not isinstance(conversations, list):
        raise DataError(f"{place}: 'conversations' must be given, as a list of turns")
    turns = []
    for number, turn in enumerate(conversations):
        fields = turn if isinstance(turn, dict) else {}
        role, text = fields.get("from"), fields.get("value")
        if not isinstance(role, str) or not isinstance(text, str):
            raise DataError(
                f"{place}: conversations[{number}] must be an object with 'from' and 'value', "
                "both text"
            )
        turns.append(Turn(role=role, text=text))
    return tuple(turns)
