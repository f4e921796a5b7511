"""The ledger comes back as written; the strict error names places and counts."""

from pathlib import Path

import pytest

from mmlm.data.ledger import (
    LedgerEntry,
    count_entries,
    describe_counts,
    read_ledger,
    strict_error,
    temporary_path,
    write_ledger,
)
from mmlm.data.rejection import Action, Reason


def exclusion(line: int, reason: Reason = Reason.ODD_TURNS) -> LedgerEntry:
    return LedgerEntry(
        set_name="tiny",
        file="a.jsonl",
        line=line,
        identity="红",
        reason=reason,
        detail="1 turns\u2028\r",
    )


def test_the_ledger_comes_back_as_written(tmp_path: Path) -> None:
    exclusions = (exclusion(1), exclusion(9, Reason.IMAGE_COUNT))
    path = tmp_path / "data_ledger.jsonl"
    write_ledger(path, exclusions)
    assert read_ledger(path) == exclusions
    assert path.read_text(encoding="utf-8").split("\n")[0] == (
        '{"set": "tiny", "file": "a.jsonl", "line": 1, "id": "红", "action": "excluded", '
        '"reason": "odd_turns", "detail": "1 turns\u2028\\r"}'
    )
    assert list(tmp_path.iterdir()) == [path]


def test_the_strict_error_lists_ten_and_counts_the_rest() -> None:
    exclusions = [exclusion(line) for line in range(1, 13)] + [exclusion(20, Reason.IMAGE_COUNT)]
    text = str(strict_error(exclusions, 500, Path("x/data_ledger.jsonl")))
    assert text.startswith(
        "13 of 500 records cannot be used (odd_turns 12, image_count 1); mend them, or set "
        "data.policy=skip to leave them out; all are listed in x/data_ledger.jsonl:\n"
        "  a.jsonl:1 (set 'tiny', id '红') odd_turns: 1 turns\u2028\r\n"
    )
    assert text.count("a.jsonl:") == 10
    assert text.endswith("... and 3 more")


@pytest.mark.parametrize("count", [1, 10])
def test_a_short_list_is_complete(count: int) -> None:
    text = str(strict_error([exclusion(1)] * count, count, Path("x")))
    assert text.count("a.jsonl:1") == count and "more" not in text


def test_entries_are_counted_by_action_and_reason() -> None:
    reasons = [Reason.IMAGE_COUNT, Reason.ODD_TURNS, Reason.ODD_TURNS, Reason.FIRST_TURN_DROPPED]
    counts = count_entries(exclusion(line, reason) for line, reason in enumerate(reasons))
    assert counts == {
        Action.EXCLUDED: {Reason.ODD_TURNS: 2, Reason.IMAGE_COUNT: 1},
        Action.REPAIRED: {Reason.FIRST_TURN_DROPPED: 1},
    }
    text = "3 excluded (odd_turns 2, image_count 1); 1 repaired (first_turn_dropped 1)"
    assert describe_counts(counts) == text
    assert describe_counts(count_entries([])) == "nothing"


def test_a_temporary_name_is_of_one_process_of_one_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, names = tmp_path / "a.npy", set()
    for host, process in (("one", 7), ("two", 7), ("one", 8)):
        monkeypatch.setattr("socket.gethostname", lambda host=host: host)
        monkeypatch.setattr("os.getpid", lambda process=process: process)
        names.add(temporary_path(path))
    assert len(names) == 3
    assert all(name.parent == tmp_path and name.suffix == ".npy" for name in names)
