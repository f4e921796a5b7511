"""Which pictures the annotations name, and which of them are there."""

import os
import posixpath
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from mmlm.data.annotation import parse_record
from mmlm.errors import DataError
from mmlm.preparation.layout import Playground
from mmlm.preparation.sources import PUBLISHED_SETS, PublishedSet


@dataclass(frozen=True, kw_only=True)
class SetReferences:
    """What one annotation file names."""

    published: PublishedSet
    """The set."""
    num_records: int
    """Lines that are not blank."""
    broken: tuple[str, ...]
    """Why lines cannot be read, with file and line."""
    images: frozenset[str]
    """Paths of pictures below ``data/``, each once."""


def read_references(
    playground: Playground, sets: Sequence[PublishedSet] = PUBLISHED_SETS
) -> tuple[SetReferences, ...]:
    """Read the annotation files that are there.

    Args:
        playground: the folders.
        sets: the sets to read.

    Returns:
        One a set whose file exists, in the order of ``sets``.
    """
    present = [one for one in sets if playground.annotation(one.name).is_file()]
    total = sum(playground.annotation(one.name).stat().st_size for one in present)
    with tqdm(desc="annotations", total=total, unit="B", unit_scale=True) as bar:
        return tuple(_read_set(playground.annotation(one.name), one, bar) for one in present)


def _read_set(path: Path, published: PublishedSet, bar: "tqdm[None]") -> SetReferences:
    images: set[str] = set()
    broken = []
    num_records = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            bar.update(len(line))
            if not line.strip():
                continue
            num_records += 1
            try:
                record = parse_record(line, file=path, line=number)
            except DataError as error:
                broken.append(str(error))
                continue
            images.update(
                posixpath.normpath(posixpath.join(published.root, image)) for image in record.images
            )
    return SetReferences(
        published=published,
        num_records=num_records,
        broken=tuple(broken),
        images=frozenset(images),
    )


def missing_images(data: Path, images: Iterable[str]) -> tuple[str, ...]:
    """Return the pictures that are not there, sorted; each folder is listed once.

    Args:
        data: folder that the paths start from.
        images: paths below it.
    """
    wanted: dict[str, list[str]] = {}
    for image in images:
        folder, _, name = image.rpartition("/")
        wanted.setdefault(folder, []).append(name)
    missing = []
    for folder, names in wanted.items():
        try:
            present = set(os.listdir(data / folder))
        except (FileNotFoundError, NotADirectoryError):
            present = set()
        missing += [posixpath.join(folder, name) for name in names if name not in present]
    return tuple(sorted(missing))
