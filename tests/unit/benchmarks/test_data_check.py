"""The benchmark of the check: all of it at a small size, and that its bars are bars."""

import dataclasses
from pathlib import Path

import pytest

from benchmarks import data_check
from benchmarks.data_check import as_markdown, compare_rates, measure_opening
from mmlm.data import index_build


def test_both_parts_at_a_small_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_build, "_MIN_RECORDS_PER_PROCESS", 8)
    monkeypatch.setattr(data_check, "RATE_BAR", 1e-6)
    small = [
        dataclasses.replace(each, num_samples=each.num_samples // 1000)
        for each in data_check.PUBLISHED_SETS
    ]
    monkeypatch.setattr(data_check, "PUBLISHED_SETS", small)
    for name in ("rates", "indexes"):
        (tmp_path / name).mkdir()
    rates = compare_rates(tmp_path / "rates", num_samples=16, num_rounds=1)
    (only,) = rates["rounds"]
    assert rates["passed"] and only["ratio_to_loops"] == rates["ratio_to_loops"] > 0
    assert only["check"]["cpu_milliseconds"] > 0 and only["loop"]["rate"] > 0

    opening = measure_opening(tmp_path / "indexes", num_rounds=1)
    total = sum(each.num_samples for each in small)
    assert opening["num_samples"] == total > 1000
    assert opening["disk_bytes"] == pytest.approx(34 * total, abs=9 * 512)
    assert opening["resident_bytes"] > opening["own_bytes"] > 0
    text = as_markdown(rates, opening | {"passed": False}, "somewhere")
    assert "16 records with a JPEG" in text and f"index of {total:,} records in nine" in text
    assert "bar 1e-06: met" in text and text.endswith("**NOT met**.\n")
