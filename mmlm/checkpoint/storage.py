"""Tensors on disk: megatron-core's dist_checkpointing, written in this process (`shard_writer`)."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from torch.distributed.checkpoint.metadata import MetadataIndex

from mmlm.checkpoint.metadata import TensorInfo, read_metadata, tensor_infos
from mmlm.checkpoint.safe_pickle import refuse_code
from mmlm.checkpoint.shard_writer import one_line, plan_shards
from mmlm.errors import CheckpointError, MmlmError


def save_sharded(sharded_state_dict: Mapping[str, Any], directory: Path) -> None:
    """Write a sharded state dict; collective, every rank of the default group must call it.

    Args:
        sharded_state_dict: as for `megatron.core.dist_checkpointing.save`.
        directory: a new or empty directory on a file system that all ranks share.

    Raises:
        CheckpointError: on all ranks, when writing failed on any of them.
    """
    with readable_errors(f"{directory}: the checkpoint could not be written"):
        writer = plan_shards(sharded_state_dict, directory)
        writer.write()
        writer.finish()


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
    _refuse_code(sharded_state_dict, directory)
    with readable_errors(f"{directory}: the checkpoint could not be read"):
        loaded: dict[str, Any] = dist_checkpointing.load(dict(sharded_state_dict), str(directory))
        return loaded


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


def _refuse_code(sharded_state_dict: Mapping[str, Any], directory: Path) -> None:
    """Look into what megatron-core would unpickle, before it does; collective."""
    problem = None
    try:
        _look_for_code(sharded_state_dict, directory)
    except (CheckpointError, OSError) as error:
        problem = str(error)
    gathered: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, problem)
    for problem in gathered:
        if problem is not None:
            raise CheckpointError(problem)


def _look_for_code(sharded_state_dict: Mapping[str, Any], directory: Path) -> None:
    refuse_code(directory / "common.pt")
    places = read_metadata(directory).storage_data or {}
    wanted, _, _ = load_preprocess(dict(sharded_state_dict))
    for entry in nested_values(wanted):
        if isinstance(entry, ShardedObject):
            place = places.get(MetadataIndex(entry.unique_key))
            if place is not None:
                with open(directory / place.relative_path, "rb") as stream:
                    stream.seek(place.offset)
                    content = stream.read(place.length)
                refuse_code(f"{directory / place.relative_path}: '{entry.key}'", content)


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
def readable_errors(what: str) -> Iterator[None]:
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
            f"rank {rank}: {one_line(cause)}" for rank, (cause, _) in sorted(error.failures.items())
        )
        raise CheckpointError(f"{what}: {ranks}") from error
    except (CheckpointingException, OSError) as error:
        raise CheckpointError(f"{what}: {one_line(error)}") from error
