"""The ledger of samples that are not used as they stand, and the error that strict policy makes.

One JSON line a record and reason: ``{"set", "file", "line", "id", "action", "reason", "detail"}``.
A record is named once, however often its set is repeated.
"""

import json
import os
import socket
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmlm.data.rejection import Action, Reason
from mmlm.errors import DataError

LEDGER_FILE = "data_ledger.jsonl"

_NUM_LISTED = 10


@dataclass(frozen=True, kw_only=True)
class LedgerEntry:
    """A record that is left out, cut, changed, or odd."""

    set_name: str
    """Key in the meta json."""
    file: str
    """The jsonl file."""
    line: int
    """Line number, from 1."""
    identity: str
    """The record's own id."""
    reason: Reason
    """The rule that it breaks; decides what becomes of it."""
    detail: str
    """What was found and what to change or what is done, one line."""

    @property
    def action(self) -> Action:
        """What becomes of the record."""
        return self.reason.action

    def __str__(self) -> str:
        return (
            f"{self.file}:{self.line} (set '{self.set_name}', id '{self.identity}') "
            f"{self.reason.value}: {self.detail}"
        )

    def to_json(self) -> dict[str, Any]:
        """The entry as an object of the ledger."""
        return {
            "set": self.set_name,
            "file": self.file,
            "line": self.line,
            "id": self.identity,
            "action": self.action.value,
            "reason": self.reason.value,
            "detail": self.detail,
        }

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "LedgerEntry":
        """The entry of an object of the ledger."""
        return cls(
            set_name=entry["set"],
            file=entry["file"],
            line=entry["line"],
            identity=entry["id"],
            reason=Reason(entry["reason"]),
            detail=entry["detail"],
        )


LedgerCounts = dict[Action, dict[Reason, int]]
"""Entries by action and reason, the most frequent reason first; only what there is."""


def count_entries(entries: Iterable[LedgerEntry]) -> LedgerCounts:
    """Count ledger entries by action and reason."""
    counts = Counter(entry.reason for entry in entries)
    found: LedgerCounts = {}
    for action in Action:
        reasons = [item for item in counts.most_common() if item[0].action == action]
        if reasons:
            found[action] = dict(reasons)
    return found


def describe_counts(counts: LedgerCounts) -> str:
    """Return e.g. ``3 excluded (odd_turns 2, image_count 1), 1 repaired (...)``, or ``nothing``."""
    parts = []
    for action, reasons in counts.items():
        listed = ", ".join(f"{reason} {count:,}" for reason, count in reasons.items())
        parts.append(f"{sum(reasons.values()):,} {action} ({listed})")
    return "; ".join(parts) or "nothing"


def temporary_path(path: Path) -> Path:
    """Return a name beside ``path`` that no other process uses, on this machine or another."""
    return path.with_name(f".{socket.gethostname()}.{os.getpid()}.{path.name}")


def write_ledger(path: Path, entries: Iterable[LedgerEntry]) -> None:
    """Write the ledger under a temporary name and rename it."""
    temporary = temporary_path(path)
    with temporary.open("w", encoding="utf-8") as file:
        for entry in entries:
            file.write(json.dumps(entry.to_json(), ensure_ascii=False) + "\n")
    temporary.replace(path)


def read_ledger(path: Path) -> tuple[LedgerEntry, ...]:
    """Read what `write_ledger` wrote."""
    with path.open(encoding="utf-8") as file:  # not splitlines(): it splits inside a text, too
        return tuple(LedgerEntry.from_json(json.loads(line)) for line in file)


def strict_error(exclusions: Sequence[LedgerEntry], num_records: int, ledger: Path) -> DataError:
    """Return the error that names the first broken records and counts the rest by rule.

    Args:
        exclusions: at least one.
        num_records: records that were looked at.
        ledger: where all of them are written.
    """
    counts = Counter(exclusion.reason.value for exclusion in exclusions)
    by_rule = ", ".join(f"{reason} {count}" for reason, count in counts.most_common())
    listed = list_entries(exclusions)
    return DataError(
        f"{len(exclusions)} of {num_records} records cannot be used ({by_rule}); mend them, or set "
        f"data.policy=skip to leave them out; all are listed in {ledger}:\n{listed}"
    )


def list_entries(entries: Sequence[LedgerEntry], num_listed: int = _NUM_LISTED) -> str:
    """Return the first entries, one a line, and how many more there are."""
    listed = [f"  {entry}" for entry in entries[:num_listed]]
    if len(entries) > num_listed:
        listed.append(f"  ... and {len(entries) - num_listed} more")
    return "\n".join(listed)
