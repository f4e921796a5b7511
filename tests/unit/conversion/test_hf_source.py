"""Three parts or a combined folder under one set of names."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmlm.conversion.convert import megatron_to_hf
from mmlm.conversion.hf_source import open_combined, open_parts
from mmlm.errors import CheckpointError
from tests.conversion_helpers import assert_equal, convert_in, edit_safetensors
from tests.tiny_weights import PROJECTOR_FILE, combined_state_dict, read_model_files


def test_parts_and_combined_say_the_same(tmp_path, write_tiny_parts):
    parts = write_tiny_parts(shards=2)
    convert_in(parts, tmp_path / "ckpt")
    out = megatron_to_hf(load=tmp_path / "ckpt", output=tmp_path / "out")
    three = open_parts(parts / "vision", parts / "llm", parts / "vision" / PROJECTOR_FILE)
    one = open_combined(out)
    assert three.config.model == one.config.model
    assert three.shapes == one.shapes
    for name, tensor in combined_state_dict(parts).items():
        for source in (three, one):
            assert torch.equal(source.read(name), tensor)
            assert source.dtype(name) == tensor.dtype
            assert Path(source.file(name)).is_file()
    assert three.file("mlp1.0.weight").endswith(PROJECTOR_FILE)


def test_old_rotary_buffers_are_left_out(tmp_path, write_tiny_parts):
    parts = write_tiny_parts()
    expected = combined_state_dict(parts)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_safetensors(parts / "llm", lambda tensors: tensors.update({name: torch.ones(6)}))
    convert_in(parts, tmp_path / "ckpt")
    megatron_to_hf(load=tmp_path / "ckpt", output=tmp_path / "out")
    assert_equal(read_model_files(tmp_path / "out"), expected)


def test_missing_stray_and_misshapen_tensors_are_all_listed(tmp_path, write_tiny_parts):
    parts = write_tiny_parts()

    def damage(tensors: dict[str, Tensor]) -> None:
        tensors["encoder.layers.9.ls1"] = tensors.pop("encoder.layers.1.ls1")
        tensors["embeddings.class_embedding"] = torch.zeros(1, 1, 41)

    edit_safetensors(parts / "vision", damage)
    with pytest.raises(CheckpointError) as caught:
        convert_in(parts, tmp_path / "ckpt")
    message = str(caught.value)
    file = parts / "vision/model.safetensors"
    assert "3 of 79 tensors do not fit the model" in message
    assert "missing: vision_model.encoder.layers.1.ls1 [40]" in message
    assert f"stray: vision_model.encoder.layers.9.ls1 [40] in {file}" in message
    assert (
        "wrong shape: vision_model.embeddings.class_embedding is [1, 1, 41], the config says "
        f"[1, 1, 40], in {file}" in message
    )
    assert not (tmp_path / "ckpt").exists()
