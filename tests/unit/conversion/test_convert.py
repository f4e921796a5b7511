"""Weights in and out are the same to the bit; whatever is wrong is said and leaves nothing."""

import json
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

from mmlm.checkpoint.manifest import Manifest, resolve
from mmlm.checkpoint.tensor_reader import TensorReader
from mmlm.conversion.convert import hf_to_megatron, megatron_to_hf
from mmlm.conversion.hf_config import read_combined
from mmlm.errors import CheckpointError, ConfigError
from tests.conversion_helpers import assert_equal, convert_in
from tests.tiny_weights import (
    PROJECTOR_FILE,
    combined_state_dict,
    read_model_files,
)

LAYOUTS = [
    (dtype, file_format, shards)
    for dtype in (torch.float32, torch.bfloat16)
    for file_format in ("safetensors", "bin")
    for shards in (1, 3)
]


@pytest.mark.parametrize(("dtype", "file_format", "shards"), LAYOUTS)
def test_round_trip_is_exact(tmp_path, write_tiny_parts, dtype, file_format, shards):
    parts = write_tiny_parts(dtype=dtype, file_format=file_format, shards=shards)
    expected = combined_state_dict(parts)
    convert_in(parts, tmp_path / "ckpt")
    out = tmp_path / "out"
    megatron_to_hf(load=tmp_path / "ckpt", output=out, parts=True, max_shard_size_bytes=100_000)
    assert len(list(out.glob("*.safetensors"))) > 1
    assert_equal(read_model_files(out), expected)
    assert_equal(combined_state_dict(out), expected)
    # and the combined folder goes in again
    hf_to_megatron(combined=out, output=tmp_path / "again")
    megatron_to_hf(load=tmp_path / "again", output=tmp_path / "out2")
    assert_equal(read_model_files(tmp_path / "out2"), expected)
    assert (tmp_path / "out2/config.json").read_text() == (out / "config.json").read_text()


def test_the_checkpoint_holds_global_names_in_true_shapes(tmp_path, write_tiny_parts):
    parts = write_tiny_parts()
    expected = combined_state_dict(parts)
    directory = convert_in(parts, tmp_path / "ckpt")
    assert directory == tmp_path / "ckpt/iter_0000000"
    assert resolve(tmp_path / "ckpt") == directory
    manifest = Manifest.read(directory)
    assert (manifest.iteration, manifest.dtype, manifest.has_optimizer) == (0, "fp32", False)
    reader = TensorReader(directory)
    assert all(name.startswith("model.") for name in reader.infos)
    # an independent account of one layer's rows: 5 vision heads of 8, 2 text groups of 2 x 12
    hf = expected["vision_model.encoder.layers.1.attn.qkv.weight"]
    found = reader.read("model.vision_model.decoder.layers.1.self_attention.linear_qkv.weight")
    order = [
        kind * 40 + head * 8 + row for head in range(5) for kind in range(3) for row in range(8)
    ]
    assert torch.equal(found, hf[order])
    prefix = "language_model.model.layers.1.self_attn."
    query, key, value = (expected[f"{prefix}{kind}_proj.weight"] for kind in "qkv")
    found = reader.read("model.language_model.decoder.layers.1.self_attention.linear_qkv.weight")
    groups = [
        torch.cat(
            (query[24 * g : 24 * g + 24], key[12 * g : 12 * g + 12], value[12 * g : 12 * g + 12])
        )
        for g in range(2)
    ]
    assert torch.equal(found, torch.cat(groups))
    found = reader.read("model.language_model.decoder.layers.1.mlp.linear_fc1.weight")
    mlp = "language_model.model.layers.1.mlp."
    assert torch.equal(found[:72], expected[mlp + "gate_proj.weight"])
    assert torch.equal(found[72:], expected[mlp + "up_proj.weight"])


