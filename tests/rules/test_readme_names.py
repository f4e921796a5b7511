"""What the README and CONTRIBUTING name exists: files, recipes and settings."""

import ast
import re
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from mmlm.config.schema import RunConfig

ROOT = Path(__file__).resolve().parents[2]
TEXTS = {name: (ROOT / name).read_text("utf-8") for name in ("README.md", "CONTRIBUTING.md")}
OWN_FOLDERS = r"(?:mmlm|tools|examples|tests|\.ci)"


@pytest.mark.parametrize("name", TEXTS)
def test_files_exist(name: str) -> None:
    paths = set(re.findall(rf"(?<![\w/.])({OWN_FOLDERS}/[\w./]*\w)", TEXTS[name]))
    assert paths
    assert not sorted(path for path in paths if not (ROOT / path).exists())


def test_recipes_exist() -> None:
    named = set(re.findall(r"(examples/[\w/]+\.py):(\w+)", "".join(TEXTS.values())))
    assert named
    for path, function in named:
        tree = ast.parse((ROOT / path).read_text("utf-8"))
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_settings_exist() -> None:
    settings = set(re.findall(r"--set (\w+)\.(\w+)=", "".join(TEXTS.values())))
    assert settings
    for section, field in settings:
        part = getattr(RunConfig(), section)
        assert is_dataclass(part)
        assert field in {entry.name for entry in fields(part)}
