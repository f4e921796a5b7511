"""Tensors on disk: megatron-core's dist_checkpointing, written in this process.

The files are those of megatron-core's `torch_dist` format and any megatron-core reads them. Only
the writing differs: its own writer forks processes, starts a spawned manager to collect their
results (seconds a rank, an orphan after a kill, a hang without psutil) and holds every tensor until
the last is written. `StreamingSaveStrategy` writes one tensor after the other, in the calling
process, and can take the rows of each from a function at the moment they are written.
"""

import io
import os
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
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
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from mmlm.checkpoint.row_stream import RowSource, Slot, fill, open_kept
from mmlm.checkpoint.torch_files import frame_of
from mmlm.errors import CheckpointError, MmlmError


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """What the metadata of a checkpoint says about one tensor."""

    shape: tuple[int, ...]
    """True, global shape."""
    dtype: torch.dtype
    """Element type on disk."""


def save_sharded(
    sharded_state_dict: Mapping[str, Any],
    directory: Path,
    row_source: RowSource | None = None,
) -> None:
    """Write a sharded state dict; collective, every rank of the default group must call it.

    Args:
        sharded_state_dict: as for `megatron.core.dist_checkpointing.save`. A ShardedTensor whose
            data is on the meta device is fetched from `row_source`, block by block, when its turn
            comes.
        directory: a new or empty directory on a file system that all ranks share. With a
            `row_source`, it may be what a killed run of the same call left: tensors that are there
            and equal are kept.
        row_source: of the meta tensors.

    Raises:
        CheckpointError: on all ranks, when writing failed on any of them.
    """
    directory.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    with _readable_errors(f"{directory}: the checkpoint could not be written"):
        dist_checkpointing.save(
            dict(sharded_state_dict),
            str(directory),
            sharded_strategy=StreamingSaveStrategy(row_source),
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


def tensor_infos(directory: Path) -> dict[str, TensorInfo]:
    """Key -> shape and dtype of every tensor of a checkpoint; reads the metadata alone.

    Raises:
        CheckpointError: when the directory holds no complete checkpoint.
    """
    return {
        name: TensorInfo(shape=tuple(entry.size), dtype=entry.properties.dtype)
        for name, entry in read_metadata(directory).state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


class StreamingSaveStrategy(SaveShardedStrategy):
    """Writes megatron-core's `torch_dist` format synchronously, one tensor after the other."""

    def __init__(self, row_source: RowSource | None = None) -> None:
        super().__init__("torch_dist", 1)
        self._row_source = row_source

    @property
    def can_handle_sharded_objects(self) -> bool:
        """ShardedObjects are written like tensors, as megatron-core's own strategy does."""
        return True

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> None:
        """Write this rank's main replicas; collective."""
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        dcp.save(
            mcore_to_pyt_state_dict(by_key, False),
            storage_writer=_StreamingWriter(checkpoint_dir, self._row_source),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )


class _StreamingWriter(dcp.FileSystemWriter):
    """One file a rank, holding one tensor at a time (torch's keeps all of them until the end)."""

    def __init__(self, path: str | Path, row_source: RowSource | None) -> None:
        super().__init__(path)
        self._row_source = row_source

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results: list[WriteResult] = []
        if plan.items:
            name = f"{plan.storage_data.prefix}0.distcp"
            descriptor, kept_bytes = open_kept(Path(self.path) / name)
            with open(descriptor, "r+b") as stream:
                for item in plan.items:
                    start = stream.tell()
                    self._write(stream, item, planner, kept_bytes)
                    length = stream.tell() - start
                    place = _StorageInfo(name, start, length)
                    results.append(WriteResult(item.index, length, place))
                stream.truncate()
                stream.flush()
                os.fsync(stream.fileno())
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def _write(
        self, stream: BinaryIO, item: WriteItem, planner: SavePlanner, kept_bytes: int
    ) -> None:
        data = planner.resolve_data(item)
        if isinstance(data, io.BytesIO):
            stream.write(data.getbuffer())
        elif data.is_meta:
            assert self._row_source is not None, f"{item.index.fqn} has neither data nor a source"
            self._write_rows(stream, item.index.fqn, data, kept_bytes)
        else:
            tensor = data.detach().to("cpu")
            if tensor.untyped_storage().size() != tensor.numel() * tensor.itemsize:
                tensor = tensor.clone()  # torch.save would write the whole storage behind a view
            torch.save(tensor, stream)

    def _write_rows(self, stream: BinaryIO, key: str, announced: Tensor, kept_bytes: int) -> None:
        """Write what torch.save would, with the elements taken from the source block by block."""
        frame = frame_of(torch.empty(announced.shape, dtype=announced.dtype))
        start = stream.tell()
        for at, piece in frame.pieces:
            stream.seek(start + at)
            stream.write(piece)
        stream.flush()
        (offset,) = frame.offsets
        slot = Slot(
            key=key,
            shape=tuple(announced.shape),
            dtype=announced.dtype,
            offset=start + offset,
        )
        assert self._row_source is not None
        fill(stream.fileno(), [slot], self._row_source, kept_bytes)
        stream.seek(start + frame.num_bytes)


@contextmanager
def process_group_of_one() -> Iterator[None]:
    """Make sure of a default process group with this process alone; megatron-core asks for one.

    Raises:
        CheckpointError: when a group of several ranks exists: this is work for one process.
    """
    if dist.is_initialized():
        if dist.get_world_size() != 1:
            raise CheckpointError(
                f"conversion runs in one process, but there are {dist.get_world_size()} ranks: "
                "start it without torchrun"
            )
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def read_metadata(directory: Path) -> Metadata:
    """Everything that a checkpoint says of its tensors; errors as in `tensor_infos`."""
    # metadata.json is written last: without it the save did not finish.
    for name in ("metadata.json", ".metadata"):
        if not (directory / name).is_file():
            raise CheckpointError(
                f"{directory}: not a complete checkpoint, {name} is missing; "
                "give an iteration's directory or the folder that holds `latest`"
            )
    try:
        return dcp.FileSystemReader(directory).read_metadata()
    except (OSError, EOFError, pickle.UnpicklingError, AttributeError, ImportError) as error:
        raise CheckpointError(f"{directory / '.metadata'}: damaged: {error}") from error


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
