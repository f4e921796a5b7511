"""Reasons are words for the ledger."""

from mmlm.data.rejection import Reason, Rejection


def test_a_rejection_reads_as_one_line() -> None:
    rejection = Rejection(reason=Reason.ODD_TURNS, detail="3 turns; complete them")
    assert str(rejection) == "odd_turns: 3 turns; complete them"


def test_every_reason_is_found_by_its_word() -> None:
    assert all(Reason(reason.value) is reason for reason in Reason)
