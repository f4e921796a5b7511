"""What an unfinished length index has measured so far, so that a killed build goes on.

One JSON line a chunk, appended when the chunk is done: ``{"rows": [[...], ...], "ledger": [...]}``.
A line that a kill has cut short is skipped.
"""

import json
from pathlib import Path

import numpy as np

from mmlm.data.ledger import LedgerEntry
from mmlm.data.length_index import INDEX_DTYPE
from mmlm.data.measuring import Measured


class ProgressFile:
    """The file of one unfinished index."""

    def __init__(self, path: Path) -> None:
        """Name the file; nothing is touched.

        Args:
            path: under the fingerprint of the index.
        """
        self.path = path

    def stopped_at(self) -> float | None:
        """Return when the last chunk was added, seconds since 1970; None where there is no file."""
        return self.path.stat().st_mtime if self.path.is_file() else None

    def read(self) -> list[Measured]:
        """Return the chunks that are there, in the order in which they were done."""
        if not self.path.is_file():
            return []
        chunks = []
        for line in self.path.read_bytes().split(b"\n"):
            try:
                content = json.loads(line)
            except ValueError:  # the end of a line is missing, or there is none after the last
                continue
            chunks.append(
                Measured(
                    rows=np.array([tuple(row) for row in content["rows"]], dtype=INDEX_DTYPE),
                    entries=tuple(LedgerEntry.from_json(entry) for entry in content["ledger"]),
                )
            )
        return chunks

    def append(self, chunk: Measured) -> None:
        """Add a chunk."""
        content = {
            "rows": chunk.rows.tolist(),
            "ledger": [entry.to_json() for entry in chunk.entries],
        }
        # The line break comes first: what a kill has cut short is then a line of its own.
        with self.path.open("ab") as file:
            file.write(b"\n" + json.dumps(content, ensure_ascii=False).encode("utf-8"))

    def remove(self) -> None:
        """Forget it: the index is complete."""
        self.path.unlink(missing_ok=True)
