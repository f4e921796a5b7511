"""Every difference is seen and told, and what is the same is the same."""

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mmlm.conversion import verify
from mmlm.conversion.comparable import Weights, open_hf, open_megatron
from mmlm.conversion.verify import Comparison, compare
from mmlm.conversion.vocabulary import EMBEDDING_STD
from tests.conversion_helpers import convert_in, edit_safetensors

TOOL = Path(__file__).parents[3] / "tools" / "checkpoint_convert" / "verify.py"
QUERY = "language_model.model.layers.1.self_attn.q_proj.weight"


def weights_of(tensors: dict[str, torch.Tensor], where: str = "A") -> Weights:
    return Weights(
        where=where,
        shapes={name: tuple(tensor.shape) for name, tensor in tensors.items()},
        dtypes={name: tensor.dtype for name, tensor in tensors.items()},
        read_rows=lambda name, start, stop: tensors[name][start:stop],
    )


def compare_two(
    first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], seed: int = 42
) -> Comparison:
    return compare(weights_of(first), weights_of(second, "B"), seed=seed)


@pytest.fixture(params=[16, verify._CHUNK_BYTES])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """A row at a time, and all at once."""
    monkeypatch.setattr(verify, "_CHUNK_BYTES", request.param)
    return int(request.param)


def test_equal_weights_have_one_checksum(chunk: int):
    first = {"a": torch.randn(7, 3), "b": torch.randn(4).bfloat16()}
    sizes: list[int] = []
    backwards = weights_of(dict(reversed(first.items())))
    found = compare(weights_of(first), backwards, seed=0, on_bytes=sizes.append)
    assert (found.differences, found.notes, found.num_equal) == ([], [], 2)
    assert sum(sizes) == 7 * 3 * 4 + 4 * 2
    assert compare(backwards, backwards, seed=0).checksum == found.checksum
    for other in (
        {**first, "a": first["a"].view(3, 7)},
        {**first, "a": -first["a"]},
        {"c": first["a"], "b": first["b"]},
    ):
        assert compare_two(other, other).checksum != found.checksum


def test_one_bit_is_seen_with_its_place(chunk: int):
    first = {"a": torch.arange(30.0).view(10, 3)}
    second = {"a": first["a"].clone()}
    second["a"].view(torch.int32)[7, 1] ^= 1
    assert compare_two(first, second).differences == [
        "a: 1 of 30 elements differ, first at "
        "[7, 1] 22 (0x41b00000) against 22.0000019 (0x41b00001)"
    ]


def test_signs_of_zero_and_bits_of_nan_are_bits(chunk: int):
    nan = torch.tensor([0x7FC0, 0x7FC1], dtype=torch.int16).view(torch.bfloat16)
    assert compare_two({"a": nan}, {"a": nan.clone()}).num_equal == 1
    found = compare_two({"a": nan[:1], "b": torch.zeros(1)}, {"a": nan[1:], "b": -torch.zeros(1)})
    assert [line.split(", first at ")[1] for line in found.differences] == [
        "[0] nan (0x7fc0) against nan (0x7fc1)",
        "[0] 0 (0x00000000) against -0 (0x80000000)",
    ]


def test_no_more_than_the_first_places_are_told(chunk: int):
    found = compare_two({"a": torch.zeros(40, 2)}, {"a": torch.ones(40, 2)})
    (line,) = found.differences
    assert line.startswith("a: 80 of 80 elements differ, first at [0, 0] 0")
    assert line.count("against") == 3


def test_names_shapes_and_types_are_told(chunk: int):
    same = torch.randn(6, 2)
    first = {"lost": torch.ones(2), "shape": torch.ones(2, 3), "type": same.bfloat16()}
    second = {"stray": torch.ones(3), "shape": torch.ones(3, 2), "type": same.bfloat16().float()}
    assert compare_two(first, second).differences == [
        "lost [2]: missing from B",
        "stray [3]: missing from A",
        "shape: [2, 3] against [3, 2]",
        "type: bfloat16 against float32, equal values",
    ]
    second["type"] = same
    assert "type: bfloat16 against float32" in compare_two(first, second).differences
    assert compare_two(first, second).differences[-1].startswith("type: 12 of 12 elements differ")


