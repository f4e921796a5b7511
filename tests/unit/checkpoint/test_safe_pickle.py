"""Nothing in a checkpoint is executed: real payloads that would leave a file, in every place."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch.distributed.checkpoint.metadata import Metadata

from mmlm.checkpoint.metadata import read_metadata, tensor_infos
from mmlm.checkpoint.storage import load_sharded, save_sharded
from mmlm.checkpoint.tensor_reader import TensorReader
from mmlm.errors import CheckpointError
from tests.distributed.launch import group_of_one, run_ranks


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


def state() -> dict[str, Any]:
    return {
        "a": ShardedTensor.from_rank_offsets("a", torch.ones(5), replica_id=dist.get_rank()),
        "object": ShardedObject("object", {"kept": 1}, (1,), (0,), replica_id=dist.get_rank()),
    }


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    with group_of_one():
        save_sharded(state(), tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_the_payload_is_a_real_one(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Payload(tmp_path / "trace")))
    assert (tmp_path / "trace").exists()


def test_what_was_saved_is_read(saved: Path) -> None:
    with group_of_one():
        found = load_sharded(state(), saved)
    assert torch.equal(found["a"], torch.ones(5))
    assert found["object"] == {"kept": 1}


@pytest.mark.parametrize("place", ["storage_meta", "planner_data", "whole"])
def test_code_in_the_metadata_is_refused_by_name(saved: Path, tmp_path: Path, place: str) -> None:
    metadata: Any = read_metadata(saved)
    trace = tmp_path / "trace"
    if place == "whole":
        metadata = Payload(trace)
    else:
        setattr(metadata, place, Payload(trace))
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    wanted = r"\.metadata: damaged, or not from a checkpoint: it names (posix|os)\.mkdir"
    for read in (tensor_infos, TensorReader):
        with pytest.raises(CheckpointError, match=wanted):
            read(saved)
    with group_of_one(), pytest.raises(CheckpointError, match=wanted):
        load_sharded(state(), saved)
    assert not trace.exists()


@pytest.mark.parametrize("name", ["builtins.getattr", "torch.load", "torch.hub.load", "os.system"])
def test_other_names_are_refused_in_the_metadata(saved: Path, name: str) -> None:
    module, _, function = name.rpartition(".")
    (saved / ".metadata").write_bytes(f"c{module}\n{function}\n.".encode())
    with pytest.raises(CheckpointError, match=f"it names {name}, which"):
        tensor_infos(saved)


def test_metadata_of_something_else_is_refused(saved: Path) -> None:
    (saved / ".metadata").write_bytes(pickle.dumps([Metadata(state_dict_metadata={})]))
    with pytest.raises(CheckpointError, match="it holds a list"):
        tensor_infos(saved)


def test_code_in_the_common_part_is_refused_by_name(saved: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    torch.save({"iteration": Payload(trace)}, saved / "common.pt")
    with (
        group_of_one(),
        pytest.raises(CheckpointError, match=r"common\.pt: damaged, or it.*(posix|os)\.mkdir"),
    ):
        load_sharded(state(), saved)
    assert not trace.exists()


def _load_evil(saved: Path) -> str:
    wanted = state()
    if dist.get_rank():
        del wanted["object"]  # rank 0 alone looks at it, and all must end
    with pytest.raises(CheckpointError) as caught:
        load_sharded(wanted, saved)
    return str(caught.value)


@pytest.mark.distributed
def test_code_in_a_single_object_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved, trace = tmp_path / "checkpoint", tmp_path / "trace"
    with group_of_one():
        evil = ShardedObject("object", Payload(trace), (1,), (0,))
        save_sharded({**state(), "object": evil}, saved)
    for message in run_ranks(2, _load_evil, saved, timeout_seconds=60):
        assert "__0_0.distcp: 'object': damaged, or it holds something else" in message
        assert "mkdir" in message
    assert not trace.exists()
    # whoever switches torch's check off for other files does not switch ours off
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with group_of_one():
        assert "mkdir" in _load_evil(saved)
    assert not trace.exists()
