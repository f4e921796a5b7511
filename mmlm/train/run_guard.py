"""One run at a time in an output directory: rank 0 holds a lock on a file in it."""

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from mmlm.errors import ConfigError
from mmlm.log import get_logger

LOCK_FILE = "run.lock"
"""In the output directory; it stays, and is free when no process holds a lock on it."""

WAIT_SECONDS = 10.0
"""How long a start waits for the lock: a run that was killed may not have ended yet."""


@contextmanager
def guard_run(output_dir: Path, wait_seconds: float = WAIT_SECONDS) -> Iterator[None]:
    """Hold the output directory for this process while the block runs.

    The lock is POSIX's (``lockf``), not ``flock``: it ends with this very process, however that
    dies, and no process forked from it keeps it. No other code of the process may open the file,
    for closing it would end the lock.

    Args:
        output_dir: is made.
        wait_seconds: how long another process may take to let go.

    Raises:
        ConfigError: another process holds it; says which.
        OSError: the folder or the file cannot be made.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    path = output_dir / LOCK_FILE
    with path.open("a+", encoding="utf-8") as file:
        _lock(file.fileno(), path, time.monotonic() + wait_seconds)
        file.truncate(0)
        started = datetime.now(UTC).isoformat(timespec="seconds")
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "started": started}
        file.write(json.dumps(holder) + "\n")
        file.flush()
        yield
        file.truncate(0)


def _lock(descriptor: int, path: Path, deadline: float) -> None:
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except (BlockingIOError, PermissionError) as error:  # both mean that it is held
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"{path.parent} is in use by another run ({_holder(path)}): two runs would "
                    "overwrite each other's checkpoints. Wait for it, stop it, or use another "
                    "output_dir"
                ) from error
        except OSError as error:
            get_logger().warning(
                f"{path}: this file system has no locks ({error.strerror}), so two runs in one "
                "output_dir are not noticed"
            )
            return
        time.sleep(0.2)


def _holder(path: Path) -> str:
    """Who says to hold it; called only by a process that gives up and holds no lock itself."""
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']}, started {holder['started']}"
    except (OSError, ValueError, KeyError):  # it has only just begun
        return "it has not yet said which"
