"""The ledger of excluded samples, and the error that strict policy makes of it.

One JSON line a record: ``{"set", "file", "line", "id", "reason", "detail"}``.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmlm.data.rejection import Reason, Rejection
from mmlm.errors import DataError

_NUM_LISTED = 10


@dataclass(frozen=True, kw_only=True)
class Exclusion:
    """A record that is left out."""

    set_name: str
    """Key in the meta json."""
    file: str
    """The jsonl file."""
    line: int
    """Line number, from 1."""
    identity: str
    """The record's own id."""
    rejection: Rejection
    """The rule that it breaks."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line} (set '{self.set_name}', id '{self.identity}') " + str(
            self.rejection
        )


def write_ledger(path: Path, exclusions: Iterable[Exclusion]) -> None:
    """Write the ledger under a temporary name and rename it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        for exclusion in exclusions:
            entry = {
                "set": exclusion.set_name,
                "file": exclusion.file,
                "line": exclusion.line,
                "id": exclusion.identity,
                "reason": exclusion.rejection.reason.value,
                "detail": exclusion.rejection.detail,
            }
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
    temporary.replace(path)


def read_ledger(path: Path) -> tuple[Exclusion, ...]:
    """Read what `write_ledger` wrote."""
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return tuple(
        Exclusion(
            set_name=entry["set"],
            file=entry["file"],
            line=entry["line"],
            identity=entry["id"],
            rejection=Rejection(reason=Reason(entry["reason"]), detail=entry["detail"]),
        )
        for entry in entries
    )


def strict_error(exclusions: Sequence[Exclusion], num_records: int, ledger: Path) -> DataError:
    """Return the error that names the first broken records and counts the rest by rule.

    Args:
        exclusions: at least one.
        num_records: records that were looked at.
        ledger: where all of them are written.
    """
    counts = Counter(exclusion.rejection.reason.value for exclusion in exclusions)
    by_rule = ", ".join(f"{reason} {count}" for reason, count in counts.most_common())
    listed = [f"  {exclusion}" for exclusion in exclusions[:_NUM_LISTED]]
    if len(exclusions) > _NUM_LISTED:
        listed.append(f"  ... and {len(exclusions) - _NUM_LISTED} more")
    return DataError(
        f"{len(exclusions)} of {num_records} records cannot be used ({by_rule}); mend them, or set "
        f"data.policy=skip to leave them out; all are listed in {ledger}:\n" + "\n".join(listed)
    )
