"""The parity matrix: what its cells cover, and that a cell is judged by its bars."""

import dataclasses
import sys
from pathlib import Path

import pytest

from benchmarks import parity_matrix
from benchmarks.parity_matrix import Cell, as_markdown, cells, measure, scenario
from tests.parity.parallel_run import Layout


def test_the_cells_cover_every_axis() -> None:
    every = cells()
    assert len(every) == len(set(every)) >= 60
    layouts = [cell.layout for cell in every]
    assert {layout.tp for layout in layouts} == {1, 2, 4}
    assert {layout.pp for layout in layouts} == {1, 2, 3, 4}
    assert {layout.dp for layout in layouts} == {1, 2}
    assert {layout.vpp for layout in layouts} == {None, 2}
    assert max(layout.world_size for layout in layouts) == 8
    for axis in ("sp", "packed", "overlap"):
        assert {getattr(layout, axis) for layout in layouts} == {False, True}
    names = {str(cell) for cell in every}
    for word in ("plain", "vision_model=full", "vision_model=selective", "drop path", "no images"):
        assert any(word in name for name in names), word
    for word in ("weight sample", "weight square", "weight micro_batch_mean", "frozen", "bf16"):
        assert any(word in name for name in names), word


@pytest.mark.distributed
def test_a_cell_fails_where_an_error_is_above_its_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = Cell(layout=Layout(dp=2), scenario=dataclasses.replace(scenario(), num_iterations=3))
    good = measure(cell)
    assert good["passed"] and good["bars"] == parity_matrix.BARS
    monkeypatch.setitem(parity_matrix.BARS, "gradient", 1e-12)
    bad = measure(cell)
    assert not bad["passed"]
    text = as_markdown([good, bad], "somewhere.")
    assert "1 of 2 cells pass" in text and text.count("**FAILED**") == 1


@pytest.mark.slow
@pytest.mark.distributed
def test_every_cell_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole table, some ten minutes."""
    monkeypatch.setattr(sys, "argv", ["parity_matrix", "--output", str(tmp_path / "parity")])
    assert parity_matrix.main() == 0
    assert "**FAILED**" not in (tmp_path / "parity.md").read_text(encoding="utf-8")
