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

from mmlm.conversion.rules import Shape
from mmlm.conversion.vocabulary import write_json
from mmlm.errors import CheckpointError

_SAFETENSORS_DTYPES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}

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
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / name, shard, stream, {"format": "pt"})
        weight_map |= {spec.name: name for spec in shard}
    assert next(stream, None) is None, "more tensors than were announced"
    index = {
        "metadata": {"total_size": sum(spec.num_bytes for spec in specs)},
        "weight_map": dict(sorted(weight_map.items())),
    }
    write_json(folder / "model.safetensors.index.json", index)


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
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for spec in specs:
        start, end = end, end + spec.num_bytes
        header[spec.name] = {
            "dtype": _SAFETENSORS_DTYPES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for spec in specs:
            name, tensor = next(tensors)
            found = (name, tuple(tensor.shape), tensor.dtype)
            assert found == (spec.name, spec.shape, spec.dtype), (found, spec)
            raw = tensor.contiguous().view(-1).view(torch.uint8).numpy()
            out.write(raw.data)
        out.flush()
        os.fsync(out.fileno())


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
    temporary = target.parent / f".{target.name}.tmp"
    aside = target.parent / f".{target.name}.replaced"
    for leftover in (temporary, aside):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
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


def check_free_space(folder: Path, num_bytes: int) -> None:
    """Raise CheckpointError when the disk of `folder` (or its nearest parent) is too full."""
    place = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    free = shutil.disk_usage(place).free
    if free < num_bytes:
        raise CheckpointError(
            f"{folder}: {num_bytes / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free"
        )
