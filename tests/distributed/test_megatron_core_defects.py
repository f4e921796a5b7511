"""Defects of megatron-core 0.16.1's checkpointing, one test each: ours is free of them.

Each docstring says what megatron-core does; the lines are those of its 0.16.1.
"""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from mmlm.checkpoint import shard_writer
from mmlm.checkpoint.manifest import MANIFEST_FILE, iterations, resolve
from mmlm.checkpoint.optimizer_state import (
    STATES,
    load_optimizer_state,
    optimizer_sharded_state,
)
from mmlm.checkpoint.save_load import save_checkpoint
from mmlm.checkpoint.storage import load_sharded, save_sharded
from mmlm.config.presets import tiny
from mmlm.config.schema import BackendConfig, OptimizerConfig, ParallelConfig, TrainConfig
from mmlm.errors import CheckpointError
from mmlm.models.model_provider import build_model, initialize_weights, model_state
from mmlm.parallel import topology
from mmlm.parallel.backend import resolve_backend
from mmlm.parallel.stage_plan import make_stage_plan
from mmlm.train.optimizer import make_optimizer, wrap_ddp
from tests.distributed.launch import RankFailure, run_ranks
from tests.unit.checkpoint.test_manifest import MANIFEST

pytestmark = pytest.mark.distributed

ONE_BUCKET = ParallelConfig()
MANY_BUCKETS = ParallelConfig(
    overlap_grad_reduce=True, overlap_param_gather=True, ddp_bucket_size=4000
)


class Training:
    """A tiny model with its optimizer, whose gradients are given."""

    def __init__(self, parallel: ParallelConfig, seed: int) -> None:
        self.place = topology.initialize(parallel)
        plan = make_stage_plan(tiny(), 1)
        backend = resolve_backend(BackendConfig(), "fp32")
        train = TrainConfig(dtype="fp32")
        self.chunks = build_model(tiny(), plan, self.place, backend, train)
        initialize_weights(self.chunks, self.place.groups, seed=seed)
        self.model = wrap_ddp(self.chunks, self.place, parallel)
        self.optimizer = make_optimizer(self.model, OptimizerConfig(lr=1e-2), torch.float32)
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-2

    def step(self, number: int) -> None:
        """One step with gradients that differ between parameters and between steps."""
        vocabulary = tiny().language.vocab_size
        for index, (name, parameter) in enumerate(self.chunks[0].named_parameters()):
            parameter.main_grad.copy_(torch.sin(parameter.detach() * 50 + index + number) / 10)
            if "output_layer" in name or "word_embeddings" in name:
                parameter.main_grad[vocabulary:] = 0.0  # padding has no gradient and no place
        self.optimizer.step()

    def state(self, *, is_loading: bool) -> dict[str, Any]:
        model = model_state(self.chunks, self.place.groups)
        optimizer = optimizer_sharded_state(
            self.optimizer, model, self.place.dp_gloo_group, is_loading=is_loading
        )
        return {"model": model, "optimizer": optimizer}

    def load(self, directory: Path, num_steps: int) -> None:
        state = self.state(is_loading=True)
        loaded = load_sharded({"optimizer": state["optimizer"]}, directory)
        load_optimizer_state(
            self.optimizer,
            loaded.get("optimizer", {}),
            state["model"],
            self.place.dp_gloo_group,
            num_steps,
        )

    def counters(self) -> list[torch.Tensor]:
        """Adam's step of each parameter that this rank holds a slice of."""
        parts: list[DistributedOptimizer] = self.optimizer.chained_optimizers
        return [state["step"] for part in parts for state in part.optimizer.state.values()]

    def values(self) -> list[torch.Tensor]:
        """Main weights and moments of this rank."""
        state = self.state(is_loading=False)["optimizer"]
        return [state[key][name].data.clone() for key in sorted(state) for name in STATES]


