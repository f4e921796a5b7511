"""The report: its numbers, its baseline, its files."""

import json
from pathlib import Path
from typing import Any

import pytest

from examples.internvl_v1_2.demo import report


def write_set(folder: Path, name: str, conversations: list[list[tuple[str, str]]]) -> Any:
    file = folder / f"{name}.jsonl"
    lines = []
    for turns in conversations:
        values = [value for turn in turns for value in turn]
        record = {"conversations": [{"from": "x", "value": value} for value in values]}
        lines.append(json.dumps(record))
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {"annotation": str(file)}


def scores(loss: float, match: float) -> dict[str, Any]:
    return {"loss": loss, "exact_match": match, "num_samples": 4}


def test_baseline_is_the_most_frequent_answer_to_the_same_question(tmp_path: Path) -> None:
    training = {
        "a": write_set(
            tmp_path,
            "train",
            [
                [("<image>\ncolour?", "red"), ("shape?", "b")],
                [("colour?", "red")],
                [("colour?", "blue")],
                [("shape?", "a")],
            ],
        )
    }
    held_out = {
        "a": write_set(
            tmp_path,
            "held",
            [
                [("<image>\ncolour?", "red")],
                [("colour?", "blue")],
                [("shape?", "a")],
                [("never asked?", "red")],
            ],
        )
    }
    # red (2 of 3) and a (a tie, first in order) are right; blue and the unseen question are wrong
    assert report.majority_baseline(training, held_out) == {"a": 0.5}


def test_metrics_come_in_order_and_the_last_line_of_an_iteration_counts(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    lines = [{"iteration": k, "loss": loss} for k, loss in ((1, 5.0), (0, 6.0), (1, 4.0))]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert [line["loss"] for line in report.read_metrics(file)] == [6.0, 4.0]


def test_report_says_it_all(tmp_path: Path) -> None:
    world, run = tmp_path / "world", tmp_path / "run"
    world.mkdir()
    run.mkdir()
    meta = {"charts": write_set(world, "charts", [[("colour?", "red")], [("colour?", "blue")]])}
    for name in (report.TRAINING_META, report.HELD_OUT_META):
        (world / name).write_text(json.dumps(meta), encoding="utf-8")
    for name, loss, match in (("before", 7.0, 0.0), ("after", 0.5, 0.75)):
        content = {"total": scores(loss, match), "sets": {"charts": scores(loss, match)}}
        (run / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    lines = [
        {"iteration": k, "loss": 7.0 / (k + 1), "iteration_seconds": 2.0, "num_tokens": 100}
        for k in range(40)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = report.make_report(
        report.ReportInputs(
            world=world,
            run=run,
            before=run / "before.json",
            after=run / "after.json",
            checkpoint=run / "checkpoints/iter_0000040",
            hf=run / "hf",
            wall_seconds=125.4,
        )
    )
    assert "Held-out loss 7.000 before, 0.500 after" in text
    assert "0.0% before, 75.0% after; the majority answer scores 50.0%" in text
    assert "40 iterations in 1 min 20 s, 50 tokens/s" in text
    assert "whole script: 2 min 05 s" in text
    assert str(run / "checkpoints/iter_0000040") in text
    assert (run / "report.md").read_text("utf-8") == text
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert len({len(line) for line in text.splitlines() if line.startswith("|")}) == 1


@pytest.mark.parametrize(("seconds", "text"), [(59.9, "0 min 59 s"), (3605, "60 min 05 s")])
def test_minutes(seconds: float, text: str) -> None:
    assert report._minutes(seconds) == text
