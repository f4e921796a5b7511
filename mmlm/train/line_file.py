"""Files of one JSON line an iteration, which outlive a kill and a full disk."""

import json
import os
from pathlib import Path
from typing import Any

from mmlm.log import get_logger


class LineFile:
    """Appends lines; one that cannot be written is missing, and never an error.

    Logs are written by one rank: an error there would end a training that goes well everywhere.

    Args:
        path: of the file; it is opened for each line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._num_missing = 0
        self._cut_at: int | None = None  # bytes: where a line begins that was not completed

    def append(self, line: dict[str, Any]) -> bool:
        """Write a line.

        Returns:
            Whether it is in the file. If not, this was said, once until a line is written again.
        """
        try:
            self._write((json.dumps(line) + "\n").encode())
        except OSError as error:
            if not self._num_missing:
                get_logger().error(
                    f"{self.path}: CANNOT BE WRITTEN: {error.strerror or error}. The run goes on; "
                    "lines are missing until there is room again"
                )
            self._num_missing += 1
            return False
        if self._num_missing:
            get_logger().warning(
                f"{self.path}: is written again; {self._num_missing} lines are missing"
            )
            self._num_missing = 0
        return True

    def _write(self, raw: bytes) -> None:
        with self.path.open("ab", buffering=0) as file:
            if self._cut_at is not None:
                file.truncate(self._cut_at)
            self._cut_at = file.seek(0, os.SEEK_END)
            while raw:  # a disk that fills takes a part
                raw = raw[file.write(raw) :]
        self._cut_at = None  # after closing, which can fail as well


def drop_lines_from(path: Path, start_iteration: int) -> None:
    """Take out the lines of iterations that will be done again, and those that were cut short.

    A kill meanwhile leaves the old file or the new one.
    """
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8")
    kept = [line for line in text.splitlines() if iteration_of(line) < start_iteration]
    new_text = "".join(line + "\n" for line in kept)
    if new_text == text:
        return
    unfinished = path.with_name(f".{path.name}.tmp")
    unfinished.write_text(new_text, encoding="utf-8")
    unfinished.replace(path)


def iteration_of(line: str) -> float:
    """The iteration of a line; infinite for one that was cut short."""
    try:
        return json.loads(line)["iteration"]
    except ValueError:  # a line cut short by a kill or a full disk
        return float("inf")