def _resume(directory: Path, parallel: ParallelConfig, num_before: int) -> list[float]:
    """Save after some steps, read into another training, and go on with both."""
    first = Training(parallel, seed=1)
    for number in range(num_before):
        first.step(number)
    save_sharded(first.state(is_loading=False), directory)
    second = Training.__new__(Training)
    second.__dict__.update(first.__dict__)
    second.chunks = build_model(
        tiny(),
        make_stage_plan(tiny(), 1),
        first.place,
        resolve_backend(BackendConfig(), "fp32"),
        TrainConfig(dtype="fp32"),
    )
    initialize_weights(second.chunks, first.place.groups, seed=2)
    second.model = wrap_ddp(second.chunks, first.place, parallel)
    second.optimizer = make_optimizer(second.model, OptimizerConfig(lr=1e-2), torch.float32)
    for group in second.optimizer.param_groups:
        group["lr"] = 1e-2
    second.load(directory, num_before)
    with torch.no_grad():  # the weights themselves are loaded before DDP is made, elsewhere
        for ours, theirs in zip(
            second.chunks[0].parameters(), first.chunks[0].parameters(), strict=True
        ):
            ours.copy_(theirs)
    counters = second.counters()
    assert len({each.data_ptr() for each in counters}) == len(counters) > 5, "one counter for all"
    assert {float(each) for each in counters} == {float(num_before)}
    for number in range(num_before, num_before + 2):
        first.step(number)
        second.step(number)
    for ours, theirs in zip(second.values(), first.values(), strict=True):
        assert torch.equal(ours, theirs)
    return [float(each) for each in second.counters()]


@pytest.mark.parametrize("parallel", [ONE_BUCKET, MANY_BUCKETS], ids=["one bucket", "many"])
def test_every_parameter_counts_its_own_steps_after_loading(
    tmp_path: Path, parallel: ParallelConfig
) -> None:
    """distrib_optimizer.py:816 gives all parameters one ``step``, which each of them then raises.

    And with more than one bucket ``fully_reshardable`` mixes the parameters up, in silence.
    """
    for counters in run_ranks(2, _resume, tmp_path, parallel, 2):
        assert set(counters) == {4.0}


def test_an_optimizer_before_its_first_step_is_saved_and_read(tmp_path: Path) -> None:
    """distrib_optimizer.py:642 asserts that there is state; :940 wants a ``step`` of it."""
    for counters in run_ranks(2, _resume, tmp_path, ONE_BUCKET, 0):
        assert set(counters) == {2.0}


def _save_without_psutil(directory: Path) -> set[str]:
    sys.modules["psutil"] = None  # type: ignore[assignment]
    training = Training(ONE_BUCKET, seed=1)
    save_sharded(training.state(is_loading=False), directory)
    return set(os.listdir(directory))


def test_a_save_does_not_hang_without_psutil(tmp_path: Path) -> None:
    """filesystem_async.py:642: without psutil the writers die and the save waits for ever."""
    for names in run_ranks(2, _save_without_psutil, tmp_path, timeout_seconds=60):
        assert names == {"__0_0.distcp", "__1_0.distcp", ".metadata", "metadata.json", "common.pt"}


def test_the_default_settings_of_the_optimizer_can_be_saved(tmp_path: Path) -> None:
    """mapping.py:134: the default ``fully_sharded_model_space`` is refused by its own writer."""
    names = run_ranks(4, _save_without_psutil, tmp_path, timeout_seconds=60)
    assert all("metadata.json" in each for each in names)


def _children() -> list[int]:
    found = []
    for task in Path("/proc/self/task").iterdir():
        found += [int(each) for each in (task / "children").read_text().split()]
    return found


def _processes_while_writing(directory: Path) -> list[int]:
    seen: list[int] = []
    original = shard_writer._HashedFile.write_tensor

    def look(self: Any, tensor: torch.Tensor) -> None:
        seen.extend(_children())
        original(self, tensor)

    shard_writer._HashedFile.write_tensor = look  # type: ignore[method-assign]
    training = Training(ONE_BUCKET, seed=1)
    save_sharded(training.state(is_loading=False), directory)
    return seen + _children()


def test_no_process_is_started_that_a_kill_would_leave_behind(tmp_path: Path) -> None:
    """filesystem_async.py:54 starts a manager by spawn: 19 s a save, and an orphan after a kill."""
    start = time.monotonic()
    assert run_ranks(2, _processes_while_writing, tmp_path) == [[], []]
    assert time.monotonic() - start < 60


