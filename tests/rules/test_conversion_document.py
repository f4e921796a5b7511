"""docs/conversion.md holds the names of the code, and commands that exist."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from mmlm.conversion.name_map import TABLE

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    """The script that makes the tables, as a module."""
    file = ROOT / "tools/conversion_table.py"
    spec = importlib.util.spec_from_file_location("conversion_table", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def document() -> str:
    """The page."""
    return (ROOT / "docs/conversion.md").read_text(encoding="utf-8")


def test_document_holds_the_names_of_today(tool: ModuleType, document: str) -> None:
    assert document == tool.with_tables(document, tool.make_tables()), (
        "docs/conversion.md is not of today's names: run python tools/conversion_table.py --write"
    )


def test_every_row_is_a_line(tool: ModuleType) -> None:
    lines = [line for line in tool.make_tables().splitlines() if line.startswith("| `")]
    assert len(lines) == len(TABLE)
    for line, row in zip(lines, TABLE, strict=True):
        assert re.findall(r"`([^`]*)`", line) == [*(name for name, _ in row.hf), row.megatron]


def test_document_without_markers_is_refused(tool: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"conversion\.md must have the lines"):
        tool.with_tables("# no markers\n", "")


def test_files_and_options_exist(document: str) -> None:
    paths = set(re.findall(r"(?<![\w/.])((?:tools|examples|benchmarks)/[\w./]*\w)", document))
    assert paths
    assert not sorted(path for path in paths if not (ROOT / path).exists())
    sources = "".join(
        file.read_text(encoding="utf-8")
        for folder in ("tools/checkpoint_convert", "mmlm/commands", "tools")
        for file in (ROOT / folder).glob("*.py")
    )
    options = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", document)) - {"--help", "--nproc-per-node"}
    assert options
    assert not sorted(option for option in options if f'"{option}"' not in sources)
