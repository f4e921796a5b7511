"""The loader's benchmark runs, and its report says whether the bar is met."""

from pathlib import Path
from typing import Any

from benchmarks import loader as benchmark
from benchmarks.loader import as_markdown, measure


def test_a_small_round(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(benchmark, "BATCH", 8)
    monkeypatch.setattr(benchmark, "plan_seconds", lambda iteration: 0.1)
    report = measure(16, 1)
    (entry,) = report["rounds"]
    for way in ("plain", "loader"):
        assert entry[way]["by_clock"] > 0 and entry[way]["by_processor"] > 0
    assert 20e6 < report["worker_rss_bytes"] < 200e6
    text = as_markdown(report | {"ratios": {"by_clock": 0.96, "by_processor": 0.5}})
    assert "the bar of 0.95 is met" in text
    text = as_markdown(report | {"ratios": {"by_clock": 0.94, "by_processor": 2.0}})
    assert "the bar of 0.95 is **not** met" in text
