"""Lines of a log on a disk that fills and has room again, and what a resume drops."""

import errno
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest

from mmlm.train.line_file import LineFile, drop_lines_from


class FullDisk:
    """Stands before the writes of `LineFile`: while full, half of a line is written at most."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.is_full = False
        original, disk = Path.open, self

        class Half(io.FileIO):
            def write(self, raw: Any) -> int:
                if disk.is_full and len(raw) < 10:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return super().write(raw[: len(raw) // 2] if disk.is_full else raw)

        def open_path(path: Path, mode: str = "r", *rest: Any, **others: Any) -> Any:
            return Half(path, "ab") if mode == "ab" else original(path, mode, *rest, **others)

        patch.setattr(Path, "open", open_path)


def numbers(path: Path) -> list[int]:
    return [json.loads(line)["iteration"] for line in path.read_text().splitlines()]


def test_a_full_disk_costs_lines_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    disk, file = FullDisk(monkeypatch), LineFile(tmp_path / "log.jsonl")
    written = []
    for iteration in range(6):
        disk.is_full = iteration in (2, 3)
        written.append(file.append({"iteration": iteration, "loss": 1.25}))
    assert written == [True, True, False, False, True, True]
    assert numbers(file.path) == [0, 1, 4, 5], "the half line spoils none"
    told, again = (record.getMessage() for record in caplog.records)
    assert str(file.path) in told and "No space left on device. The run goes on; lines are" in told
    assert "is written again; 2 lines are missing" in again


def test_a_resume_drops_lines_of_later_iterations_and_half_ones(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"iteration": 0}\n{"itera{"iteration": 1}\n{"iteration": 2}\n{"iteration": 3}')
    drop_lines_from(path, 3)
    assert numbers(path) == [0, 2] and path.read_text().endswith("\n")
    assert [each.name for each in tmp_path.iterdir()] == ["log.jsonl"]


def test_a_kill_while_lines_are_dropped_costs_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"iteration": 0}\n{"iteration": 1}\n')

    def killed(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        drop_lines_from(path, 1)
    assert numbers(path) == [0, 1]
    drop_lines_from(path, 2)  # nothing to drop, nothing written
