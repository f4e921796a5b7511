"""The benchmark of the converters: all of it at a small size, and that its bars are bars."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import convert_real_size
from benchmarks.convert_real_size import CASES, as_markdown, convert, run_case, write_source
from tests.tiny_weights import read_model_files, tiny_llm_config, tiny_vision_config

CONFIGS = {"vision": tiny_vision_config(), "llm": tiny_llm_config(448)}
SMALL = [dataclasses.replace(case, config=CONFIGS[case.part]) for case in CASES]


def test_shapes_are_the_published_ones() -> None:
    vision, llm = CASES
    assert 11.0e9 < vision.num_bytes < 11.2e9
    shapes = llm.shapes
    assert shapes["model.embed_tokens.weight"] == shapes["lm_head.weight"] == (64000, 7168)
    assert shapes["model.layers.3.self_attn.k_proj.weight"] == (1024, 7168)
    assert shapes["model.layers.3.mlp.gate_proj.weight"] == (20480, 7168)
    assert vision.shapes["encoder.layers.44.attn.qkv.weight"] == (9600, 3200)
    assert vision.shapes["embeddings.position_embedding"] == (1, 1025, 3200)
    assert vision.memory_bar == 2 * 2 * 12800 * 3200 + 500e6


def test_weights_are_finite_and_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert_real_size, "SHARD_BYTES", 50_000)
    write_source(tmp_path / "llm", SMALL[1])
    assert len(list((tmp_path / "llm").glob("*.safetensors"))) > 3
    tensors = read_model_files(tmp_path / "llm")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == SMALL[1].shapes
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert len(tensors["lm_head.weight"].unique()) > 1000


@pytest.mark.slow
def test_a_case_at_a_small_size(tmp_path: Path) -> None:
    found = run_case(tmp_path, SMALL[0])
    for way in ("in", "out"):
        assert found[way]["rate"] > 0 and found[way]["ratio"] > 0
        assert 50e6 < found[way]["peak_bytes"] < 600e6
    assert [each["same"] for each in found["verify"]] == [True, True]
    assert found["verify"][1]["text"][-1].startswith("the same: 43 of 43 tensors")
    assert not list(tmp_path.iterdir())
    text = as_markdown([found], "somewhere")
    assert "43 tensors, 0.00 GB" in text and "of `cp`" in text


@pytest.mark.parametrize(
    ("seconds", "peak_bytes", "passed"),
    [(10.0, 4e8, True), (14.0, 4e8, True), (15.0, 4e8, False), (10.0, 6e8, False)],
)
def test_bars(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seconds: float,
    peak_bytes: float,
    passed: bool,
) -> None:
    """The copies took 10 s; one slow and one fast round of each decide nothing."""
    noise = iter([1.0, 30.0, 3.0, 0.1, 1.0, 1.0])  # copy, conversion, copy, ...

    def timed(reads: Path, writes: Path, *command: Any) -> convert_real_size.Timing:
        is_copy = command[0] == "cp"
        return convert_real_size.Timing(
            seconds=next(noise) * (10.0 if is_copy else seconds),
            cpu_seconds=1.0,
            peak_bytes=int(peak_bytes),
        )

    monkeypatch.setattr(convert_real_size, "timed", timed)
    found = convert(SMALL[0], tmp_path / "in", tmp_path / "out", "tool.py")
    assert found["passed"] is passed
    assert found["ratio"] == pytest.approx(10 / seconds)


def test_memory_is_that_of_the_command_alone() -> None:
    """Also where this process has more, and has had much more."""
    assert len(bytes(400_000_000)) == 400_000_000
    status, text, usage = convert_real_size.run("bash", "-c", "echo said; exit 3")
    assert (status, text) == (3, "said\n")
    assert 1e6 < usage["peak_bytes"] < 30e6
    assert usage["cpu_seconds"] < 5


def test_a_command_that_fails_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="exit status 3"):
        convert_real_size.timed(tmp_path, tmp_path, "bash", "-c", "exit 3")
