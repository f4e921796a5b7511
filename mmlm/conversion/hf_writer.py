"""Writes HuggingFace folders, one tensor in memory at a time.

The safetensors format is a length (8 bytes, little-endian), a json header of that length, and the
tensors' bytes in the header's order; it is written here directly because the library wants a whole
shard in memory. See https://huggingface.co/docs/safetensors (format).
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mmlm.checkpoint.row_stream import RowSource, Slot, fill, open_kept, write_at
from mmlm.conversion.rules import Shape
from mmlm.conversion.safetensors_file import DTYPE_NAMES
from mmlm.conversion.vocabulary import write_json
from mmlm.errors import CheckpointError

MAX_SHARD_BYTES = 5_000_000_000
"""Largest safetensors file, unless somebody wants another or one tensor is larger."""


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """A tensor that will be written."""

    name: str
    """Its name in the file."""
    shape: Shape
    """Its shape."""
    dtype: torch.dtype
    """Its element type; weights are bf16, fp16 or fp32."""

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def plan_shards(specs: Sequence[TensorSpec], max_shard_bytes: int) -> list[list[TensorSpec]]:
    """Cut the list of tensors into files, in order.

    Args:
        specs: tensors in the order they will come.
        max_shard_bytes: a file ends before it would grow larger; a larger tensor gets its own.
    """
    shards: list[list[TensorSpec]] = []
    size = 0
    for spec in specs:
        if not shards or size + spec.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.num_bytes
    return shards


def shard_names(num_shards: int) -> list[str]:
    """Names of the files, as HuggingFace counts them."""
    return [f"model-{i:05d}-of-{num_shards:05d}.safetensors" for i in range(1, num_shards + 1)]


def fill_weights(
    folder: Path, specs: Sequence[TensorSpec], source: RowSource, max_shard_bytes: int
) -> None:
    """Write safetensors shards and ``model.safetensors.index.json``, some rows at a time.

    Args:
        folder: existing folder. What a killed run of the same call has left there is kept where it
            is right.
        specs: every tensor, each of at least one dimension.
        source: of their rows.
        max_shard_bytes: see `plan_shards`.
    """
    shards = plan_shards(specs, max_shard_bytes)
    names = shard_names(len(shards))
    for name, shard in zip(names, shards, strict=True):
        _fill_safetensors(folder / name, shard, source)
    _write_index(folder, names, shards)


def _fill_safetensors(file: Path, specs: Sequence[TensorSpec], source: RowSource) -> None:
    header = _header(specs, {"format": "pt"})
    slots, end = [], len(header)
    for spec in specs:
        slots.append(Slot(key=spec.name, shape=spec.shape, dtype=spec.dtype, offset=end))
        end += spec.num_bytes
    descriptor, kept_bytes = open_kept(file)
    try:
        if os.pread(descriptor, len(header), 0) != header:
            os.ftruncate(descriptor, 0)
            kept_bytes = 0
            write_at(descriptor, header, 0)
        fill(descriptor, slots, source, kept_bytes)
        os.ftruncate(descriptor, end)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_index(
    folder: Path, names: Sequence[str], shards: Sequence[Sequence[TensorSpec]]
) -> None:
    weight_map = {
        spec.name: name for name, shard in zip(names, shards, strict=True) for spec in shard
    }
    index = {
        "metadata": {"total_size": sum(spec.num_bytes for shard in shards for spec in shard)},
        "weight_map": dict(sorted(weight_map.items())),
    }
    write_json(folder / "model.safetensors.index.json", index)


def write_weights(
    folder: Path,
    specs: Sequence[TensorSpec],
    tensors: Iterable[tuple[str, Tensor]],
    max_shard_bytes: int,
) -> None:
    """Write safetensors shards and ``model.safetensors.index.json``.

    Args:
        folder: existing folder.
        specs: every tensor.
        tensors: names and tensors in the same order; taken one at a time.
        max_shard_bytes: see `plan_shards`.
    """
    shards = plan_shards(specs, max_shard_bytes)
    stream = iter(tensors)
    names = shard_names(len(shards))
    for name, shard in zip(names, shards, strict=True):
        write_safetensors(folder / name, shard, stream, {"format": "pt"})
    assert next(stream, None) is None, "more tensors than were announced"
    _write_index(folder, names, shards)


def write_safetensors(
    file: Path,
    specs: Sequence[TensorSpec],
    tensors: Iterator[tuple[str, Tensor]],
    metadata: Mapping[str, str],
) -> None:
    """Write one safetensors file.

    Args:
        file: is replaced.
        specs: what is written, in order. Wider element types must come first: readers map the file
            into memory and want every tensor at a multiple of its element's size.
        tensors: names and tensors on the CPU; as many as there are specs are taken.
        metadata: goes into the header.
    """
    header = _header(specs, metadata)
    with open(file, "wb") as out:
        out.write(header)
        for spec in specs:
            name, tensor = next(tensors)
            found = (name, tuple(tensor.shape), tensor.dtype)
            assert found == (spec.name, spec.shape, spec.dtype), (found, spec)
            raw = tensor.contiguous().view(-1).view(torch.uint8).numpy()
            out.write(raw.data)
        out.flush()
        os.fsync(out.fileno())


def _header(specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """Everything before the tensors' bytes."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for spec in specs:
        start, end = end, end + spec.num_bytes
        header[spec.name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


@contextmanager
def atomic_folder(target: Path, overwrite: bool) -> Iterator[Path]:
    """Give a temporary folder that becomes `target` when the block ends without an error.

    Args:
        target: final name; its parent is made.
        overwrite: replace what is there. Without it, only an empty folder is.

    Raises:
        CheckpointError: when `target` is taken.
    """
    refuse_existing(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_folder(target)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    put_in_place(temporary, target)


def temporary_folder(target: Path) -> Path:
    """Where a folder is written before `put_in_place`; on the same file system."""
    return target.parent / f".{target.name}.tmp"


def put_in_place(temporary: Path, target: Path) -> None:
    """Rename a complete folder to its final name, replacing what is there."""
    aside = target.parent / f".{target.name}.replaced"
    shutil.rmtree(aside, ignore_errors=True)
    if target.exists():
        target.rename(aside)
    temporary.rename(target)
    shutil.rmtree(aside, ignore_errors=True)


def refuse_existing(target: Path, overwrite: bool) -> None:
    """Raise CheckpointError when something is at `target` that may not be replaced."""
    if target.is_dir() and (overwrite or not any(target.iterdir())):
        return
    if target.exists():
        remedy = "give another folder" + (" or --overwrite" if target.is_dir() else "")
        raise CheckpointError(f"{target}: exists already; {remedy}")


def check_free_space(folder: Path, num_bytes: int, bytes_there: int = 0) -> None:
    """Raise CheckpointError when the disk of `folder` (or its nearest parent) is too full.

    Args:
        folder: where something will be written.
        num_bytes: its size.
        bytes_there: how much of it is on the disk already.
    """
    place = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    free = shutil.disk_usage(place).free + bytes_there
    if free < num_bytes:
        raise CheckpointError(
            f"{folder}: {num_bytes / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free"
        )
