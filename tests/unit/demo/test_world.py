"""The demo world is made once, whole or not at all."""

import dataclasses
import shutil
from pathlib import Path

import pytest

from examples.internvl_v1_2.demo import weights
from examples.internvl_v1_2.demo.world import MARKER, WorldSettings, is_current, make


def test_second_call_uses_the_cache(world: Path, settings: WorldSettings) -> None:
    before = (world / MARKER).stat().st_mtime_ns
    assert not make(world, settings)
    assert (world / MARKER).stat().st_mtime_ns == before


def test_other_settings_or_place_are_another_world(
    world: Path, settings: WorldSettings, tmp_path: Path
) -> None:
    assert is_current(world, settings)
    assert not is_current(world, dataclasses.replace(settings, seed=1))
    moved = tmp_path / "moved"
    moved.mkdir()
    shutil.copy(world / MARKER, moved)
    assert not is_current(moved, settings)


def test_broken_marker_is_no_world(settings: WorldSettings, tmp_path: Path) -> None:
    (tmp_path / MARKER).write_text('{"fingerprint": "ab', encoding="utf-8")
    assert not is_current(tmp_path, settings)


def test_foreign_folder_is_left_alone(settings: WorldSettings, tmp_path: Path) -> None:
    precious = tmp_path / "precious.txt"
    precious.write_text("mine", encoding="utf-8")
    with pytest.raises(FileExistsError, match="holds no demo world"):
        make(tmp_path, settings)
    assert precious.read_text("utf-8") == "mine"


def test_failure_leaves_nothing(
    settings: WorldSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> int:
        raise RuntimeError("disk full")

    monkeypatch.setattr(weights, "write", broken)
    with pytest.raises(RuntimeError, match="disk full"):
        make(tmp_path / "world", settings)
    assert list(tmp_path.iterdir()) == []
