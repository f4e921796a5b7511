"""TensorBoard scalars, which a full disk may cost but which never end a training."""

import time
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from mmlm.log import get_logger

RETRY_SECONDS = 60.0
"""After a failure, until another file is begun: each attempt may leave an empty one."""


class Board:
    """Writes scalars; those that cannot be written are missing, and never an error.

    The writer's thread ends with its first error, which every later call raises again, so that
    a new writer, and with it a new file, is needed then.

    Args:
        folder: of the event files.
        purge_step: what the files have of this step and later ones is not shown any more.
    """

    def __init__(self, folder: Path, purge_step: int) -> None:
        self._folder = folder
        self._purge_step: int | None = purge_step
        self._writer: SummaryWriter | None = None
        self._retry_at = 0.0
        self._has_failed = False
        self._open()

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Write a number, now or a little later."""
        if self._writer is None and time.monotonic() >= self._retry_at:
            self._open()
        if self._writer is None:
            return
        try:
            self._writer.add_scalar(name, value, step)
        except OSError as error:
            self._fail(error)

    def close(self) -> None:
        """Write what is left."""
        try:
            if self._writer is not None:
                self._writer.close()
        except OSError as error:
            self._fail(error)

    def _open(self) -> None:
        try:
            self._writer = SummaryWriter(str(self._folder), purge_step=self._purge_step)
        except OSError as error:
            self._fail(error)
        else:
            self._purge_step = None  # a later file takes nothing back

    def _fail(self, error: OSError) -> None:
        self._writer = None
        self._retry_at = time.monotonic() + RETRY_SECONDS
        if not self._has_failed:
            get_logger().error(
                f"{self._folder}: CANNOT BE WRITTEN: {error.strerror or error}. The run goes on; "
                f"numbers are missing in TensorBoard; it is tried again every {RETRY_SECONDS:.0f} s"
            )
        self._has_failed = True
