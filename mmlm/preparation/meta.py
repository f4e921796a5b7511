"""Stage ``meta``: the json that names the sets, with the lengths that the files really have."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmlm.data.annotation import read_meta, scan_lines
from mmlm.errors import ConfigError, DataError
from mmlm.log import get_logger
from mmlm.preparation.boxes import convert_file
from mmlm.preparation.files import replacing
from mmlm.preparation.layout import Playground
from mmlm.preparation.sources import PUBLISHED_SETS, SETS_WITH_BOXES, PublishedSet

META_NAME = "internvl_1_2_finetune.json"
META_NAME_PLUS = "internvl_1_2_plus_finetune.json"


@dataclass(frozen=True, kw_only=True)
class MetaEntry:
    """One set of a meta json."""

    name: str
    """Its key."""
    annotation: Path
    """The jsonl file."""
    root: str
    """Folder that image paths start from, as it is to be written."""
    num_published: int | None = None
    """Lines that the published file has."""


def published_entries(
    playground: Playground, sets: Sequence[PublishedSet] = PUBLISHED_SETS, *, plus_boxes: bool
) -> tuple[MetaEntry, ...]:
    """Return entries for published sets; with ``plus_boxes`` the converted copies are made.

    Args:
        playground: the folders.
        sets: which of the nine.
        plus_boxes: boxes as V1-2-Plus has them, in copies below ``opensource/plus/``.

    Raises:
        DataError: annotation files are missing.
    """
    missing = [f"{one.name}.jsonl" for one in sets if not playground.annotation(one.name).is_file()]
    if missing:
        raise DataError(
            f"{playground.annotations}: there is no {', '.join(missing)}; "
            "fetch the annotations (stages download and unpack), or name the sets that you want "
            "with --only"
        )
    entries = []
    for one in sets:
        annotation = playground.annotation(one.name)
        if plus_boxes and one.name in SETS_WITH_BOXES:
            source, annotation = annotation, playground.annotations / "plus" / annotation.name
            _convert(source, annotation)
        entries.append(
            MetaEntry(
                name=one.name,
                annotation=annotation,
                root=f"{playground.data.as_posix()}/{one.root}",
                num_published=one.num_samples,
            )
        )
    return tuple(entries)


def _convert(source: Path, target: Path) -> None:
    report = convert_file(source, target)
    get_logger(__name__).info(
        "%s: %d boxes converted in %d of %d lines; %d left as they are%s",
        target,
        report.num_boxes,
        report.num_changed,
        report.num_records,
        report.num_left,
        f" (corners in the wrong order), the first at {report.first_left}"
        if report.num_left
        else "",
    )
    if report.broken:
        get_logger(__name__).warning(
            "%s: %d lines cannot be read and are copied as they are, the first: %s",
            target,
            len(report.broken),
            report.broken[0],
        )


def write_meta(path: Path, entries: Sequence[MetaEntry]) -> int:
    """Count the lines of each set and write the meta json.

    Args:
        path: the file, replaced if it is there.
        entries: the sets, in order.

    Returns:
        The number of samples of all sets.

    Raises:
        ConfigError: no set, or two of one name.
        DataError: an annotation file is missing or empty.
    """
    names = [entry.name for entry in entries]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not names:
        what = f"two sets are called '{twice[0]}'" if twice else "there is no set to write"
        raise ConfigError(f"{path}: {what}; every set needs a name of its own")
    meta = {}
    for entry in entries:
        length = _count(entry)
        if entry.num_published is not None and length != entry.num_published:
            get_logger(__name__).warning(
                "%s: %d lines, but the published file of set '%s' has %d; is it complete?",
                entry.annotation,
                length,
                entry.name,
                entry.num_published,
            )
        meta[entry.name] = {
            "root": entry.root,
            "annotation": entry.annotation.as_posix(),
            "data_augment": False,
            "repeat_time": 1,
            "length": length,
        }
    with replacing(path) as file:
        file.write(json.dumps(meta, indent=2, ensure_ascii=False).encode() + b"\n")
    read_meta(path)  # what is written can be read
    return sum(one["length"] for one in meta.values() if isinstance(one["length"], int))


def _count(entry: MetaEntry) -> int:
    try:
        length = len(scan_lines(entry.annotation)[0])
    except OSError as error:
        raise DataError(
            f"{entry.annotation}: cannot read the annotation file of set '{entry.name}' "
            f"({error.strerror})"
        ) from error
    if length == 0:
        raise DataError(
            f"{entry.annotation}: the annotation file of set '{entry.name}' has no line; fill it "
            "or leave the set out"
        )
    return length