def test_the_vocabulary_grows_for_the_nine_tokens(tmp_path, write_tiny_parts, num_pieces):
    parts = write_tiny_parts(num_new_rows=0, dtype=torch.bfloat16)
    old = combined_state_dict(parts)
    convert_in(parts, tmp_path / "ckpt", seed=5)
    out = megatron_to_hf(load=tmp_path / "ckpt", output=tmp_path / "out")
    new = read_model_files(out)
    head, embedding = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
    for name in (head, embedding):
        assert new[name].shape[0] == num_pieces + 9
        assert torch.equal(new[name][:num_pieces], old[name])
    mean = old[head].double().mean(dim=0).bfloat16()
    assert torch.equal(new[head][num_pieces:], mean.expand(9, -1))
    assert 0.01 < float(new[embedding][num_pieces:].float().std()) < 0.03
    config = read_combined(out)
    assert config.model.language.vocab_size == num_pieces + 9
    assert config.model == Manifest.read(tmp_path / "ckpt/iter_0000000").model
    added = json.loads((out / "added_tokens.json").read_text())
    assert added["<img>"] == num_pieces
    assert added["</box>"] == num_pieces + 8


def test_a_file_damaged_inside_leaves_no_checkpoint(tmp_path, write_tiny_parts, monkeypatch):
    parts = write_tiny_parts()
    from mmlm.conversion import hf_reader

    read = hf_reader._PlacedFile.read_rows

    def fail(self: Any, name: str, start: int, stop: int) -> Tensor:
        if name == "model.norm.weight":
            raise OSError("Input/output error")
        return read(self, name, start, stop)

    monkeypatch.setattr(hf_reader._PlacedFile, "read_rows", fail)
    message = r"llm/model.safetensors: tensor 'model.norm.weight' cannot be read.*Input/output"
    with pytest.raises(CheckpointError, match=message):
        convert_in(parts, tmp_path / "ckpt")
    assert list((tmp_path / "ckpt").iterdir()) == []


def test_what_is_there_is_replaced_only_on_request(tmp_path, write_tiny_parts):
    parts = write_tiny_parts()
    convert_in(parts, tmp_path / "ckpt")
    with pytest.raises(CheckpointError, match="iter_0000000: exists already"):
        convert_in(parts, tmp_path / "ckpt")
    convert_in(parts, tmp_path / "ckpt", overwrite=True, dtype="bf16")
    assert Manifest.read(tmp_path / "ckpt/iter_0000000").dtype == "bf16"
    shutil.copytree(tmp_path / "ckpt/iter_0000000", tmp_path / "ckpt/iter_0000200")
    with pytest.raises(CheckpointError, match="holds iter_0000200 of a training"):
        convert_in(parts, tmp_path / "ckpt", overwrite=True)
    megatron_to_hf(load=tmp_path / "ckpt", output=tmp_path / "out")
    with pytest.raises(CheckpointError, match="out: exists already"):
        megatron_to_hf(load=tmp_path / "ckpt", output=tmp_path / "out")


def test_what_is_missing_is_named(tmp_path, write_tiny_parts):
    parts = write_tiny_parts()
    with pytest.raises(CheckpointError, match="give the ViT's and the LLM's folder, one part al"):
        hf_to_megatron(vision=parts / "vision", projector=parts / "p.pth", output=tmp_path / "ckpt")
    with pytest.raises(CheckpointError, match="either the three parts or a combined folder"):
        hf_to_megatron(vision=parts, combined=parts, output=tmp_path / "ckpt")
    with pytest.raises(CheckpointError, match="nothing to write"):
        megatron_to_hf(load=parts, output=tmp_path / "out", combined=False)
    (parts / "vision" / PROJECTOR_FILE).unlink()
    with pytest.raises(CheckpointError, match=r"hermes_2_yi_34b.pth: there is no such file"):
        convert_in(parts, tmp_path / "ckpt")
    (parts / "llm/config.json").unlink()
    with pytest.raises(ConfigError, match=r"llm/config.json: missing"):
        convert_in(parts, tmp_path / "ckpt")
