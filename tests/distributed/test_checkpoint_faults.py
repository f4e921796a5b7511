"""Trainings whose checkpoints are slow, damaged or meet a full disk: nothing is lost."""

import errno
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mmlm.checkpoint import shard_writer
from mmlm.checkpoint.integrity import read_integrity
from mmlm.checkpoint.manifest import iterations, resolve
from mmlm.checkpoint.tensor_reader import TensorReader
from mmlm.config.schema import RunConfig
from tests.distributed.launch import RankFailure, run_ranks
from tests.distributed.test_trainer import assert_same_curve, config, curve, train_rank, world

__all__ = ["world"]  # a fixture

pytestmark = pytest.mark.distributed

LAYOUT = {"tp": 2, "pp": 2, "sp": True, "overlap": True}
NUM_RANKS = 8


def settings(world: Path, output: Path, *, layout: dict[str, Any], **checkpoint: Any) -> RunConfig:
    run = config(world, output, **layout)
    return replace(run, checkpoint=replace(run.checkpoint, **checkpoint))


def train_with_a_slow_disk(run: RunConfig) -> None:
    original = shard_writer._HashedFile.write_tensor

    def slow(self: Any, tensor: torch.Tensor) -> None:
        time.sleep(0.02)
        original(self, tensor)

    shard_writer._HashedFile.write_tensor = slow  # type: ignore[method-assign]
    train_rank(run)


def assert_same_bits(found: Path, truth: Path) -> None:
    readers = TensorReader(found), TensorReader(truth)
    assert readers[0].infos == readers[1].infos
    for key in readers[1].infos:
        assert torch.equal(readers[0].read(key), readers[1].read(key)), key


def copy_of(run: Path, target: Path, *iteration: int) -> None:
    for each in iteration:
        name = f"iter_{each:07d}"
        shutil.copytree(run / "checkpoints" / name, target / "checkpoints" / name)
    (target / "checkpoints" / "latest").write_text(f"iter_{iteration[-1]:07d}\n")


@pytest.fixture(scope="module")
def beside(world: Path) -> Path:
    """A run at TP 2 x PP 2 x DP 2 with SP, saved beside the training on a slow disk."""
    output = world / "beside"
    run = settings(world, output, layout=LAYOUT, save_interval=3)
    run_ranks(NUM_RANKS, train_with_a_slow_disk, run, timeout_seconds=300)
    return output


def test_a_save_beside_the_training_has_the_bits_of_one_that_stops_it(
    world: Path, beside: Path, tmp_path: Path
) -> None:
    run = settings(world, tmp_path, layout=LAYOUT, save_interval=3, async_save=False)
    run_ranks(NUM_RANKS, train_rank, run, timeout_seconds=300)
    names = ["iter_0000003", "iter_0000006"]
    assert [each.name for each in iterations(beside / "checkpoints")] == names
    for name in names:
        assert_same_bits(beside / "checkpoints" / name, tmp_path / "checkpoints" / name)
    assert [line["loss"] for line in curve(beside)] == [line["loss"] for line in curve(tmp_path)]
    # a save is in the line after it is complete: of the one beside the training perhaps in none
    stalls = [line["save_stall_seconds"] for line in curve(tmp_path)]
    assert [seconds > 0 for seconds in stalls] == [False] * 3 + [True] + [False] * 2
    assert not any(line["save_stall_seconds"] for line in curve(beside)[:3])


@pytest.mark.parametrize(
    ("layout", "num_ranks"),
    [({}, 1), ({"pp": 2, "vpp": 2}, 2), ({"tp": 2}, 4), ({"pp": 3}, 3), (LAYOUT, NUM_RANKS)],
    ids=str,
)
def test_what_was_saved_beside_the_training_is_continued_at_any_layout(
    world: Path, beside: Path, tmp_path: Path, layout: dict[str, Any], num_ranks: int
) -> None:
    copy_of(beside, tmp_path, 3)
    run = settings(world, tmp_path, layout=layout)
    run_ranks(num_ranks, train_rank, run, timeout_seconds=300)
    assert_same_curve(curve(tmp_path), curve(beside)[3:])
    truth, found = resolve(beside / "checkpoints"), resolve(tmp_path / "checkpoints")
    if layout == LAYOUT:
        assert_same_bits(found, truth)
        assert [x["loss"] for x in curve(tmp_path)] == [x["loss"] for x in curve(beside)[3:]]
    wanted, got = TensorReader(truth), TensorReader(found)
    for key in wanted.infos:
        value, expected = got.read(key).double(), wanted.read(key).double()
        assert (value - expected).norm() <= 1e-5 * expected.norm() + 1e-12, key


