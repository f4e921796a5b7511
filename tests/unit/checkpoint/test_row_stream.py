"""Every block is written once, in its place; what is there and right is not written again."""

import os
import threading
from pathlib import Path

import pytest
import torch

from mmlm.checkpoint import row_stream
from mmlm.checkpoint.row_stream import Slot, fill, open_kept

TENSORS = {"a": torch.randn(7, 3), "b": torch.randn(11).half(), "c": torch.randn(1, 5, 5)}


def slots() -> list[Slot]:
    placed, end = [], 5
    for key, tensor in TENSORS.items():
        placed.append(Slot(key=key, shape=tuple(tensor.shape), dtype=tensor.dtype, offset=end))
        end += tensor.nbytes + 2
    return placed


def source(key: str, start: int, stop: int) -> torch.Tensor:
    return TENSORS[key][start:stop]


def write(file: Path) -> None:
    descriptor, kept = open_kept(file)
    fill(descriptor, slots(), source, kept)
    os.close(descriptor)


def content(file: Path) -> list[bytes]:
    raw = file.read_bytes()
    return [raw[each.offset : each.offset + TENSORS[each.key].nbytes] for each in slots()]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows of a, eight of b, and a single one of c, which is larger."""
    monkeypatch.setattr(row_stream, "BLOCK_BYTES", 24)


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Offsets of what is written."""
    offsets: list[int] = []
    write_at = row_stream.write_at

    def counted(descriptor: int, raw: memoryview | bytes, offset: int) -> None:
        offsets.append(offset)
        write_at(descriptor, raw, offset)

    monkeypatch.setattr(row_stream, "write_at", counted)
    return offsets


def test_blocks_come_to_their_places(tmp_path: Path, writes: list[int]):
    descriptor, kept = open_kept(tmp_path / "x")
    assert kept == 0
    threads = set()

    def watched(key: str, start: int, stop: int) -> torch.Tensor:
        threads.add(threading.get_ident())
        return source(key, start, stop)

    fill(descriptor, slots(), watched)
    os.close(descriptor)
    assert content(tmp_path / "x") == [each.numpy().tobytes() for each in TENSORS.values()]
    # rows 0, 2, 4 and 6 of a, all of b (22 bytes), all of c
    assert writes == [5, 29, 53, 77, 5 + 84 + 2, 91 + 22 + 2]
    assert len(threads) == 1 and threading.get_ident() not in threads


@pytest.mark.parametrize("damage", ["none", "one byte", "end", "all"])
def test_only_what_is_wrong_is_written_again(tmp_path: Path, writes: list[int], damage: str):
    file = tmp_path / "x"
    write(file)
    first, raw = list(writes), bytearray(file.read_bytes())
    if damage == "one byte":
        raw[60] ^= 1
    elif damage == "end":
        del raw[-1:]
    elif damage == "all":
        raw = bytearray(len(raw))
    file.write_bytes(raw)
    writes.clear()
    write(file)
    again = {"none": [], "one byte": [53], "end": [first[-1]], "all": first}[damage]
    assert writes == again
    assert content(file) == [each.numpy().tobytes() for each in TENSORS.values()]


def test_an_error_of_the_source_stops_the_writing(tmp_path: Path):
    def broken(key: str, start: int, stop: int) -> torch.Tensor:
        if key == "b":
            raise KeyboardInterrupt
        return source(key, start, stop)

    descriptor, _ = open_kept(tmp_path / "x")
    with pytest.raises(KeyboardInterrupt):
        fill(descriptor, slots(), broken)
    os.close(descriptor)
