"""One small demo world for all tests of the demo."""

from pathlib import Path

import pytest

from examples.internvl_v1_2.demo.playground import PlaygroundSettings
from examples.internvl_v1_2.demo.world import WorldSettings, make

SETTINGS = WorldSettings(
    playground=PlaygroundSettings(training_samples=270, held_out_samples=27), vocab_size=500
)


@pytest.fixture(scope="session")
def settings() -> WorldSettings:
    return SETTINGS


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "world"
    assert make(folder, SETTINGS)
    return folder
