"""The README's map names every file, and no file that is gone."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    """The script that makes the map, as a module."""
    spec = importlib.util.spec_from_file_location("readme_map", ROOT / "tools/readme_map.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_holds_the_map_of_today(tool: ModuleType) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme == tool.with_map(readme, tool.make_map(ROOT)), (
        "the map in README.md is not of today's files: run python tools/readme_map.py --write"
    )


def test_map_has_one_line_a_file(tool: ModuleType) -> None:
    lines = [line for line in tool.make_map(ROOT).splitlines() if line.startswith("  ")]
    names = [line.split()[0] for line in lines]
    assert names == [path.name for path in tool.mapped_files(ROOT)]


def test_map_takes_docstrings_and_comments(tool: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "mmlm/data").mkdir(parents=True)
    (tmp_path / "mmlm/data/packing.py").write_text('"""Packs.\n\nAnd more."""\n')
    (tmp_path / "mmlm/data/__init__.py").write_text("")
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools/do.sh").write_text("#!/bin/bash\n# Does it.\n# And more.\n")
    assert tool.make_map(tmp_path) == (
        "```text\nmmlm/data/\n  packing.py  Packs.\n\ntools/\n  do.sh       Does it.\n```\n"
    )


def test_file_without_a_first_line_is_named(tool: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "mute.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match=r"mute\.py: the map needs a first line"):
        tool.summary(tmp_path / "mute.py")


def test_readme_without_markers_is_refused(tool: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"README\.md must have the lines"):
        tool.with_map("# no markers\n", "")
