"""Memory of a conversion does not grow with its tensors: it is a few blocks, in both directions."""

import json
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from mmlm.checkpoint import row_stream
from mmlm.conversion.convert import hf_to_megatron, megatron_to_hf
from tests.tiny_weights import FileFormat, llm_shapes, tiny_llm_config, write_model_files

ROWS, WIDTH = 48_000, 512
LARGEST = ROWS * WIDTH * 4
"""Bytes of the embedding and of the head, each."""


def peak_growth(work: Callable[[], object]) -> int:
    """How many bytes the peak of resident memory is above the start, in a process of its own."""
    receive, send = get_context("fork").Pipe(duplex=False)

    def run() -> None:
        torch.set_num_threads(1)
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = memory("VmRSS")
        work()
        send.send(memory("VmHWM") - before)

    process = get_context("fork").Process(target=run)
    process.start()
    process.join(120)
    assert process.exitcode == 0
    growth: int = receive.recv()
    return growth


def memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024


def write_llm(folder: Path, file_format: FileFormat) -> None:
    """An LLM whose embedding and head are nearly all of it."""
    config = tiny_llm_config(
        ROWS, hidden_size=WIDTH, num_attention_heads=8, num_key_value_heads=2, num_hidden_layers=1
    )
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: torch.full(shape, 0.5) for name, shape in llm_shapes(config).items()}
    write_model_files(folder, tensors, file_format, 1)


def test_the_measurement_sees_a_tensor() -> None:
    assert peak_growth(lambda: torch.ones(LARGEST // 4)) > 0.9 * LARGEST


@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
def test_less_than_one_large_tensor_is_in_memory(
    tmp_path: Path, file_format: FileFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_stream, "BLOCK_BYTES", 2**20)  # so that the tensor stands out
    llm = tmp_path / "llm"
    write_llm(llm, file_format)
    there = peak_growth(lambda: hf_to_megatron(llm=llm, output=tmp_path / "ckpt"))
    back = peak_growth(lambda: megatron_to_hf(load=tmp_path / "ckpt", output=tmp_path / "out"))
    cast = peak_growth(
        lambda: megatron_to_hf(load=tmp_path / "ckpt", output=tmp_path / "bf16", dtype="bf16")
    )
    # measured: 41, 30 and 33 MB, half of it modules that are imported late
    assert max(there, back, cast) < LARGEST, (there, back, cast)