def _rows(value: float) -> dict[str, Any]:
    place = (0, dist.get_rank(), dist.get_world_size())
    return {
        key: ShardedTensor.from_rank_offsets(key, torch.full((100, 10), value), place)
        for key in ("a", "b", "c")
    }


def _save_and_die(root: Path, dying: int | None) -> None:
    place = topology.initialize(ParallelConfig())
    manifest = replace(MANIFEST, iteration=3)
    options: dict[str, Any] = {"assets": {}, "save_total_limit": 0}
    if dying is None:
        save_checkpoint(root, _rows(1.0), manifest, control_group=place.control_group, **options)
        return
    original, count = shard_writer._HashedFile.write_tensor, [0]

    def die(self: Any, tensor: torch.Tensor) -> None:
        count[0] += 1
        if dist.get_rank() == dying and count[0] == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        original(self, tensor)

    shard_writer._HashedFile.write_tensor = die  # type: ignore[method-assign]
    save_checkpoint(root, _rows(2.0), manifest, control_group=place.control_group, **options)


def _load_rows(directory: Path) -> set[float]:
    loaded = load_sharded(_rows(0.0), directory)
    return {float(each) for tensor in loaded.values() for each in tensor.unique()}


@pytest.mark.parametrize("dying", [0, 1])
def test_a_kill_while_a_checkpoint_is_replaced_mixes_nothing(tmp_path: Path, dying: int) -> None:
    """Over an existing directory its ``metadata.json`` stays valid while new shards come in."""
    run_ranks(2, _save_and_die, tmp_path, None)
    with pytest.raises(RankFailure, match=f"rank {dying}: died without a result"):
        run_ranks(2, _save_and_die, tmp_path, dying)
    assert run_ranks(2, _load_rows, resolve(tmp_path)) == [{1.0}, {1.0}]
    run_ranks(2, _save_and_die, tmp_path, None)
    assert [each.name for each in iterations(tmp_path)] == ["iter_0000003"]


def test_what_a_kill_leaves_of_a_first_save_is_no_checkpoint(tmp_path: Path) -> None:
    """megatron-core leaves a directory under the final name, which nobody can tell from a whole."""
    with pytest.raises(RankFailure):
        run_ranks(2, _save_and_die, tmp_path, 1)
    assert iterations(tmp_path) == []
    assert not (tmp_path / "latest").exists()
    (left,) = tmp_path.iterdir()
    assert not (left / MANIFEST_FILE).exists() and not (left / "metadata.json").exists()
    with pytest.raises(CheckpointError, match="holds neither"):
        resolve(tmp_path)


SYNC_ORDER = """
import os, sys
from pathlib import Path
from mmlm.checkpoint import manifest
log = []
fsync, rename = os.fsync, os.rename
def note(kind, path): log.append((kind, path))
def fsync_noted(fd): note("fsync", os.readlink(f"/proc/self/fd/{fd}")); fsync(fd)
os.fsync = fsync_noted
real = Path.rename
def renamed(self, target): note("rename", str(self)); return real(self, target)
Path.rename = renamed
root = Path(sys.argv[1]); new = root / ".iter_0000003.tmp"; new.mkdir(parents=True)
(new / "metadata.json").write_text("{}"); (new / "mmlm.json").write_text("{}")
manifest.publish(new, root, 3)
names = [(kind, Path(path).name) for kind, path in log]
at = names.index(("rename", ".iter_0000003.tmp"))
assert ("fsync", "metadata.json") in names[:at], names
assert ("fsync", ".iter_0000003.tmp") in names[:at], names
assert ("fsync", root.name) in names[at:], names
"""


def test_what_says_that_a_checkpoint_is_complete_is_on_the_disk_first(tmp_path: Path) -> None:
    """megatron-core writes ``metadata.json`` last, and neither flushes nor renames it."""
    subprocess.run([sys.executable, "-c", SYNC_ORDER, str(tmp_path / "root")], check=True)
