"""What a checkpoint says of its tensors, without megatron-core, whose import takes seconds."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from mmlm.checkpoint.patient import size_of
from mmlm.checkpoint.safe_pickle import read_metadata_file
from mmlm.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Shape and type of one tensor of a checkpoint."""

    shape: tuple[int, ...]
    """True, global shape."""
    dtype: torch.dtype
    """Element type on disk."""


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


def read_metadata(directory: Path) -> Metadata:
    """Everything that a checkpoint says of its tensors; errors as in `tensor_infos`."""
    # metadata.json is written last: without it the save did not finish.
    for name in ("metadata.json", ".metadata"):
        try:
            size_of(directory / name)
        except OSError as error:
            is_gone = isinstance(error, FileNotFoundError)
            reason = "is missing" if is_gone else f"cannot be read: {error.strerror}"
            raise CheckpointError(
                f"{directory}: not a complete checkpoint, {name} {reason}; "
                "give an iteration's directory or the folder that holds `latest`"
            ) from error
    return read_metadata_file(directory / ".metadata")
