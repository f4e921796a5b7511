"""Reading from a file system that may fail for a moment, which is no damage of a file."""

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from mmlm.errors import CheckpointError

T = TypeVar("T")

_WAITS_SECONDS = (0.2, 1.0, 3.0)
_OF_THE_FILE = {errno.ENOENT, errno.EIO, errno.ENOTDIR, errno.EISDIR}
"""It is not there, the disk has lost it, or something else has its name: waiting does not help."""


class UnreachableFileError(CheckpointError):
    """A file that could not be read and that may be as it was written."""


def read_patiently(read: Callable[[Path], T], file: Path) -> T:
    """Read a file, again after a short while when the file system cannot deliver it just now.

    Args:
        read: is given ``file``; called up to four times within about four seconds.
        file: to read.

    Returns:
        What ``read`` returns.

    Raises:
        OSError: at once, when the file is not there or its disk cannot read it.
        UnreachableFileError: for any other OSError that does not pass (no permission, a stale
            handle, too many open files), naming the file.
    """
    for wait in (*_WAITS_SECONDS, None):
        try:
            return read(file)
        except OSError as error:
            if error.errno in _OF_THE_FILE:
                raise
            if wait is None:
                raise UnreachableFileError(
                    f"{file}: cannot be read: {error.strerror or error}, also after "
                    f"{len(_WAITS_SECONDS)} more attempts; that does not mean that it is damaged, "
                    "so nothing is set aside: see to the file system and start again"
                ) from error
        time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def size_of(file: Path) -> int:
    """Size of a file in bytes; errors as `read_patiently`."""
    return read_patiently(os.stat, file).st_size
