"""Element types keep what they can, and say when they cannot."""

import json

import pytest
import torch

from mmlm.checkpoint.manifest import Manifest
from mmlm.conversion.convert import megatron_to_hf
from mmlm.conversion.dtypes import cast, dtype_name, torch_name
from mmlm.errors import CheckpointError
from tests.conversion_helpers import assert_equal, convert_in, edit_safetensors
from tests.tiny_weights import PROJECTOR_FILE, combined_state_dict, read_model_files


def test_names():
    assert dtype_name([torch.bfloat16, torch.bfloat16]) == "bf16"
    assert dtype_name(iter([torch.float32])) == "fp32"
    assert dtype_name([torch.float16, torch.float32]) == "mixed"
    assert torch_name([torch.float16, torch.bfloat16, torch.bfloat16]) == "bfloat16"


def test_cast_keeps_what_is_not_finite():
    tensor = torch.tensor([1.0, float("inf"), float("nan"), 65504.0])
    assert cast(tensor, torch.float32, "x") is tensor
    assert str(cast(tensor, torch.float16, "x").tolist()) == "[1.0, inf, nan, 65504.0]"
    with pytest.raises(CheckpointError, match="tensor 'x' holds 70000, which is too large"):
        cast(torch.tensor([1.0, 7e4]), torch.float16, "x")


@pytest.mark.parametrize("where", ["in", "out"])
def test_dtype_is_converted_on_request(tmp_path, write_tiny_parts, where):
    parts = write_tiny_parts()
    options = [{"dtype": "bf16"} if side == where else {} for side in ("in", "out")]
    convert_in(parts, tmp_path / "ckpt", **options[0])
    megatron_to_hf(load=tmp_path / "ckpt", output=tmp_path / "out", **options[1])
    expected = {name: t.bfloat16() for name, t in combined_state_dict(parts).items()}
    assert_equal(read_model_files(tmp_path / "out"), expected)
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "bfloat16"
    dtype = Manifest.read(tmp_path / "ckpt/iter_0000000").dtype
    assert dtype == ("bf16" if where == "in" else "fp32")


def test_parts_of_different_dtypes_stay_so(tmp_path, write_tiny_parts):
    parts = write_tiny_parts(dtype=torch.bfloat16)
    projector = parts / "vision" / PROJECTOR_FILE
    torch.save({k: v.half() for k, v in torch.load(projector).items()}, projector)
    expected = combined_state_dict(parts)
    directory = convert_in(parts, tmp_path / "ckpt")
    assert Manifest.read(directory).dtype == "mixed"
    megatron_to_hf(load=directory, output=tmp_path / "out")
    assert_equal(read_model_files(tmp_path / "out"), expected)
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_value_too_large_for_fp16_is_refused(tmp_path, write_tiny_parts):
    parts = write_tiny_parts()
    edit_safetensors(
        parts / "llm", lambda t: t.update({"model.norm.weight": torch.full((48,), 1e5)})
    )
    with pytest.raises(CheckpointError, match=r"model.norm.weight' holds 100000, which is too lar"):
        convert_in(parts, tmp_path / "ckpt", dtype="fp16")
