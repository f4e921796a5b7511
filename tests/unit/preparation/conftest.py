"""An empty playground for each test."""

from pathlib import Path

import pytest

from mmlm.preparation.layout import Playground


@pytest.fixture
def playground(tmp_path: Path) -> Playground:
    return Playground(root=tmp_path / "playground")
