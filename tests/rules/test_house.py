"""House rules that a machine can read: sizes, empty __init__ files, names, who calls what."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(
    path
    for folder in ("mmlm", "tools", "examples", "tests", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
)
MAX_LINES = 400
ROOMS_WITH_A_TEST_A_FILE = ("config", "conversion", "data", "preparation")


def relative(path: Path) -> str:
    """A path as the messages show it."""
    return path.relative_to(ROOT).as_posix()


def test_no_file_is_long() -> None:
    lengths = {relative(path): len(path.read_text("utf-8").splitlines()) for path in SOURCES}
    long = {name: count for name, count in lengths.items() if count > MAX_LINES}
    assert not long, f"over {MAX_LINES} lines: does each still have one purpose?"


def test_init_files_hold_no_logic() -> None:
    for path in SOURCES:
        if path.name != "__init__.py":
            continue
        for node in ast.parse(path.read_text("utf-8")).body:
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            exports = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
            assert docstring or exports or isinstance(node, (ast.Import, ast.ImportFrom)), (
                f"{relative(path)}:{node.lineno}: __init__.py re-exports and nothing else"
            )


@pytest.mark.parametrize("room", ROOMS_WITH_A_TEST_A_FILE)
def test_every_file_has_the_test_of_its_name(room: str) -> None:
    files = [path for path in (ROOT / "mmlm" / room).glob("*.py") if path.name != "__init__.py"]
    missing = [
        f"tests/unit/{room}/test_{path.name}"
        for path in sorted(files)
        if not (ROOT / "tests/unit" / room / f"test_{path.name}").is_file()
    ]
    assert not missing


def test_modules_say_what_they_are_for() -> None:
    mute = [
        relative(path)
        for path in SOURCES
        if path.name != "__init__.py" and not ast.get_docstring(ast.parse(path.read_text("utf-8")))
    ]
    assert not mute


def test_topology_alone_makes_the_parallel_groups() -> None:
    callers = [
        relative(path)
        for path in (ROOT / "mmlm").rglob("*.py")
        if re.search(r"\binitialize_model_parallel\(", path.read_text("utf-8"))
    ]
    assert callers == ["mmlm/parallel/topology.py"]


def test_nothing_is_left_for_later() -> None:
    words = re.compile(r"\b(" + "|".join(["TO" + "DO", "FIX" + "ME", "X" * 3]) + r")\b")
    found = [relative(path) for path in SOURCES if words.search(path.read_text("utf-8"))]
    assert not found
