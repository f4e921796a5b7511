"""Tensors are where the file says, and a file that contradicts itself is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from mmlm.checkpoint.places import read_whole
from mmlm.conversion.safetensors_file import (
    DTYPE_NAMES,
    DTYPES,
    loads_unique,
    safetensors_places,
)
from mmlm.errors import CheckpointError


def write(file: Path, header: str, data: bytes) -> None:
    file.write_bytes(len(header).to_bytes(8, "little") + header.encode() + data)


def entry(start: int, stop: int, dtype: str = "F32", **changes: Any) -> str:
    shape = [(stop - start) // 4]
    return json.dumps({"dtype": dtype, "shape": shape, "data_offsets": [start, stop], **changes})


def test_every_element_type_is_found(tmp_path: Path):
    tensors = {name: torch.arange(6).view(2, 3).to(dtype) for name, dtype in DTYPES.items()} | {
        "scalar": torch.tensor(2.5)
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    places = safetensors_places(tmp_path / "x.safetensors")
    assert places.keys() == tensors.keys()
    with open(tmp_path / "x.safetensors", "rb") as stream:
        for name, place in places.items():
            found = read_whole(stream.fileno(), place)
            assert found.dtype == tensors[name].dtype
            assert torch.equal(found.double(), tensors[name].double())
    assert {name: DTYPE_NAMES[dtype] for name, dtype in DTYPES.items()} == {n: n for n in DTYPES}


def test_names_that_come_twice_are_all_listed(tmp_path: Path):
    file = tmp_path / "x.safetensors"
    pairs = [("b", 0, 4), ("a", 4, 8), ("b", 8, 12), ("c", 12, 16), ("a", 16, 20)]
    header = ",".join(f'"{name}":{entry(start, stop)}' for name, start, stop in pairs)
    write(file, "{" + header + "}", bytes(20))
    with pytest.raises(CheckpointError, match=r"x\.safetensors: holds tensors twice: 'a', 'b'$"):
        safetensors_places(file)
    twice: list[str] = []
    assert loads_unique('{"a": {"x": 1}, "b": {"x": 2}}', twice) == {"a": {"x": 1}, "b": {"x": 2}}
    assert twice == []


@pytest.mark.parametrize(
    ("header", "data", "error", "message"),
    [
        ('{"a":' + entry(0, 8) + "}", 4, SafetensorError, "incomplete"),
        ('{"a":' + entry(0, 8, shape=[3]) + "}", 8, SafetensorError, ""),
        ('{"a":' + entry(0, 4) + ',"b":' + entry(8, 12) + "}", 12, SafetensorError, ""),
        ('{"a":', 0, ValueError, "Expecting"),
        ('{"a":' + entry(0, 8, "F4", shape=[16]) + "}", 8, ValueError, "'a' is of the unknown ty"),
    ],
)
def test_contradictions_are_refused(
    tmp_path: Path, header: str, data: int, error: type[Exception], message: str
):
    write(tmp_path / "x", header, bytes(data))
    with pytest.raises(error, match=message):
        safetensors_places(tmp_path / "x")


def test_a_header_beyond_the_end_is_refused(tmp_path: Path):
    (tmp_path / "x").write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match="the header is longer than the file"):
        safetensors_places(tmp_path / "x")
