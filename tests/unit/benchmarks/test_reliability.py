"""The page of faults by hand, and as a slow test the whole of it."""

from pathlib import Path

import pytest

from benchmarks.reliability import MIN_KILLS, Seen, as_markdown, main
from tests.faults.campaign import Outcome
from tests.faults.kills import MOMENTS, Kill, Moment, draw_kills


def outcome(moment: Moment, *problems: str, seconds: float = 1.0) -> Outcome:
    return Outcome(
        kill=Kill(moment=moment, rank=1, turn=0, fraction=0.5),
        iterations_before=("iter_0000002",),
        iterations_after=("iter_0000002", "iter_0000004"),
        started_at=2,
        seconds_to_end=seconds,
        problems=problems,
    )


def test_page_counts_what_went_wrong() -> None:
    outcomes = [
        outcome("iteration", seconds=2.5),
        outcome("iteration"),
        outcome("commit", "iter_0000002 was lost; there are ()", "iteration 3: loss is 1, not 2"),
    ]
    seen = [
        Seen(fault="A full\n    disk.", outcome="goes on", is_right=True),
        Seen(fault="A byte.", outcome="Traceback\nAssertionError: not seen", is_right=False),
    ]
    page = as_markdown(outcomes, seen)
    assert "**3 ranks killed with SIGKILL, 2 without a trace.**" in page
    assert "update) | 2 | 2 | 0 | 2.5 s |" in page
    assert "old ones are deleted | 1 | 0 | 1 | 1.0 s |" in page
    assert "HuggingFace folder is written |" not in page
    assert "| A full disk. | goes on | yes |" in page
    assert "| A byte. | AssertionError: not seen | **no** |" in page


def test_kills_are_drawn_anew_for_each_seed_and_the_same_for_the_same() -> None:
    drawn = draw_kills(8, 4, seed=3)
    assert drawn == draw_kills(8, 4, seed=3) != draw_kills(8, 4, seed=4)
    assert {kill.moment for kill in drawn} == set(MOMENTS)
    assert all(kill.rank == 0 for kill in drawn if kill.moment == "commit")
    assert len({kill.fraction for kill in drawn}) == 8


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_everything_is_survived(tmp_path: Path) -> None:
    assert main(["--output", str(tmp_path / "page.md")]) == 0
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    kills = int(page.split("**")[1].split()[0])
    assert kills >= MIN_KILLS
