"""Ending a training early and well: SIGTERM, SIGUSR1 (Slurm's warning) and a limit of time.

The first signal, on any rank, is a request: all ranks agree on it, finish the iteration and save. A
second one ends the process at once.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from mmlm.errors import MmlmError
from mmlm.log import get_logger

if TYPE_CHECKING:  # signals are watched before torch is loaded, which takes seconds
    import torch.distributed as dist

MARKER_FILE = "stopped.json"
"""In the output directory of a run that was stopped: read by ``pretrain.sh``."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What asks a run to stop."""

REPEAT_SECONDS = 2.0
"""Within this time after the first signal another is the same request: Slurm, the script and
torchrun may each send it."""

_DURATION = 1
"""Code of the limit of time among the numbers of signals; 0 is no reason."""


class StopRequested(MmlmError):
    """A stop before the first iteration; its text is the reason."""


def reason_of(code: int) -> str | None:
    """The reason as text: "SIGTERM", "SIGUSR1", "exit_duration_minutes", or None for code 0."""
    if code == 0:
        return None
    return "exit_duration_minutes" if code == _DURATION else signal.Signals(code).name


class Stopper:
    """Whether this run shall stop: what this rank was told, and what all ranks agreed on.

    As a context manager it listens to `SIGNALS`; it must be entered in the main thread. A thread
    takes the signals, so that a second one ends the process also while the main thread waits inside
    a collective.

    Args:
        exit_duration_minutes: after which the run stops by itself, from now; 0 for never.
    """

    def __init__(self, exit_duration_minutes: float = 0.0) -> None:
        self._deadline = time.monotonic() + 60.0 * (exit_duration_minutes or float("inf"))
        self._signal = 0
        self._signal_time = 0.0
        self._raises = False
        self._agreed = 0

    def __enter__(self) -> "Stopper":
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._earlier_fd = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        self._earlier = {number: signal.signal(number, self._handle) for number in SIGNALS}
        self._thread = threading.Thread(target=self._listen, name="mmlm-signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._earlier_fd)
        os.write(self._write_end, b"\0")
        self._thread.join()
        os.close(self._read_end)
        os.close(self._write_end)

    @property
    def code(self) -> int:
        """What this rank was told, as a number to take the largest of over the ranks."""
        if self._signal:
            return self._signal
        return _DURATION if time.monotonic() >= self._deadline else 0

    @property
    def reason(self) -> str | None:
        """What all ranks have agreed on, the same on every rank; None: go on."""
        return reason_of(self._agreed)

    def learn(self, code: int) -> None:
        """Take the largest `code` of all ranks, which some all-reduce has brought along."""
        self._agreed = max(self._agreed, code)

    def agree(self, group: "dist.ProcessGroup | None" = None) -> str | None:
        """Ask all ranks; collective.

        Args:
            group: all ranks over gloo.

        Returns:
            `reason`.
        """
        import torch
        import torch.distributed as dist

        code = torch.tensor(self.code)
        dist.all_reduce(code, op=dist.ReduceOp.MAX, group=group)
        self.learn(int(code))
        return self.reason

    def raise_if_agreed(self, group: "dist.ProcessGroup | None" = None) -> None:
        """Ask all ranks where nothing needs to be saved; collective.

        Raises:
            StopRequested: on every rank.
        """
        reason = self.agree(group)
        if reason is not None:
            raise StopRequested(reason)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """A block that a signal to this rank ends at once: long work of one rank before the start.

        Raises:
            StopRequested: in the main thread, inside the block.
        """
        self._raises = True
        try:
            self._raise_if_asked()
            yield
        except Exception as error:
            if not self._signal:
                raise
            # the processes that worked for it were told as well
            raise StopRequested(signal.Signals(self._signal).name) from error
        finally:
            self._raises = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Runs in the main thread, when it comes back from a collective or another long call."""
        self._signal = self._signal or number
        self._raise_if_asked()

    def _raise_if_asked(self) -> None:
        if self._raises and self._signal:
            self._raises = False
            raise StopRequested(signal.Signals(self._signal).name)

    def _listen(self) -> None:
        """Runs in a thread: Python's C handler writes the number of each signal into the pipe."""
        while True:
            for number in os.read(self._read_end, 64):
                if number == 0:
                    return
                if number in SIGNALS:
                    self._note(number)

    def _note(self, number: int) -> None:
        now, name = time.monotonic(), signal.Signals(number).name
        if not self._signal_time:
            self._signal, self._signal_time = self._signal or number, now
            get_logger().info(
                f"{name}: what is being done is finished and saved, then the run stops; a second "
                "signal ends it at once"
            )
        elif now - self._signal_time > REPEAT_SECONDS:
            get_logger().warning(f"{name}: the second signal, ended at once; nothing was saved")
            os._exit(128 + number)


def write_marker(output_dir: Path, *, iteration: int, train_iters: int | None, reason: str) -> None:
    """Say in a file that the run was stopped and is saved; complete or not there.

    Args:
        output_dir: of the run.
        iteration: iterations done and saved.
        train_iters: of the whole run; None where it is not known yet.
        reason: why it stopped.
    """
    content = {
        "iteration": iteration,
        "train_iters": train_iters,
        "reason": reason,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    output_dir.mkdir(parents=True, exist_ok=True)
    unfinished = output_dir / f".{MARKER_FILE}.tmp"
    unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(output_dir / MARKER_FILE)


def remove_marker(output_dir: Path) -> None:
    """Remove what an earlier run has left; a run that goes on is not stopped."""
    (output_dir / MARKER_FILE).unlink(missing_ok=True)
