"""Stage ``ocr-vqa``: book covers of any format into ``data/ocr_vqa/images/*.jpg``.

The annotations name every picture ``.jpg``, whatever it was. A file whose content is JPEG is taken
as it is (linked, not copied, where it lies elsewhere); anything else is encoded anew.
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from mmlm.errors import DataError
from mmlm.log import get_logger
from mmlm.preparation.files import make_folder, replacing
from mmlm.preparation.jpeg import JPEG_MAGIC, encode_jpeg, write_image
from mmlm.preparation.layout import Playground
from mmlm.preparation.placement import is_picture
from mmlm.preparation.pool import map_unordered
from mmlm.preparation.sources import OCR_VQA_FOLDER

_QUALITY = 95
_CHUNK = 256  # pictures a task
_NUM_LISTED = 10


@dataclass(frozen=True, kw_only=True)
class _Chunk:
    """Work of one process for some seconds."""

    files: tuple[Path, ...]
    folder: Path


def convert_ocr_vqa(playground: Playground, source: Path, *, workers: int) -> int:
    """Make a ``.jpg`` of every picture; those that are there stay.

    Args:
        playground: the folders.
        source: folder with the downloaded pictures; also what lies in the target folder under
            another suffix is converted.
        workers: processes.

    Returns:
        The number of pictures that were made.
    """
    target = playground.data / OCR_VQA_FOLDER
    files = [path for folder in (source, target) for path in _pictures(folder)]
    # A name may be there twice (1.gif and 1.jpg): JPEG is taken first, as in every run.
    names: dict[str, Path] = {}
    for path in files:
        names.setdefault(path.stem, path)
    if not names:
        return 0
    waiting = [path for path in names.values() if not (target / f"{path.stem}.jpg").is_file()]
    chunks = [
        _Chunk(files=tuple(waiting[start : start + _CHUNK]), folder=target)
        for start in range(0, len(waiting), _CHUNK)
    ]
    make_folder(target)
    broken: list[str] = []
    with tqdm(desc="ocr_vqa", total=len(names), unit="picture") as bar:
        bar.update(len(names) - len(waiting))
        for chunk_size, chunk_broken in map_unordered(_convert, chunks, workers=workers):
            broken += chunk_broken
            bar.update(chunk_size)
    _report(playground, broken)
    return len(waiting) - len(broken)


def _pictures(folder: Path) -> list[Path]:
    found = [path for path in folder.rglob("*") if is_picture(PurePosixPath(path))]
    return sorted(found, key=lambda path: (path.suffix.lower() not in (".jpg", ".jpeg"), path))


def _convert(chunk: _Chunk) -> tuple[int, list[str]]:
    """Convert some pictures; runs in a process of the pool."""
    broken = []
    for path in chunk.files:
        target = chunk.folder / f"{path.stem}.jpg"
        with path.open("rb") as file:
            is_jpeg = file.read(len(JPEG_MAGIC)) == JPEG_MAGIC
        if is_jpeg:
            _take(path, target)
            continue
        try:
            data = encode_jpeg(path.read_bytes(), name=str(path), quality=_QUALITY)
        except DataError as error:
            broken.append(str(error))
            continue
        write_image(target, data)
    return len(chunk.files), broken


def _take(path: Path, target: Path) -> None:
    """Give a file a second name, or copy it where that cannot be (another disk)."""
    try:
        os.link(path, target)
    except OSError:
        with path.open("rb") as source, replacing(target) as file:
            shutil.copyfileobj(source, file)


def _report(playground: Playground, broken: Sequence[str]) -> None:
    if not broken:
        return
    listing = playground.records / "ocr_vqa_broken.txt"
    with replacing(listing) as file:
        file.write("\n".join([*sorted(broken), ""]).encode())
    shown = "\n".join(f"  {message}" for message in sorted(broken)[:_NUM_LISTED])
    get_logger(__name__).warning(
        "%d pictures of OCR-VQA do not decode and are left out, all in %s. Fetch them again; "
        "`mmlm data prepare status` tells whether the annotations need them.\n%s",
        len(broken),
        listing,
        shown,
    )
