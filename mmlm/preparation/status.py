"""Stage ``status``: what is there and what is missing, as a table."""

from collections.abc import Sequence
from dataclasses import dataclass

from mmlm.preparation.layout import Playground
from mmlm.preparation.references import SetReferences, missing_images, read_references
from mmlm.preparation.sources import IMAGE_FOLDERS, PUBLISHED_SETS, PublishedSet

_ELSEWHERE = "(elsewhere)"
_NUM_LISTED = 5


@dataclass(frozen=True, kw_only=True)
class Status:
    """The state of a playground."""

    text: str
    """For people."""
    complete: bool
    """Every line and every picture of the sets is there."""


def look(playground: Playground, sets: Sequence[PublishedSet] = PUBLISHED_SETS) -> Status:
    """Compare what the annotations name with what is there.

    Args:
        playground: the folders.
        sets: which of the nine.

    Returns:
        A table of sets, a table of folders, and whether anything is missing.
    """
    found = {one.published.name: one for one in read_references(playground, sets)}
    named = frozenset[str]().union(*(one.images for one in found.values()))
    missing = frozenset(missing_images(playground.data, named))
    set_rows = [_set_row(one, found.get(one.name), missing) for one in sets]
    folder_rows = _folder_rows(named, missing)
    broken = [message for one in found.values() for message in one.broken]
    complete = not missing and not broken and all(row[-1] == "complete" for row in set_rows)
    parts = [
        _table(("set", "lines", "published", "pictures", "missing", "state"), set_rows),
        _table(("folder below data/", "named", "missing", "for example"), folder_rows),
    ]
    if broken:
        listed = "\n".join(f"  {message}" for message in broken[:_NUM_LISTED])
        parts.append(f"{len(broken)} lines cannot be read, the first of them:\n{listed}")
    parts.append(
        "complete: every line and every picture is there"
        if complete
        else "not complete: docs/data.md says which stage brings what"
    )
    return Status(text="\n\n".join(part for part in parts if part), complete=complete)


def _set_row(
    published: PublishedSet, found: SetReferences | None, missing: frozenset[str]
) -> tuple[str, ...]:
    expected = f"{published.num_samples:,}"
    if found is None:
        return (published.name, "-", expected, "-", "-", "no annotations")
    num_missing = len(found.images & missing)
    if found.num_records != published.num_samples:
        state = "other count"
    elif found.broken:
        state = "broken lines"
    else:
        state = "pictures missing" if num_missing else "complete"
    counts = (f"{found.num_records:,}", expected, f"{len(found.images):,}", f"{num_missing:,}")
    return (published.name, *counts, state)


def _folder_rows(named: frozenset[str], missing: frozenset[str]) -> list[tuple[str, ...]]:
    by_folder: dict[str, tuple[int, list[str]]] = {}
    for image in named:
        folder = _folder(image)
        count, lost = by_folder.get(folder, (0, []))
        if image in missing:
            lost.append(image)
        by_folder[folder] = (count + 1, lost)
    return [
        (folder, f"{count:,}", f"{len(lost):,}", min(lost, default=""))
        for folder, (count, lost) in sorted(by_folder.items())
    ]


def _folder(image: str) -> str:
    parts = image.split("/")
    for length in (3, 2):
        folder = "/".join(parts[:length])
        if folder in IMAGE_FOLDERS:
            return folder
    return _ELSEWHERE


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of text; what looks like a number stands on the right."""
    if not rows:
        return ""
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [all(_is_count(cell) for cell in column[1:]) for column in columns]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in (header, *rows)
    )


def _is_count(cell: str) -> bool:
    return cell == "-" or cell.replace(",", "").isdigit()
