"""Saves beside the training: of the right moment, whole or not at all, full disk or not."""

import errno
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor

from mmlm.checkpoint import integrity, manifest, shard_writer
from mmlm.checkpoint.integrity import find_damage
from mmlm.checkpoint.manifest import Manifest, iterations, resolve
from mmlm.checkpoint.tensor_reader import TensorReader
from mmlm.config.schema import CheckpointConfig, ParallelConfig
from mmlm.errors import MmlmError
from mmlm.parallel import topology
from mmlm.train import saver as module
from mmlm.train.saver import Saver
from tests.distributed.launch import run_ranks
from tests.unit.checkpoint.test_manifest import MANIFEST

ROWS = 4000


class Model:
    """A live weight and a private state, a block of each on every rank, as a training has them."""

    def __init__(self) -> None:
        self.weight = torch.zeros(ROWS, 64)

    def step(self) -> None:
        self.weight.add_(1.0)

    def describe(self) -> dict[str, Any]:
        place = (0, dist.get_rank(), dist.get_world_size())
        state = self.weight.clone()
        return {
            "model": ShardedTensor.from_rank_offsets("model.weight", self.weight, place),
            "state": ShardedTensor.from_rank_offsets("optimizer.state.x", state, place),
        }


class Recorder:
    """What a saver says and notes, and the errors that it logs."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.stalls: list[tuple[int, float]] = []
        self.errors: list[str] = []

    def note(self, iteration: int, seconds: float) -> None:
        self.stalls.append((iteration, seconds))


def make(root: Path, **settings: Any) -> tuple[Saver, Recorder]:
    place = topology.initialize(ParallelConfig())
    recorder = Recorder()
    logger = module.get_logger()
    logger.error = lambda text: recorder.errors.append(text)  # type: ignore[method-assign]
    saver = Saver(
        root,
        CheckpointConfig(**settings),
        assets={"tokenizer.model": b"pieces"},
        group=place.control_group,
        say=recorder.said.append,
        note_stall=recorder.note,
    )
    return saver, recorder


def at(iteration: int) -> Manifest:
    return replace(MANIFEST, iteration=iteration)


def slow_down(seconds: float) -> threading.Event:
    """Make writing take long; the event is set when it has begun."""
    begun = threading.Event()
    original = shard_writer._HashedFile.write_tensor

    def slow(self: Any, tensor: torch.Tensor) -> None:
        begun.set()
        time.sleep(seconds)
        original(self, tensor)

    shard_writer._HashedFile.write_tensor = slow  # type: ignore[method-assign]
    return begun


def value_of(path: Path) -> set[float]:
    reader = TensorReader(path)
    return {
        float(each)
        for key in ("model.weight", "optimizer.state.x")
        for each in reader.read(key).unique()
    }


def _train_beside_a_slow_writer(root: Path) -> tuple[int, float, list[str]]:
    saver, recorder = make(root)
    model, polls = Model(), 0
    begun = slow_down(1.0 * dist.get_rank())  # the others wait for rank 1 without stopping
    model.step()
    saver.save(at(1), model.describe, is_last=False)
    assert begun.wait(10), "it is written without anybody waiting for it"
    assert iterations(root) == [], "what is not complete has no name"
    while not saver.finish_ready():
        model.step()
        polls += 1
        time.sleep(0.01)
    assert value_of(root / "iter_0000001") == {1.0}, "later steps are not in it"
    assert find_damage(root / "iter_0000001", checksums=True) is None
    assert model.weight.min() > 2, "the training went on meanwhile"
    assert not saver.finish_ready(), "nothing is pending"
    saver.close()
    return polls, recorder.stalls[0][1], recorder.said


@pytest.mark.distributed
def test_the_training_goes_on_and_nothing_of_it_leaks_into_the_save(tmp_path: Path) -> None:
    for polls, stall, said in run_ranks(2, _train_beside_a_slow_writer, tmp_path / "checkpoints"):
        assert polls > 10
        # measured: 0.03; writing takes 2
        assert stall < 1.5
        assert said[0].startswith(
            f"saved {tmp_path / 'checkpoints' / 'iter_0000001'}; the training"
        )


def _save_again_at_once(root: Path) -> list[str]:
    saver, recorder = make(root)
    model = Model()
    slow_down(0.2)
    for iteration in (1, 2, 3):
        model.step()
        saver.save(at(iteration), model.describe, is_last=False)
        assert len(iterations(root)) == iteration - 1, "the one before is complete"
    threads = [each for each in threading.enumerate() if each.name == "mmlm-save"]
    assert len(threads) == 1, "one thread writes"
    saver.close()
    assert [value_of(each) for each in iterations(root)] == [{1.0}, {2.0}, {3.0}]
    return recorder.said


@pytest.mark.distributed
def test_a_save_waits_for_the_one_before(tmp_path: Path) -> None:
    for said in run_ranks(2, _save_again_at_once, tmp_path):
        assert len(said) == 3


def _settle(root: Path) -> list[str]:
    saver, recorder = make(root)
    slow_down(0.2)
    saver.save(at(1), Model().describe, is_last=False)
    saver.settle()
    assert resolve(root).name == "iter_0000001"
    mend = break_tensors(1)
    saver.save(at(2), Model().describe, is_last=False)
    saver.settle()
    mend()
    assert resolve(root).name == "iter_0000001"
    return recorder.errors


@pytest.mark.distributed
def test_settling_waits_and_forgives(tmp_path: Path) -> None:
    errors, _ = run_ranks(2, _settle, tmp_path)
    assert len(errors) == 1


def _save_last(root: Path, is_async: bool) -> float:
    saver, recorder = make(root, async_save=is_async, save_total_limit=1)
    model = Model()
    slow_down(0.2)
    saver.save(at(1), model.describe, is_last=True)
    assert resolve(root).name == "iter_0000001", "the last one is complete on return"
    saver.save(at(2), model.describe, is_last=False)
    assert len(iterations(root)) == 1 and (resolve(root).name == "iter_0000002") != is_async
    saver.close()
    assert resolve(root).name == "iter_0000002" and len(iterations(root)) == 1
    return recorder.stalls[0][1]


@pytest.mark.distributed
@pytest.mark.parametrize("is_async", [True, False])
def test_the_last_save_is_waited_for(tmp_path: Path, is_async: bool) -> None:
    for stall in run_ranks(2, _save_last, tmp_path, is_async):
        assert stall > 0.4, "the wait is part of what the save cost"


def full_disk(*_: object, **__: object) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def break_tensors(only_rank: int) -> Callable[[], None]:
    original, count = shard_writer.write_at, [0]

    def half(descriptor: int, raw: Any, offset: int) -> None:
        count[0] += 1
        if count[0] > 5 and dist.get_rank() == only_rank:
            full_disk()
        original(descriptor, raw, offset)

    shard_writer.write_at = half

    def mend() -> None:
        shard_writer.write_at = original

    return mend


def break_call(owner: Any, name: str, file: str) -> Callable[[], None]:
    """Have a call fail when one of its arguments is this file."""
    original = getattr(owner, name)

    def fails(*args: Any, **kwargs: Any) -> Any:
        if any(file in str(each) for each in args):
            full_disk()
        return original(*args, **kwargs)

    setattr(owner, name, fails)

    def mend() -> None:
        setattr(owner, name, original)

    return mend


POINTS: dict[str, Callable[[], Callable[[], None]]] = {
    "tensors of rank 0": lambda: break_tensors(0),
    "tensors of rank 1": lambda: break_tensors(1),
    "folder": lambda: break_call(Path, "mkdir", "checkpoints/.iter_"),
    "file of rank 1": lambda: break_call(os, "open", "__1_0.distcp"),
    "flush": lambda: break_call(os, "fsync", ""),
    "common part": lambda: break_call(torch, "save", "common.pt"),
    "metadata": lambda: break_call(Path, "rename", ".metadata"),
    "manifest": lambda: break_call(Path, "write_text", "mmlm.json"),
    "assets": lambda: break_call(Path, "write_bytes", "tokenizer.model"),
    "checksums": lambda: break_call(Path, "write_text", integrity.INTEGRITY_FILE),
    "rename": lambda: break_call(Path, "rename", "checkpoints/iter_"),
    "name of the newest": lambda: break_call(Path, "write_text", ".latest.tmp"),
}


def _meet_a_full_disk(root: Path, point: str, is_async: bool) -> list[str]:
    saver, recorder = make(root, async_save=is_async)
    model = Model()
    model.step()
    saver.save(at(1), model.describe, is_last=True)
    mend = POINTS[point]()
    model.step()
    saver.save(at(2), model.describe, is_last=False)
    while saver._pending is not None:
        saver.finish_ready()
    with pytest.raises(MmlmError, match=r"could not be written|No space left|Errno 28"):
        saver.save(at(3), model.describe, is_last=True)
    dist.barrier()
    mend()
    assert {each.name for each in root.iterdir()} == {"iter_0000001", "latest"}, "nothing is left"
    assert value_of(resolve(root)) == {1.0}, "the checkpoint before is as it was"
    assert find_damage(resolve(root), checksums=True) is None
    model.step()
    saver.save(at(4), model.describe, is_last=True)
    assert value_of(resolve(root)) == {3.0}, "with room on the disk the next one is saved"
    return recorder.errors


@pytest.mark.distributed
@pytest.mark.parametrize("is_async", [True, False])
@pytest.mark.parametrize("point", POINTS)
def test_a_full_disk_costs_one_checkpoint_and_not_the_run(
    tmp_path: Path, point: str, is_async: bool
) -> None:
    errors, others = run_ranks(
        2, _meet_a_full_disk, tmp_path / "checkpoints", point, is_async, timeout_seconds=60
    )
    assert others == [], "rank 0 speaks"
    (error,) = errors
    assert error.startswith("CHECKPOINT NOT SAVED after 2 iterations: ")
    assert str(tmp_path / "checkpoints") in error and "No space left on device" in error
    assert "its newest checkpoint is iter_0000001. Free some room" in error


def _disk_fills_while_nobody_looks(root: Path) -> str:
    saver, _ = make(root)
    model = Model()
    saver.save(at(1), model.describe, is_last=True)
    mend = break_tensors(1)
    saver.save(at(2), model.describe, is_last=False)
    with pytest.raises(MmlmError) as caught:
        saver.close()
    mend()
    return str(caught.value)


@pytest.mark.distributed
def test_a_run_that_ends_on_a_failed_save_says_so(tmp_path: Path) -> None:
    for message in run_ranks(2, _disk_fills_while_nobody_looks, tmp_path):
        assert "could not be written: rank 1: OSError: [Errno 28] No space left" in message
    assert resolve(tmp_path).name == "iter_0000001"


def _cannot_delete(root: Path) -> list[str]:
    saver, recorder = make(root, save_total_limit=1)
    model = Model()
    saver.save(at(1), model.describe, is_last=True)
    mend = break_call(manifest.shutil, "rmtree", "deleted")
    saver.save(at(2), model.describe, is_last=True)
    mend()
    return recorder.said


@pytest.mark.distributed
def test_an_old_checkpoint_that_cannot_be_deleted_is_no_failure(tmp_path: Path) -> None:
    for said in run_ranks(2, _cannot_delete, tmp_path):
        assert len(said) == 2
    assert [each.name for each in iterations(tmp_path)] == ["iter_0000002"]


def _holds(root: Path, is_async: bool) -> None:
    saver, _ = make(root, async_save=is_async)
    model = Model()
    saver.save(at(1), model.describe, is_last=False)
    assert saver.holds(1) and not saver.holds(2), "complete, or being written"
    saver.settle()
    assert saver.holds(1)
    mend = break_tensors(1)
    saver.save(at(2), model.describe, is_last=False)
    saver.settle()
    mend()
    assert not saver.holds(2), "a stop must save again before it says that all is saved"
    saver.save(at(2), model.describe, is_last=True)
    assert saver.holds(2) and resolve(root).name == "iter_0000002"


@pytest.mark.distributed
@pytest.mark.parametrize("is_async", [True, False])
def test_a_failed_save_is_not_held(tmp_path: Path, is_async: bool) -> None:
    run_ranks(2, _holds, tmp_path, is_async)
