"""Stage ``unpack``: every archive in ``data/`` and ``downloads/`` into the published folders."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mmlm.errors import DataError
from mmlm.log import get_logger
from mmlm.preparation.archive import Choice, is_archive, unpack
from mmlm.preparation.files import make_folder
from mmlm.preparation.layout import Playground
from mmlm.preparation.placement import is_picture, picture_destination
from mmlm.preparation.sources import (
    COLLECTIONS,
    IMAGE_FOLDERS,
    PUBLISHED_SETS,
    SOURCES,
    image_folders,
)

_SUFFIXES = (".zip", ".tar", ".tgz", ".tar.gz")
_OWN_STAGE = ("sam",)  # its pictures are chosen by the annotations


@dataclass(frozen=True, kw_only=True)
class FoundArchive:
    """An archive, and what it should hold."""

    path: Path
    """The file."""
    folders: tuple[str, ...]
    """Folders below ``data/`` of its pictures; empty for annotations."""


def find_archives(playground: Playground) -> tuple[FoundArchive, ...]:
    """Return the archives that are there: those of the dataset repository, then the sources'."""
    found = []
    if playground.data.is_dir():
        for path in sorted(playground.data.iterdir()):
            if _is_packed(path):
                collection = _collection(path.name)
                folders = image_folders(collection) if collection else IMAGE_FOLDERS
                found.append(FoundArchive(path=path, folders=folders))
    for source in SOURCES:
        if source.name not in _OWN_STAGE:
            found += [
                FoundArchive(path=path, folders=source.folders)
                for path in archives_below(playground.downloads / source.name)
            ]
    return tuple(found)


def archives_below(folder: Path) -> Iterator[Path]:
    """Yield the archives in a folder and below; what is still being downloaded is none."""
    for path in sorted(folder.rglob("*")):
        if not path.name.endswith(".part") and _is_packed(path):
            yield path


def _is_packed(path: Path) -> bool:
    """Whether a file is an archive, or is called one: then `unpack` says what is wrong with it."""
    return is_archive(path) or (path.is_file() and path.name.endswith(_SUFFIXES))


def unpack_all(playground: Playground, *, again: bool = False, remove: bool = False) -> int:
    """Unpack whatever is there and not noted as done.

    Args:
        playground: the folders.
        again: look at archives that are noted as done, too.
        remove: delete an archive when all of it is unpacked.

    Returns:
        How many archives were unpacked.

    Raises:
        DataError: an archive cannot be used; those before it are done.
    """
    _report_others(playground.data)
    count = 0
    for archive in find_archives(playground):
        if archive.folders:
            choose, folder = _pictures(archive.folders), playground.data
        else:
            choose, folder = _annotations(), playground.annotations
        count += unpack_once(playground, archive.path, folder, choose, again=again, remove=remove)
    return count


def _report_others(data: Path) -> None:
    """Name files beside the archives that nothing here can use (an archive in pieces, say)."""
    others = [
        path.name
        for path in (sorted(data.iterdir()) if data.is_dir() else [])
        if path.is_file() and not path.name.startswith(".") and not _is_packed(path)
    ]
    if others:
        get_logger(__name__).warning(
            "%s: %d files are no archives and are not touched: %s; put an archive that is in "
            "pieces together by hand",
            data,
            len(others),
            ", ".join(others[:10]),
        )


def unpack_once(
    playground: Playground,
    path: Path,
    folder: Path,
    choose: Choice,
    *,
    again: bool = False,
    remove: bool = False,
) -> bool:
    """Unpack one archive unless it is noted as done; returns whether it was unpacked."""
    name = path.relative_to(playground.root).as_posix()
    status = path.stat()
    fingerprint = [status.st_size, status.st_mtime_ns]
    logger = get_logger(__name__)
    if not again and playground.is_done("unpack", name, fingerprint):
        logger.info("%s: unpacked before", name)
        return False
    make_folder(folder)
    report = unpack(path, folder, choose)
    count = report.num_written + report.num_kept
    lost = [member for member in report.left_out if is_picture(PurePosixPath(member))]
    if count == 0:
        raise DataError(
            f"{path}: none of its {len(report.left_out)} files belongs into {folder}, the first is "
            f"'{_first(report.left_out)}'; is it the right archive under this name?"
        )
    logger.info(
        "%s: %d files (%d of them were there), %d left out%s",
        name,
        count,
        report.num_kept,
        len(report.left_out),
        f", {len(lost)} pictures among them, e.g. '{lost[0]}'" if lost else "",
    )
    playground.mark_done(
        "unpack", name, fingerprint, num_files=count, num_left_out=len(report.left_out)
    )
    if remove:
        path.unlink()
    return True


def _first(names: Sequence[str]) -> str:
    return names[0] if names else ""


def _collection(name: str) -> str:
    """The collection that a file is named after, the longest that fits; empty for none."""
    fitting = [one for one in COLLECTIONS if name == one or name.startswith((f"{one}.", f"{one}_"))]
    return max(fitting, key=len, default="")


def _pictures(folders: Sequence[str]) -> Choice:
    return lambda member: picture_destination(member, folders)


def _annotations() -> Choice:
    names = {f"{published.name}.jsonl" for published in PUBLISHED_SETS}
    return lambda member: PurePosixPath(member.name) if member.name in names else None
