"""Chunks come back as they were written, and what a kill cut short is skipped."""

from pathlib import Path

import numpy as np

from mmlm.data.index_progress import ProgressFile
from mmlm.data.ledger import LedgerEntry
from mmlm.data.length_index import INDEX_DTYPE
from mmlm.data.measuring import Measured
from mmlm.data.rejection import Reason


def chunk(*lines: int) -> Measured:
    rows = np.zeros(len(lines), dtype=INDEX_DTYPE)
    rows["line"], rows["identity"] = lines, 2**64 - 1
    entries = tuple(
        LedgerEntry(
            set_name="红",
            file="a.jsonl",
            line=line,
            identity="\n",
            reason=Reason.ODD_TURNS,
            detail="\u2028",
        )
        for line in lines[:1]
    )
    return Measured(rows=rows, entries=entries)


def test_chunks_come_back_as_they_were_written(tmp_path: Path) -> None:
    progress = ProgressFile(tmp_path / "a.partial")
    assert progress.read() == [] and progress.stopped_at() is None
    chunks = [chunk(4, 5), chunk(1)]
    for each in chunks:
        progress.append(each)
    assert progress.stopped_at() == progress.path.stat().st_mtime
    for found, each in zip(progress.read(), chunks, strict=True):
        np.testing.assert_array_equal(found.rows, each.rows)
        assert found.entries == each.entries
    progress.remove()
    progress.remove()
    assert progress.read() == []


def test_every_cut_leaves_the_whole_chunks_before_it_and_those_after(tmp_path: Path) -> None:
    progress = ProgressFile(tmp_path / "a.partial")
    progress.append(chunk(1))
    complete = progress.path.stat().st_size
    progress.append(chunk(2))
    content = progress.path.read_bytes()
    for length in range(complete + 1, len(content), 7):
        progress.path.write_bytes(content[:length])
        progress.append(chunk(3))
        assert [found.rows["line"].tolist() for found in progress.read()] == [[1], [3]]
