"""Tensors on disk: megatron-core's dist_checkpointing, written in this process.

The files are those of megatron-core's `torch_dist` format and any megatron-core reads them. Only
the writing differs: its own writer forks processes, starts a spawned manager to collect their
results (seconds a rank, an orphan after a kill, a hang without psutil) and holds every tensor until
the last is written. `StreamingSaveStrategy` writes one tensor after the other, in the calling
process. `streamed` writes the same files of tensors that no process holds.
"""

import io
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from mmlm.checkpoint.metadata import TensorInfo, tensor_infos
from mmlm.errors import CheckpointError, MmlmError


def save_sharded(sharded_state_dict: Mapping[str, Any], directory: Path) -> None:
    """Write a sharded state dict; collective, every rank of the default group must call it.

    Args:
        sharded_state_dict: as for `megatron.core.dist_checkpointing.save`.
        directory: a new or empty directory on a file system that all ranks share.

    Raises:
        CheckpointError: on all ranks, when writing failed on any of them.
    """
    directory.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    with _readable_errors(f"{directory}: the checkpoint could not be written"):
        dist_checkpointing.save(
            dict(sharded_state_dict),
            str(directory),
            sharded_strategy=StreamingSaveStrategy(),
        )


def load_sharded(sharded_state_dict: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """Read what a sharded state dict asks for; collective, every rank must call it.

    Tensors that the checkpoint has and nobody asks for are left alone; those that are asked for
    and missing, or of another global shape, are an error on all ranks.

    Args:
        sharded_state_dict: as for `megatron.core.dist_checkpointing.load`.
        directory: one iteration's directory.

    Returns:
        The plain state dict, with the common (not sharded) entries of the checkpoint.

    Raises:
        CheckpointError: with the whole list of missing keys and differing shapes, or for a damaged
            file.
    """
    stored = tensor_infos(directory)
    _refuse_everywhere(directory, _mismatches(sharded_state_dict, stored))
    with _readable_errors(f"{directory}: the checkpoint could not be read"):
        loaded: dict[str, Any] = dist_checkpointing.load(dict(sharded_state_dict), str(directory))
        return loaded


class StreamingSaveStrategy(SaveShardedStrategy):
    """Writes megatron-core's `torch_dist` format synchronously, one tensor after the other."""

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)

    @property
    def can_handle_sharded_objects(self) -> bool:
        """ShardedObjects are written like tensors, as megatron-core's own strategy does."""
        return True

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> None:
        """Write this rank's main replicas; collective."""
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        dcp.save(
            mcore_to_pyt_state_dict(by_key, False),
            storage_writer=_StreamingWriter(checkpoint_dir),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )


class _StreamingWriter(dcp.FileSystemWriter):
    """One file a rank, holding one tensor at a time (torch's keeps all of them until the end)."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results: list[WriteResult] = []
        if plan.items:
            name = f"{plan.storage_data.prefix}0.distcp"
            with open(Path(self.path) / name, "wb") as stream:
                for item in plan.items:
                    start = stream.tell()
                    self._write(stream, item, planner)
                    length = stream.tell() - start
                    place = _StorageInfo(name, start, length)
                    results.append(WriteResult(item.index, length, place))
                stream.flush()
                os.fsync(stream.fileno())
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def _write(self, stream: BinaryIO, item: WriteItem, planner: SavePlanner) -> None:
        data = planner.resolve_data(item)
        if isinstance(data, io.BytesIO):
            stream.write(data.getbuffer())
        else:
            tensor = data.detach().to("cpu")
            if tensor.untyped_storage().size() != tensor.numel() * tensor.itemsize:
                tensor = tensor.clone()  # torch.save would write the whole storage behind a view
            torch.save(tensor, stream)


def _mismatches(sharded_state_dict: Mapping[str, Any], stored: dict[str, TensorInfo]) -> list[str]:
    wanted, _, _ = load_preprocess(dict(sharded_state_dict))
    problems = []
    for tensor in nested_values(wanted):
        if not isinstance(tensor, ShardedTensor):
            continue
        if tensor.key not in stored:
            problems.append(f"missing '{tensor.key}' {list(tensor.global_shape)}")
        elif not tensor.allow_shape_mismatch and stored[tensor.key].shape != tensor.global_shape:
            problems.append(
                f"'{tensor.key}' is {list(stored[tensor.key].shape)} in the checkpoint and "
                f"{list(tensor.global_shape)} in the model"
            )
    return problems


def _refuse_everywhere(directory: Path, problems: list[str]) -> None:
    """Raise on all ranks when any of them found problems, so that none is left waiting."""
    gathered: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, problems)
    everything = sorted({problem for of_rank in gathered for problem in of_rank})
    if everything:
        raise CheckpointError(
            f"{directory}: does not fit the model, {len(everything)} tensors:\n  "
            + "\n  ".join(everything)
        )


@contextmanager
def _readable_errors(what: str) -> Iterator[None]:
    """Turn torch's and megatron-core's checkpoint errors into a CheckpointError."""
    try:
        yield
    except dcp.CheckpointException as error:
        # {rank: (exception, traceback)}; torch's class is no Exception and swallows Ctrl-C.
        causes = [cause for cause, _ in error.failures.values()]
        for cause in causes:
            if isinstance(cause, KeyboardInterrupt):
                raise cause from None
            if isinstance(cause, MmlmError):
                raise CheckpointError(str(cause)) from error
        ranks = ", ".join(
            f"rank {rank}: {_one_line(cause)}"
            for rank, (cause, _) in sorted(error.failures.items())
        )
        raise CheckpointError(f"{what}: {ranks}") from error
    except (CheckpointingException, OSError) as error:
        raise CheckpointError(f"{what}: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
