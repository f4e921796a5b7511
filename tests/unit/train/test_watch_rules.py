"""Who is blamed: a death before an error, before silence, before a stall; and the one behind."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmlm.parallel.process import ProcessIdentity
from mmlm.train.watch_rules import (
    PHASES,
    Beat,
    Seen,
    Verdict,
    allowed_seconds,
    judge,
)


def seen(rank: int, *, silent: float = 0.5, still: float = 0.5, **fields: Any) -> Seen:
    """A healthy rank, but for what is given."""
    state = fields.pop("state", "alive")
    beat = {
        "rank": rank,
        "place": f"TP 0, PP {rank}, DP 0",
        "process": ProcessIdentity(host="node7", pid=1000 + rank, start="1", namespace="n"),
        "count": 5,
        "iteration": 7,
        "phase": "forward-backward",
        "step": 2,
        "since": "12:00:00 UTC",
        "allowed_seconds": 60.0,
        "line": "x.py:1 in f",
        "is_waiting": True,
        **fields,
    }
    return Seen(beat=Beat(**beat), silent_seconds=silent, still_seconds=still, state=state)


def verdict(*ranks: Seen) -> Verdict | None:
    """What is said of these ranks at a timeout of one minute."""
    return judge(ranks, silent_seconds=60.0, timeout_minutes=1.0)


def test_healthy_ranks_are_left_alone() -> None:
    assert verdict(seen(0), seen(1, still=59.0, phase="data"), seen(2, silent=59.0)) is None


def test_a_dead_rank_is_named_with_host_and_place() -> None:
    found = verdict(seen(0), seen(1, state="gone"), seen(2, is_cut_off=True, silent=70.0))
    assert found is not None and (found.kind, found.ranks) == ("died", (1,))
    assert found.message == (
        "rank 1 (TP 0, PP 1, DP 0; node7, process 1001) died in forward-backward of iteration 7, "
        "microbatch 2 (there since 12:00:00 UTC)"
    )


def test_several_dead_ranks_are_named_from_the_one_behind() -> None:
    ranks = [seen(0), *(seen(rank, state="gone", step=9 - rank) for rank in range(1, 8))]
    found = verdict(*ranks)
    assert found is not None and found.ranks == (7, 6, 5, 4, 3, 2, 1)
    assert found.message.startswith("rank 7 (") and found.message.endswith("and 3 more")


def test_an_error_of_one_rank_has_a_grace_until_another_is_cut_off() -> None:
    ended = seen(1, error="DataError: x.jsonl:3", silent=2.0, state="gone")
    assert verdict(seen(0), ended) is None
    found = verdict(seen(0, is_cut_off=True), ended)
    assert found is not None and (found.kind, found.ranks) == ("failed", (1,))
    assert "ended with an error (DataError: x.jsonl:3) in forward-backward" in found.message
    assert verdict(seen(0), seen(1, error="DataError", silent=5.0)) is not None


def test_silence_counts_sooner_where_a_collective_failed() -> None:
    assert verdict(seen(0), seen(1, silent=30.0, state="unknown")) is None
    for other in (seen(0, is_cut_off=True), seen(0)):
        silent = 30.0 if other.beat.is_cut_off else 60.0
        found = verdict(other, seen(1, silent=silent, state="stopped"))
        assert found is not None and (found.kind, found.ranks) == ("silent", (1,))
        assert f"no sign of life for {silent:.0f} s (its process is stopped); it was last in" in (
            found.message
        )


def test_the_lowest_place_is_behind() -> None:
    found = verdict(
        seen(0, still=61.0),
        seen(1, still=90.0, phase="data", step=0, is_waiting=False, line="loader.py:9 in get"),
        seen(2, still=61.0),
        seen(3, still=61.0, iteration=8, phase="data"),
    )
    assert found is not None and (found.kind, found.ranks) == ("stalled", (1,))
    assert found.message == (
        "rank 1 (TP 0, PP 1, DP 0; node7, process 1001) has not moved on for 61 s, at "
        "loader.py:9 in get, in data of iteration 7 (there since 12:00:00 UTC); the others wait: "
        "2 in forward-backward of iteration 7; 1 in data of iteration 8; "
        "parallel.timeout_minutes is 1"
    )


def test_among_equals_the_one_outside_of_a_collective_is_behind() -> None:
    ranks = [seen(rank, still=61.0, is_waiting=rank != 2) for rank in range(4)]
    found = verdict(*ranks)
    assert found is not None and found.ranks == (2,)
    # where all wait, the one with the fewest microbatches
    found = verdict(*(seen(rank, still=61.0, step=3 - rank) for rank in range(4)))
    assert found is not None and found.ranks == (3,)


def test_one_that_moves_keeps_all_from_being_stalled() -> None:
    assert verdict(seen(0, still=500.0), seen(1, still=1.0)) is None


def test_the_phase_of_the_one_behind_decides_how_long() -> None:
    saving = seen(0, still=300.0, iteration=6, phase="saving", allowed_seconds=360.0)
    assert verdict(saving, seen(1, still=300.0)) is None
    assert verdict(seen(0, still=361.0, iteration=6, allowed_seconds=360.0), seen(1, still=361.0))


def test_who_is_done_is_not_missed() -> None:
    assert verdict(seen(0, is_done=True, state="gone", silent=99.0), seen(1)) is None


@pytest.mark.parametrize("phase", PHASES)
def test_long_phases_and_the_first_iteration_have_their_own_allowance(phase: Any) -> None:
    usual = allowed_seconds(phase, 10.0, is_first_iteration=False)
    assert usual == {
        "data": 10.0,
        "forward-backward": 10.0,
        "optimizer": 10.0,
        "logging": 10.0,
    }.get(phase, 30.0 if phase == "replay" else 60.0)
    assert allowed_seconds(phase, 10.0, is_first_iteration=True) == max(usual, 30.0)


@given(
    st.lists(
        st.tuples(
            st.integers(0, 3),
            st.sampled_from(PHASES),
            st.integers(0, 4),
            st.booleans(),
            st.floats(60.0, 1000.0),
        ),
        min_size=1,
        max_size=12,
    )
)
def test_whoever_is_blamed_for_a_stall_is_nowhere_ahead(places: list[Any]) -> None:
    ranks = [
        seen(n, still=still, iteration=iteration, phase=phase, step=step, is_waiting=waits)
        for n, (iteration, phase, step, waits, still) in enumerate(places)
    ]
    found = verdict(*ranks)
    assert found is not None and found.kind == "stalled"
    least = min(each.beat.progress[:2] for each in ranks)
    assert all(ranks[n].beat.progress[:2] == least for n in found.ranks)


def test_words_survive_the_store() -> None:
    beat = seen(3, error="ValueError: é").beat
    assert Beat.from_json(beat.to_json().encode()) == beat
    found = verdict(seen(0), seen(1, state="gone"))
    assert found is not None and Verdict.from_json(found.to_json().encode()) == found


def test_publishing_may_take_as_long_as_saving() -> None:
    found = [
        allowed_seconds(phase, 60.0, is_first_iteration=False)
        for phase in ("logging", "publishing", "saving")
    ]
    assert found == [60.0, 360.0, 360.0]
