"""The temporary folder of a conversion: kept when the process is killed, so that it can go on.

An error removes it. A kill, Ctrl-C and a lost machine leave it, and the same command goes through
it again: what is there and right is kept (see `mmlm.checkpoint.row_stream`).
"""

import fcntl
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from mmlm.errors import CheckpointError
from mmlm.log import get_logger

_log = get_logger("mmlm.conversion")


@contextmanager
def unfinished_folder(folder: Path, keep: Collection[str]) -> Iterator[Path]:
    """Hold a temporary folder for one conversion.

    Args:
        folder: is made, or what a killed conversion has left.
        keep: paths inside it that are gone through again; everything else is deleted.

    Raises:
        CheckpointError: when another process is writing it, or the disk fails.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be made: {error.strerror}") from error
    try:
        _lock(descriptor, folder)
        with _removed_on_error(folder):
            _delete_all_but(folder, keep)
            if any(folder.iterdir()):
                _log.info("%s: continuing an interrupted conversion", folder)
            yield folder
    finally:
        os.close(descriptor)


def bytes_on_disk(folder: Path) -> int:
    """Size of what a folder holds, without holes of its files; 0 if it does not exist."""
    files = [file.stat() for file in folder.rglob("*") if file.is_file()]
    return sum(min(each.st_size, each.st_blocks * 512) for each in files)


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CheckpointError(f"{folder}: another conversion is writing it") from None
    except OSError as error:  # a file system without locks
        _log.warning("%s: cannot be locked (%s); start one conversion only", folder, error.strerror)


@contextmanager
def _removed_on_error(folder: Path) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise CheckpointError(
            f"{error.filename or folder}: cannot be written: {error.strerror or error}"
        ) from error
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _delete_all_but(folder: Path, keep: Collection[str]) -> None:
    for parent, folders, files in os.walk(folder, topdown=False):
        for name in files:
            file = Path(parent) / name
            if file.relative_to(folder).as_posix() not in keep or file.is_symlink():
                file.unlink()
        for name in folders:
            inner = Path(parent) / name
            if inner.is_symlink():
                inner.unlink()
            elif not any(inner.iterdir()):
                inner.rmdir()
