"""A whole checkpoint's tensors, written by one process and some rows at a time.

The files are those of megatron-core's `torch_dist` format of one rank, without the checksums of
zip records, which torch does not read. megatron-core itself is not needed: its import takes as long
as writing gigabytes.
"""

import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import (
    CURRENT_DCP_VERSION,
    FileSystemWriter,
    _StorageInfo,
)
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from mmlm.checkpoint.metadata import TensorInfo
from mmlm.checkpoint.row_stream import RowSource, Slot, fill, open_kept, write_at
from mmlm.checkpoint.torch_files import frame_of

TENSOR_FILE = "__0_0.distcp"
"""What torch calls the one file of rank 0."""

CONFIG = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
"""megatron-core's CheckpointingConfig (dist_checkpointing/core.py)."""


def write_streamed(directory: Path, tensors: Mapping[str, TensorInfo], source: RowSource) -> None:
    """Write a checkpoint without its manifest.

    Args:
        directory: exists. What a killed run of the same call has left of `TENSOR_FILE` is kept
            where it is right.
        tensors: key -> shape and dtype, in the order in which the source is asked.
        source: of their rows.
    """
    slots, places, end = [], {}, 0
    descriptor, kept_bytes = open_kept(directory / TENSOR_FILE)
    try:
        for key, info in tensors.items():
            frame = frame_of(torch.empty(info.shape, dtype=info.dtype))
            for at, piece in frame.pieces:
                write_at(descriptor, piece, end + at)
            (offset,) = frame.offsets
            slots.append(Slot(key=key, shape=info.shape, dtype=info.dtype, offset=end + offset))
            places[key] = _StorageInfo(TENSOR_FILE, end, frame.num_bytes)
            end += frame.num_bytes
        fill(descriptor, slots, source, kept_bytes)
        os.ftruncate(descriptor, end)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    torch.save({}, directory / "common.pt")
    with open(directory / ".metadata", "wb") as file:
        pickle.dump(_metadata(directory, tensors, places), file)
    (directory / "metadata.json").write_text(json.dumps(CONFIG), encoding="utf-8")


def _metadata(
    directory: Path, tensors: Mapping[str, TensorInfo], places: Mapping[str, _StorageInfo]
) -> Metadata:
    described: dict[str, STORAGE_TYPES] = {}
    stored = {}
    for key, info in tensors.items():
        size, zeros = torch.Size(info.shape), torch.Size([0] * len(info.shape))
        described[key] = TensorStorageMetadata(
            properties=TensorProperties(dtype=info.dtype),
            size=size,
            chunks=[ChunkStorageMetadata(offsets=zeros, sizes=size)],
        )
        stored[MetadataIndex(key, zeros, 0)] = places[key]
    return Metadata(
        state_dict_metadata=described,
        storage_data=stored,
        storage_meta=FileSystemWriter(directory).storage_meta(),
        version=CURRENT_DCP_VERSION,
    )
