"""TensorBoard on a disk that fills: the run goes on, and numbers come back with the room."""

import errno
import os
import time
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter

from mmlm.train import board as module
from mmlm.train.board import Board


def test_a_full_disk_costs_numbers_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    board = Board(tmp_path, purge_step=0)
    board.add_scalar("x", 1.0, 0)
    time.sleep(0.3)
    original = RecordWriter.write

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(RecordWriter, "write", full)
    for step in range(1, 6):
        board.add_scalar("x", 1.0, step)
        time.sleep(0.1)  # the writer is a thread of its own
    (record,) = caplog.records
    assert str(tmp_path) in record.getMessage() and "No space left" in record.getMessage()
    assert len(list(tmp_path.iterdir())) == 1, "it is not tried again at once"
    monkeypatch.setattr(RecordWriter, "write", original)
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.0)
    board._retry_at = 0.0
    board.add_scalar("x", 1.0, 6)
    board.close()
    assert len(list(tmp_path.iterdir())) == 2
    assert 6 in [event.step for file in tmp_path.iterdir() for event in _scalars(file)]


def _scalars(file: Path) -> list[Any]:
    found = EventAccumulator(str(file))
    found.Reload()
    return list(found.Scalars("x")) if "x" in found.Tags()["scalars"] else []


def test_a_board_that_cannot_be_begun_or_closed_is_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "taken").write_text("no folder")
    board = Board(tmp_path / "taken", purge_step=0)
    board.add_scalar("x", 1.0, 0)
    board.close()
    assert "CANNOT BE WRITTEN" in caplog.text
