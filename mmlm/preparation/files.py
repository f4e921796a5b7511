"""Files that are either complete or not there."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from mmlm.errors import DataError

# What the place that is written to can be the reason of; anything else is the reader's affair.
_WRITE_ERRORS = {
    errno.EACCES,
    errno.EDQUOT,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
}


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Write a file under a temporary name beside it, and rename it when the block ends well.

    After a kill at any moment ``path`` is what it was before, or complete.

    Args:
        path: the file; its folder is made.

    Yields:
        The file, open for writing bytes.

    Raises:
        DataError: the disk is full, or the folder cannot be written.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            yield file
        part.replace(path)
    except OSError as error:
        _forget(part)
        if error.errno in _WRITE_ERRORS or isinstance(error, FileExistsError):
            raise DataError(
                f"{path}: cannot be written ({error.strerror}); make room or mend the folder, then "
                "run the same command again: it continues"
            ) from error
        raise
    except BaseException:
        _forget(part)
        raise


def make_folder(folder: Path) -> None:
    """Make a folder and those above it.

    Raises:
        DataError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"{folder}: cannot be made ({error.strerror}); choose another --root or mend what is "
            "in the way"
        ) from error


def require_space(folder: Path, num_bytes: int, what: str) -> None:
    """Refuse to begin what cannot fit.

    Args:
        folder: exists, on the disk in question.
        num_bytes: about to be written.
        what: for the message.

    Raises:
        DataError: less than ``num_bytes`` is free.
    """
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise DataError(
            f"{what} takes {num_bytes / 1e9:.3f} GB, but the disk of {folder} has only "
            f"{free / 1e9:.3f} GB free; make room, or make {folder} a link to a larger disk"
        )


def _forget(part: Path) -> None:
    try:
        part.unlink(missing_ok=True)
    except OSError:  # its folder is not one, or its name is too long: it never existed
        return
