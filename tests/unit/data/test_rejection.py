"""Reasons are words for the ledger."""

from pathlib import Path

from mmlm.data.rejection import Action, Reason, Rejection

DOCS = Path(__file__).resolve().parents[3] / "docs" / "data_check.md"


def test_a_rejection_reads_as_one_line() -> None:
    rejection = Rejection(reason=Reason.ODD_TURNS, detail="3 turns; complete them")
    assert str(rejection) == "odd_turns: 3 turns; complete them"


def test_every_reason_is_found_by_its_word() -> None:
    assert all(Reason(reason.value) is reason for reason in Reason)


def test_the_page_on_the_ledger_has_every_reason_under_its_action() -> None:
    rows = [line.split("|")[1:3] for line in DOCS.read_text("utf-8").splitlines() if "| `" in line]
    for reason in Reason:
        actions = [action.strip() for action, reasons in rows if f"`{reason.value}`" in reasons]
        assert actions == [reason.action.value], reason


def test_only_what_is_left_out_is_excluded() -> None:
    used = {reason for reason in Reason if reason.action != Action.EXCLUDED}
    assert used == {
        Reason.LONGER_THAN_SEQ_LENGTH,
        Reason.FIRST_TURN_DROPPED,
        Reason.PLACEHOLDER_INSERTED,
        Reason.LITERAL_PLACEHOLDER,
    }
