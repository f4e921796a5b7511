"""A damaged checkpoint is passed over, loudly; without an intact one nothing begins."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor

from mmlm.checkpoint import fallback
from mmlm.checkpoint.fallback import find_intact, set_damaged_aside
from mmlm.checkpoint.manifest import MANIFEST_FILE, iterations, resolve
from mmlm.checkpoint.save_load import save_checkpoint
from mmlm.errors import CheckpointError
from tests.distributed.launch import group_of_one
from tests.unit.checkpoint.test_manifest import MANIFEST


def save(root: Path, iteration: int, limit: int = 0) -> Path:
    state = {"a": ShardedTensor.from_rank_offsets("a", torch.full((50,), float(iteration)))}
    manifest = replace(MANIFEST, iteration=iteration)
    return save_checkpoint(root, state, manifest, assets={}, save_total_limit=limit)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    with group_of_one():
        for iteration in (3, 6, 9):
            save(tmp_path / "checkpoints", iteration)
    return tmp_path / "checkpoints"


def damage(directory: Path, kind: str) -> str:
    """Damage a checkpoint; what the message must say."""
    data = directory / "__0_0.distcp"
    if kind == "flipped":
        content = bytearray(data.read_bytes())
        content[600] ^= 1
        data.write_bytes(content)
        return "__0_0.distcp: SHA-256 is"
    if kind == "cut":
        data.write_bytes(data.read_bytes()[:-1])
        return "__0_0.distcp: has"
    if kind == "no directory":
        shutil.rmtree(directory)
        return "mmlm.json: missing"
    (directory / kind).unlink()
    return kind


KINDS = [
    "flipped",
    "cut",
    "no directory",
    "__0_0.distcp",
    ".metadata",
    "metadata.json",
    "common.pt",
]


@pytest.mark.parametrize("kind", [*KINDS, MANIFEST_FILE])
def test_damage_leads_back_to_the_newest_intact_one(
    root: Path, kind: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = damage(root / "iter_0000009", kind)
    monkeypatch.setattr(fallback.get_logger(), "propagate", True)
    with group_of_one(), caplog.at_level("ERROR", "mmlm"):
        found = find_intact(root, checksums=True)
        assert found is not None and found.path.name == "iter_0000006"
        set_damaged_aside(found)
        assert text in caplog.text
        assert "DAMAGED CHECKPOINT iter_0000009" in caplog.text
        assert "The run goes back to iter_0000006" in caplog.text
        assert resolve(root).name == "iter_0000006"
        assert (root / "iter_0000009.damaged").exists() == (kind != "no directory")
        # it neither counts as one of the newest nor is it in the way
        save(root, 9, limit=2)
        assert [each.name for each in iterations(root)] == ["iter_0000006", "iter_0000009"]
        found = find_intact(root, checksums=True)
        assert found is not None and found.path.name == "iter_0000009" and not found.damaged


def test_two_damaged_ones_are_both_passed_over(root: Path) -> None:
    damage(root / "iter_0000009", "flipped")
    damage(root / "iter_0000006", MANIFEST_FILE)
    with group_of_one():
        found = find_intact(root, checksums=True)
    assert found is not None and found.path.name == "iter_0000003"
    assert [path.name for path in found.damaged] == ["iter_0000009", "iter_0000006"]


def test_none_intact_is_an_error_and_never_a_fresh_start(root: Path) -> None:
    texts = [damage(each, "flipped") for each in iterations(root)]
    with group_of_one(), pytest.raises(CheckpointError) as caught:
        find_intact(root, checksums=True)
    assert "none of 3 checkpoints is intact, so the run cannot go on" in str(caught.value)
    assert all(text in str(caught.value) for text in texts)
    assert len(iterations(root)) == 3, "nothing is renamed when there is nothing to go back to"


def test_a_latest_that_names_nothing_is_no_fresh_start(tmp_path: Path) -> None:
    (tmp_path / "latest").write_text("iter_0000003\n")
    with group_of_one(), pytest.raises(CheckpointError, match="none of 1 checkpoints is intact"):
        find_intact(tmp_path, checksums=True)


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    with group_of_one():
        assert find_intact(tmp_path / "nowhere", checksums=True) is None
        assert find_intact(tmp_path, checksums=True) is None


def test_without_checksums_a_flipped_bit_is_not_looked_for(root: Path) -> None:
    damage(root / "iter_0000009", "flipped")
    with group_of_one():
        found = find_intact(root, checksums=False)
    assert found is not None and found.path.name == "iter_0000009"


def test_another_version_of_mmlm_is_no_damage(root: Path) -> None:
    file = root / "iter_0000009" / MANIFEST_FILE
    file.write_text(file.read_text().replace('"format_version": 1', '"format_version": 2'))
    with group_of_one(), pytest.raises(CheckpointError, match="format_version is 2"):
        find_intact(root, checksums=True)


@pytest.mark.parametrize("left", [".iter_0000012.tmp", ".iter_0000003.deleted", ".latest.tmp"])
def test_leftovers_of_dead_saves_are_removed(root: Path, left: str) -> None:
    if left == ".latest.tmp":
        (root / left).write_text("iter_0000012")
    else:
        shutil.copytree(root / "iter_0000003", root / left)
    with group_of_one():
        find_intact(root, checksums=False)
    assert not (root / left).exists()
    assert len(iterations(root)) == 3


def test_a_checkpoint_that_was_being_replaced_gets_its_name_back(root: Path) -> None:
    (root / "iter_0000009").rename(root / ".iter_0000009.replaced")
    with group_of_one():
        found: Any = find_intact(root, checksums=True)
        assert found.path.name == "iter_0000009" and not found.damaged
        shutil.copytree(root / "iter_0000009", root / ".iter_0000009.replaced")
        find_intact(root, checksums=True)
    assert not (root / ".iter_0000009.replaced").exists()


def test_what_the_metadata_names_must_be_there_also_without_a_record(root: Path) -> None:
    newest = root / "iter_0000009"
    (newest / "integrity.json").unlink()
    (newest / "__0_0.distcp").unlink()
    with group_of_one():
        found = find_intact(root, checksums=True)
    assert found is not None and found.path.name == "iter_0000006"
    assert "__0_0.distcp: missing, and .metadata names it" in found.damaged[newest]


def test_an_earlier_damaged_one_is_kept_beside_the_next(root: Path) -> None:
    for kept in ("iter_0000009.damaged", "iter_0000009.damaged.2", "iter_0000009.damaged.3"):
        with group_of_one():
            save(root, 9)
            damage(root / "iter_0000009", "flipped")
            found = find_intact(root, checksums=True)
            assert found is not None
            set_damaged_aside(found)
        assert (root / kept / MANIFEST_FILE).is_file()
    assert (root / "iter_0000009.damaged").is_dir()


def test_a_branch_that_was_left_on_purpose_is_set_aside_and_never_counted(
    root: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "latest").write_text("iter_0000003\n")
    monkeypatch.setattr(fallback.get_logger(), "propagate", True)
    with group_of_one(), caplog.at_level("WARNING", "mmlm"):
        found = find_intact(root, checksums=True)
        assert found is not None and found.path.name == "iter_0000003" and not found.damaged
        set_damaged_aside(found)
        assert "iter_0000009 is newer than what `latest` names" in caplog.text
        save(root, 7, limit=2)
        assert [each.name for each in iterations(root)] == ["iter_0000003", "iter_0000007"]
        damage(root / "iter_0000007", "flipped")
        found = find_intact(root, checksums=True)
    assert found is not None and found.path.name == "iter_0000003" and not found.abandoned
    assert (root / "iter_0000006.abandoned" / MANIFEST_FILE).is_file()
    assert (root / "iter_0000009.abandoned" / MANIFEST_FILE).is_file()


def test_above_latest_nothing_is_fallen_back_to(root: Path) -> None:
    (root / "latest").write_text("iter_0000003\n")
    damage(root / "iter_0000003", "flipped")
    with group_of_one(), pytest.raises(CheckpointError) as caught:
        find_intact(root, checksums=True)
    assert "none of 1 checkpoints is intact" in str(caught.value)
    assert "so not tried: iter_0000009, iter_0000006" in str(caught.value)
