"""Where the tensors of a ``.safetensors`` file lie.

The format is a length (8 bytes, little-endian), a json header of that length, and the tensors'
bytes. The library judges the file; it does not say where a tensor lies, which is read here.
See https://huggingface.co/docs/safetensors (format).
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from mmlm.checkpoint.places import Place, contiguous_stride
from mmlm.errors import CheckpointError

DTYPES: dict[str, torch.dtype] = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Name in the header -> element type."""

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
"""Element type -> name in the header."""


def safetensors_places(file: Path) -> dict[str, Place]:
    """Where the tensors of a file lie.

    Raises:
        CheckpointError: when a name comes twice; all that do are listed.
        ValueError: when the file is damaged or has an element type that is not known here.
        SafetensorError: when the library finds the file damaged.
    """
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > os.fstat(stream.fileno()).st_size - 8:
            raise ValueError("the header is longer than the file")
        text = stream.read(length)
    twice: list[str] = []
    header = loads_unique(text, twice)
    if twice:
        names = ", ".join(f"'{name}'" for name in sorted(twice))
        raise CheckpointError(f"{file}: holds tensors twice: {names}")
    with safe_open(file, framework="pt", device="cpu"):  # lengths, offsets and shapes are in order
        pass
    return {
        name: _place(name, entry, 8 + length)
        for name, entry in header.items()
        if name != "__metadata__"
    }


def loads_unique(text: bytes | str, twice: list[str]) -> Any:
    """Read json; keys that come twice in an object are added to a list.

    Raises:
        ValueError: when it is not json.
    """

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        content: dict[str, Any] = {}
        for key, value in found:
            if key in content and key not in twice:
                twice.append(key)
            content[key] = value
        return content

    return json.loads(text, object_pairs_hook=pairs)


def _place(name: str, entry: dict[str, Any], start: int) -> Place:
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"tensor '{name}' is of the unknown type {entry['dtype']}")
    shape = tuple(entry["shape"])
    return Place(
        offset=start + entry["data_offsets"][0],
        shape=shape,
        stride=contiguous_stride(shape),
        dtype=DTYPES[entry["dtype"]],
    )
