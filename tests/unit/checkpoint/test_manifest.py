"""Manifests, and checkpoints that appear whole, are found and are pruned."""

import contextlib
import itertools
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mmlm.checkpoint import manifest as module
from mmlm.checkpoint.manifest import (
    Manifest,
    above_latest,
    iteration_name,
    iterations,
    named_iterations,
    prune,
    publish,
    resolve,
    temporary_dir,
    tidy,
)
from mmlm.config.model import LanguageConfig, ModelConfig, VisionConfig
from mmlm.errors import CheckpointError

MODEL = ModelConfig(
    vision=VisionConfig(
        hidden_size=40,
        ffn_hidden_size=80,
        num_layers=3,
        num_attention_heads=5,
        image_size=56,
        patch_size=14,
    ),
    language=LanguageConfig(
        hidden_size=48,
        ffn_hidden_size=72,
        num_layers=3,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=12,
        vocab_size=96,
    ),
    ps_version="v2",
)
MANIFEST = Manifest(
    iteration=200,
    consumed_samples=102400,
    dtype="bf16",
    model=MODEL,
    run_config={"train": {"seed": 42}, "名": "字"},
    has_optimizer=True,
)


def save(root: Path, iteration: int) -> Path:
    """A checkpoint with nothing but a manifest."""
    directory = temporary_dir(root, iteration)
    directory.mkdir(parents=True)
    (directory / "data").mkdir()
    replace(MANIFEST, iteration=iteration).write(directory)
    return publish(directory, root, iteration)


@pytest.mark.parametrize("data", [None, {"图": 12, "text": 3, "tokens": 4096}])
def test_a_manifest_reads_back(tmp_path: Path, data: dict[str, int] | None):
    manifest = replace(MANIFEST, data=data)
    manifest.write(tmp_path)
    assert Manifest.read(tmp_path) == manifest


def test_a_manifest_without_data_is_read(tmp_path: Path):
    MANIFEST.write(tmp_path)
    file = tmp_path / "mmlm.json"
    content = json.loads(file.read_text())
    del content["data"]
    file.write_text(json.dumps(content))
    assert Manifest.read(tmp_path) == MANIFEST


def test_damage_is_named(tmp_path: Path):
    file = tmp_path / "mmlm.json"
    with pytest.raises(CheckpointError, match=r"mmlm\.json: missing; not a checkpoint of mmlm"):
        Manifest.read(tmp_path)
    file.write_text("{")
    with pytest.raises(CheckpointError, match=r"mmlm\.json: damaged"):
        Manifest.read(tmp_path)
    MANIFEST.write(tmp_path)
    good = json.loads(file.read_text())
    for change, message in (
        ({"format_version": 2}, "format_version is 2, this version of mmlm reads 1"),
        ({"stray": 1}, "damaged: .*'stray'"),
        ({"model": {**good["model"], "ps_version": "v9"}}, "damaged: .*ps_version 'v9'"),
        ({"model": {"vision": {}}}, "damaged"),
        ({"model": 3}, "damaged: ModelConfig must be an object of its fields, found 3"),
        ({"model": None}, "damaged: ModelConfig must be an object"),
        ({"model": {**good["model"], "depth": 3}}, "damaged: ModelConfig has no field 'depth'"),
    ):
        file.write_text(json.dumps({**good, **change}))
        with pytest.raises(CheckpointError, match=message):
            Manifest.read(tmp_path)
    file.write_text("[]")
    with pytest.raises(CheckpointError, match="format_version is None"):
        Manifest.read(tmp_path)


def test_the_newest_is_published_last_and_found(tmp_path: Path):
    assert save(tmp_path, 200) == tmp_path / "iter_0000200"
    assert save(tmp_path, 400) == tmp_path / "iter_0000400"
    assert resolve(tmp_path) == tmp_path / "iter_0000400"
    assert resolve(tmp_path / "iter_0000200") == tmp_path / "iter_0000200"
    assert (tmp_path / "latest").read_text() == "iter_0000400\n"
    names = [iteration_name(200), iteration_name(400), "latest"]
    assert sorted(each.name for each in tmp_path.iterdir()) == names