def grown(seed: int, num_new: int = 9) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A vocabulary before and after, the rule written out again."""
    old = {
        "language_model.model.embed_tokens.weight": torch.randn(20, 4),
        "language_model.lm_head.weight": torch.randn(20, 4),
    }
    embedding, head = old.values()
    generator = torch.Generator().manual_seed(seed)
    rows = EMBEDDING_STD * torch.randn(num_new, 4, generator=generator)
    mean = head.double().mean(dim=0).float().expand(num_new, -1)
    new = (torch.cat((embedding, rows)), torch.cat((head, mean)))
    return old, dict(zip(old, new, strict=True))


def test_rows_of_added_tokens_are_explained(chunk: int):
    old, new = grown(42)
    for first, second, larger in ((old, new, "B"), (new, old, "A")):
        found = compare_two(first, second)
        assert (found.differences, found.num_equal) == ([], 2)
        assert found.notes == [
            f"language_model.{name}: rows 20 to 28, which only {larger} has, are those of added "
            f"tokens: {rule}"
            for name, rule in (
                ("model.embed_tokens.weight", "drawn with seed 42"),
                ("lm_head.weight", "the mean of the old rows"),
            )
        ]


def test_other_rows_are_not(chunk: int):
    old, new = grown(7)
    assert [line.split(" are ")[1] for line in compare_two(old, new).differences] == [
        "not drawn with seed 42"
    ]
    assert compare_two(old, new, seed=7).differences == []
    new["language_model.lm_head.weight"][23, 1] += 1
    assert [line.split(" are ")[1] for line in compare_two(old, new, seed=7).differences] == [
        "not the mean of the old rows"
    ]
    new["language_model.model.embed_tokens.weight"][19, 0] = 0  # an old row
    found = compare_two(old, new, seed=7)
    assert "1 of 80 elements differ, first at [19, 0]" in found.differences[0]
    old, new = grown(42, num_new=10)
    assert [line.split(": ")[1] for line in compare_two(old, new).differences] == [
        "[20, 4] against [30, 4]"
    ] * 2


@pytest.mark.parametrize("change", ["none", "value", "rows", "grow"])
def test_a_checkpoint_against_its_files(write_tiny_parts, tmp_path: Path, change: str):
    parts = write_tiny_parts(dtype=torch.bfloat16, num_new_rows=0 if change == "grow" else 9)
    checkpoint = convert_in(parts, tmp_path / "ckpt")
    name = QUERY.removeprefix("language_model.")
    edits: dict[str, Callable[[dict[str, Any]], None]] = {
        "value": lambda tensors: tensors[name][5, 6].zero_(),
        # a head too far
        "rows": lambda tensors: tensors.update({name: tensors[name].roll(12, 0)}),
    }
    if change in edits:
        edit_safetensors(parts / "llm", edits[change])
    for first, second in (
        (open_hf(parts), open_megatron(checkpoint)),
        (open_megatron(checkpoint), open_hf(parts)),
    ):
        found = compare(first, second, seed=42)
        assert len(found.differences) == (change in edits)
        assert len(found.notes) == (2 if change == "grow" else 0)
        for line in found.differences:
            assert line.startswith(f"{QUERY}: ")
            assert (" 1 of 2304 elements differ, first at [5, 6]" in line) == (change == "value")


def test_the_command(
    write_tiny_parts,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """0 the same, 1 not the same, 2 cannot be read."""

    def run(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["verify.py", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(TOOL), run_name="__main__")
        captured = capsys.readouterr()
        return int(stopped.value.code or 0), captured.out + captured.err

    parts = write_tiny_parts()
    convert_in(parts, tmp_path / "ckpt")
    capsys.readouterr()
    status, text = run("--hf", parts, "--megatron", tmp_path / "ckpt")
    assert status == 0
    assert "the same: 79 of 79 tensors are equal to the bit" in text
    assert re.search(r"checksum of .*in: sha256 [0-9a-f]{64}", text)
    assert "comparing: 100%" in text
    status, text = run("--hf", parts, "--hf", parts / "vision", "--max-differences", 2)
    assert status == 1
    assert f"missing from {parts / 'vision'}" in text
    assert "... and 34 more" in text
    assert "not the same: 43 of 79" in text
    status, text = run("--hf", parts, "--megatron", tmp_path / "gone")
    assert status == 2
    assert "error: " in text and "gone: does not exist" in text
    status, text = run("--hf", parts)
    assert status == 2
    assert "give two sources" in text
