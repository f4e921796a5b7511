"""The folder ``playground/``: what lies where, and what has been done in it."""

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mmlm.errors import DataError
from mmlm.preparation.files import make_folder, replacing


@dataclass(frozen=True, kw_only=True)
class Playground:
    """Paths below one folder."""

    root: Path
    """The folder itself."""

    @property
    def annotations(self) -> Path:
        """Folder of the jsonl files."""
        return self.root / "opensource"

    @property
    def data(self) -> Path:
        """Folder of the pictures, and of the dataset repository's archives."""
        return self.root / "data"

    @property
    def downloads(self) -> Path:
        """Folder of what comes from the individual sources, a folder a source."""
        return self.root / "downloads"

    @property
    def records(self) -> Path:
        """Folder of the notes on what is done; it may be deleted, then all is looked at again."""
        return self.root / ".prepare"

    def annotation(self, name: str) -> Path:
        """Return the annotation file of a set."""
        return self.annotations / f"{name}.jsonl"

    def record(self, kind: str, name: str) -> Path:
        """Return where it is noted that ``name`` is done."""
        return self.records / kind / (name.replace("/", "__") + ".json")

    def is_done(self, kind: str, name: str, fingerprint: list[int] | None = None) -> bool:
        """Return whether `mark_done` was called with this fingerprint."""
        try:
            note = json.loads(self.record(kind, name).read_bytes())
        except (OSError, ValueError):
            return False
        return isinstance(note, dict) and note.get("fingerprint") == fingerprint

    def mark_done(
        self, kind: str, name: str, fingerprint: list[int] | None = None, **facts: int
    ) -> None:
        """Note that something is done.

        Args:
            kind: ``download`` or ``unpack``.
            name: of the source or archive.
            fingerprint: size and time of the file that it was done with, if any.
            facts: counts, for people who look.
        """
        with replacing(self.record(kind, name)) as file:
            note = {"name": name, "fingerprint": fingerprint, **facts}
            file.write(json.dumps(note, indent=2).encode() + b"\n")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other preparations out of the folder; a lock dies with its process.

        Raises:
            DataError: another process is at work, or the folder cannot be made.
        """
        make_folder(self.records)
        with (self.records / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise DataError(
                    f"{self.root}: another `mmlm data prepare` is at work there; wait for its end"
                ) from error
            yield