def test_what_cannot_be_resolved_is_explained(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"nowhere: does not exist; a checkpoint is a folder"):
        resolve(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds neither; a checkpoint is a folder"):
        resolve(tmp_path)
    (tmp_path / "latest").write_text("../../etc")
    with pytest.raises(CheckpointError, match=r"says '\.\./\.\./etc', which is not the name"):
        resolve(tmp_path)
    save(tmp_path, 200)
    (tmp_path / "latest").write_text("iter_0000400")
    message = r"iter_0000400 is missing or incomplete; give one of \['iter_0000200'\] itself"
    with pytest.raises(CheckpointError, match=message):
        resolve(tmp_path)


def test_without_latest_the_newest_complete_one_is_meant(tmp_path: Path):
    """A kill after the first checkpoint was complete and before it was named."""
    for iteration in (1000, 200):
        save(tmp_path, iteration)
    unfinished = temporary_dir(tmp_path, 2000)
    unfinished.mkdir()
    MANIFEST.write(unfinished)
    (tmp_path / iteration_name(3000)).mkdir()  # without a manifest: half deleted
    (tmp_path / "latest").unlink()
    assert resolve(tmp_path) == tmp_path / "iter_0001000"


@pytest.mark.parametrize("killed_in", ["rename", "write_text", "replace", "_remove"])
@pytest.mark.parametrize("call", [0, 1])
@pytest.mark.parametrize("iteration", [200, 400])
def test_a_kill_at_any_moment_leaves_a_usable_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_in: str, call: int, iteration: int
):
    save(tmp_path, 200)
    owner = {"replace": module.os, "_remove": module}.get(killed_in, Path)
    original = getattr(owner, killed_in)
    num_calls = itertools.count()

    def die_at_that_call(*args: Any, **kwargs: Any) -> Any:
        if next(num_calls) == call:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    directory = temporary_dir(tmp_path, iteration)
    directory.mkdir()
    replace(MANIFEST, iteration=iteration).write(directory)
    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(owner, killed_in, die_at_that_call)
        publish(directory, tmp_path, iteration)
    assert Manifest.read(resolve(tmp_path)).iteration in (200, iteration)
    shutil.rmtree(directory, ignore_errors=True)
    save(tmp_path, iteration)
    assert resolve(tmp_path).name == iteration_name(iteration)


def killed_before_naming(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Iteration 400 has its name, and `latest` still says 200."""
    save(root, 200)

    def die(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            save(root, 400)
    assert (root / "latest").read_text() == "iter_0000200\n"
    assert iterations(root)[-1].name == "iter_0000400"


def test_a_checkpoint_that_a_kill_left_unnamed_is_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    killed_before_naming(tmp_path, monkeypatch)
    tidy(tmp_path)
    assert [each.name for each in named_iterations(tmp_path)] == ["iter_0000400", "iter_0000200"]
    assert above_latest(tmp_path) == []
    assert sorted(each.name for each in tmp_path.glob(".*")) == []


def test_going_back_after_such_a_kill_is_obeyed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    killed_before_naming(tmp_path, monkeypatch)
    later = (tmp_path / ".latest.tmp").stat().st_mtime_ns + 1
    (tmp_path / "latest").write_text("iter_0000200")
    os.utime(tmp_path / "latest", ns=(later, later))
    tidy(tmp_path)
    assert [each.name for each in named_iterations(tmp_path)] == ["iter_0000200"]
    assert [each.name for each in above_latest(tmp_path)] == ["iter_0000400"]
    assert not (tmp_path / ".latest.tmp").exists()


def test_a_name_without_its_checkpoint_is_dropped(tmp_path: Path):
    save(tmp_path, 200)
    (tmp_path / ".latest.tmp").write_text("iter_0000400\n")
    tidy(tmp_path)
    assert (tmp_path / "latest").read_text() == "iter_0000200\n"
    assert not (tmp_path / ".latest.tmp").exists()


def test_the_same_iteration_is_replaced(tmp_path: Path):
    old = save(tmp_path, 200)
    (old / "old").write_text("")
    new = save(tmp_path, 200)
    assert new == old
    assert not (new / "old").exists()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["iter_0000200", "latest"]


def test_prune_keeps_the_newest_and_the_latest(tmp_path: Path):
    for iteration in (200, 1000, 400, 600):
        save(tmp_path, iteration)
    assert prune(tmp_path, 0) == []
    assert prune(tmp_path, 4) == []
    # latest is 600, the last one saved, although 1000 is there
    assert [each.name for each in prune(tmp_path, 1)] == ["iter_0000200", "iter_0000400"]
    assert [each.name for each in iterations(tmp_path)] == ["iter_0000600", "iter_0001000"]
    assert iterations(tmp_path / "nowhere") == []


def test_prune_after_going_back_keeps_the_new_branch(tmp_path: Path):
    for iteration in (400, 600, 800, 200, 300):
        save(tmp_path, iteration)
    assert prune(tmp_path, 2) == []
    assert [each.name for each in prune(tmp_path, 1)] == ["iter_0000200"]
    assert len(iterations(tmp_path)) == 4
