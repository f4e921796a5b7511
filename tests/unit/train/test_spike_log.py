"""loss_spikes.jsonl: what is written, and what a resume takes up and drops."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from mmlm.data.step_plan import StepPlan
from mmlm.train.spike_log import SpikeLog


def plan(iteration: int) -> StepPlan:
    """Four samples: DP rank 0 has a microbatch of two rows, DP rank 1 one of one row."""
    first = 4 * iteration
    return StepPlan(
        iteration=iteration,
        epoch=0,
        microbatches=((((first,), (first + 1,)),), (((first + 2, first + 3),),)),
        token_weights={},
        num_samples=4,
        num_tokens=24,
        num_supervised_tokens=9,
        num_images=3,
        num_computed_tokens=32,
        pads_rows=True,
        seq_length=16,
    )


def run(folder: Path, losses: list[float], start: int, end: int) -> list[int]:
    """What a training does; return the iterations that were spikes."""
    log = SpikeLog(folder, start_iteration=start, factor=8.0, window=30)
    spikes = []
    with (folder / "metrics.jsonl").open("a") as metrics:
        for iteration in range(start, end):
            metrics.write(json.dumps({"iteration": iteration, "loss": losses[iteration]}) + "\n")
            metrics.flush()
            if log.look(plan(iteration), losses[iteration]):
                spikes.append(iteration)
    return spikes


def lines(folder: Path) -> list[dict[str, Any]]:
    """The lines of the file."""
    return [json.loads(line) for line in (folder / "loss_spikes.jsonl").read_text().splitlines()]


def test_a_spike_is_said_and_written_with_its_samples(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    noise = random.Random(0)
    losses = [1.0 + noise.gauss(0, 0.02) for _ in range(60)]
    losses[40] = 2.0
    assert run(tmp_path, losses, 0, 60) == [40]
    (line,) = lines(tmp_path)
    assert line["sample_ids"] == [[[160], [161]], [[162, 163]]]
    assert line["iteration"] == 40 and line["loss"] == 2.0 and line["num_losses"] == 30
    assert line["usual_median"] == pytest.approx(1.0, abs=0.02)
    assert line["usual_median"] < line["limit"] < 2.0


def test_a_resume_judges_as_if_there_had_been_no_interruption(tmp_path: Path) -> None:
    noise = random.Random(0)
    losses = [1.0 + noise.gauss(0, 0.02) for _ in range(60)]
    losses[40] = losses[52] = 2.0
    whole, part = tmp_path / "whole", tmp_path / "part"
    whole.mkdir()
    part.mkdir()
    assert run(whole, losses, 0, 60) == [40, 52]
    run(part, losses, 0, 55)
    # the checkpoint was after 45: metrics drops what follows, as MetricsLog does
    metrics = (part / "metrics.jsonl").read_text().splitlines()[:45]
    (part / "metrics.jsonl").write_text("".join(line + "\n" for line in metrics))
    with (part / "loss_spikes.jsonl").open("a") as file:
        file.write('{"iteration": 54, "lo')
    assert run(part, losses, 45, 60) == [52]
    assert lines(part) == lines(whole)


def test_without_metrics_nothing_is_usual_yet(tmp_path: Path) -> None:
    assert run(tmp_path, [1.0] * 45 + [9.0], 30, 46) == []
    assert not (tmp_path / "loss_spikes.jsonl").exists()


def test_an_iteration_left_out_takes_its_place_in_a_resumed_window(tmp_path: Path) -> None:
    metrics = [{"iteration": k, "loss": None if k % 2 else 1.0} for k in range(60)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in metrics))
    log = SpikeLog(tmp_path, start_iteration=60, factor=8.0, window=30)
    # the last 30 have 15 losses, as in a run without an interruption: too few to judge by
    assert not log.look(plan(60), 9.0)


def test_a_spike_that_cannot_be_written_is_said_with_its_samples(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = SpikeLog(tmp_path, start_iteration=0, factor=8.0, window=30)
    (tmp_path / "loss_spikes.jsonl").mkdir()
    for iteration in range(25):
        log.look(plan(iteration), 1.0)
    assert log.look(plan(25), 9.0)
    assert "CANNOT BE WRITTEN" in caplog.text and "written nowhere: [[[100], [101]]" in caplog.text
