"""Ranks that are really killed, and a training that does not notice.

A short campaign runs by default; `python -m benchmarks.reliability` runs the long ones and every
other fault, and writes docs/reliability.md.
"""

from pathlib import Path

import pytest

from tests.faults.campaign import Layout, make_world, run_campaign, run_truth
from tests.faults.kills import MOMENTS, draw_kills

LAYOUT = Layout(dp=2)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.distributed
def test_one_kill_at_each_moment_changes_nothing(world: Path, tmp_path: Path) -> None:
    run_truth(world, tmp_path / "truth", LAYOUT)
    kills = draw_kills(len(MOMENTS), LAYOUT.world_size, seed=0)
    outcomes = run_campaign(world, tmp_path / "killed", kills, [LAYOUT], tmp_path / "truth")
    assert {outcome.kill.moment for outcome in outcomes} == set(MOMENTS)
    for outcome in outcomes:
        assert not outcome.problems, f"{outcome.kill}: {outcome.problems}"