def test_every_file_of_a_checkpoint_has_its_checksum(beside: Path) -> None:
    newest = resolve(beside / "checkpoints")
    records = read_integrity(newest)
    files = {each.relative_to(newest).as_posix() for each in newest.rglob("*") if each.is_file()}
    assert records is not None and records.keys() == files - {"integrity.json"}
    assert len([name for name in files if name.endswith(".distcp")]) == NUM_RANKS
    assert all(record.sha256 for record in records.values())


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x10
    file.write_bytes(content)


def test_after_a_flipped_byte_the_run_goes_back_and_ends_as_it_would_have(
    world: Path, beside: Path, tmp_path: Path
) -> None:
    copy_of(beside, tmp_path, 3, 6)
    shutil.copyfile(beside / "metrics.jsonl", tmp_path / "metrics.jsonl")
    flip_a_byte(tmp_path / "checkpoints" / "iter_0000006" / "__5_0.distcp")
    run = settings(world, tmp_path, layout=LAYOUT)
    run_ranks(NUM_RANKS, train_rank, run, timeout_seconds=300)
    assert (tmp_path / "checkpoints" / "iter_0000006.damaged").is_dir()
    assert_same_bits(resolve(tmp_path / "checkpoints"), resolve(beside / "checkpoints"))
    assert [x["loss"] for x in curve(tmp_path)] == [x["loss"] for x in curve(beside)]


def test_without_an_intact_checkpoint_nothing_begins(
    world: Path, beside: Path, tmp_path: Path
) -> None:
    copy_of(beside, tmp_path, 3, 6)
    flip_a_byte(tmp_path / "checkpoints" / "iter_0000006" / "__5_0.distcp")
    (tmp_path / "checkpoints" / "iter_0000003" / "mmlm.json").unlink()
    text = r"none of 2 checkpoints is intact.*__5_0\.distcp: SHA-256.*mmlm\.json: missing"
    with pytest.raises(RankFailure, match=text):
        run_ranks(2, train_rank, settings(world, tmp_path, layout={}))
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize("verify", [True, False])
def test_a_named_checkpoint_that_is_damaged_is_an_error(
    world: Path, beside: Path, tmp_path: Path, verify: bool
) -> None:
    copy_of(beside, tmp_path / "named", 3)
    damaged = tmp_path / "named" / "checkpoints" / "iter_0000003" / "__2_0.distcp"
    flip_a_byte(damaged)
    if not verify:
        os.truncate(damaged, damaged.stat().st_size - 1)
    load = str(tmp_path / "named" / "checkpoints")
    run = settings(world, tmp_path / "run", layout={}, load=load, verify=verify)
    text = "SHA-256 is" if verify else "were written"
    with pytest.raises(RankFailure, match=rf"__2_0\.distcp: .*{text}.*the checkpoint is damaged"):
        run_ranks(2, train_rank, run)


def train_on_a_full_disk(run: RunConfig, full_at: tuple[str, ...]) -> None:
    """Train; rank 1 finds no room for the tensors of these iterations."""
    original = shard_writer.write_at

    def write_at(descriptor: int, raw: Any, offset: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if dist.get_rank() == 1 and offset > 1000 and any(name in path for name in full_at):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(descriptor, raw, offset)

    shard_writer.write_at = write_at
    train_rank(run)


@pytest.mark.parametrize("is_async", [True, False])
def test_a_full_disk_does_not_end_the_run(world: Path, tmp_path: Path, is_async: bool) -> None:
    run = settings(world, tmp_path, layout={}, save_interval=2, async_save=is_async)
    run_ranks(2, train_on_a_full_disk, run, ("iter_0000004",))
    names = ["iter_0000002", "iter_0000006"]
    assert [each.name for each in iterations(tmp_path / "checkpoints")] == names
    assert sorted(os.listdir(tmp_path / "checkpoints")) == [*names, "latest"], "nothing else"
    assert len(curve(tmp_path)) == 6


@pytest.mark.parametrize("is_async", [True, False])
def test_a_run_whose_last_save_fails_ends_with_that_error(
    world: Path, tmp_path: Path, is_async: bool
) -> None:
    run = settings(world, tmp_path, layout={}, save_interval=2, async_save=is_async)
    text = r"CheckpointError: .*could not be written: rank 1: OSError: \[Errno 28\] No space left"
    with pytest.raises(RankFailure, match=text):
        run_ranks(2, train_on_a_full_disk, run, ("iter_0000006",))
    assert resolve(tmp_path / "checkpoints").name == "iter_0000004"
    run_ranks(2, train_rank, run)  # with room on the disk the same command goes on
    assert resolve(tmp_path / "checkpoints").name == "iter_0000006"
    assert len(curve(tmp_path)) == 6
