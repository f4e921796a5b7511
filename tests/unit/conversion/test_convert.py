"""Weights in and out are the same to the bit; whatever is wrong is said and leaves nothing."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmlm.checkpoint.manifest import Manifest, resolve
from mmlm.checkpoint.storage import TensorReader
from mmlm.conversion.convert import hf_to_megatron, megatron_to_hf
from mmlm.conversion.hf_config import read_combined
from mmlm.errors import CheckpointError, ConfigError
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


def convert_in(parts: Path, output: Path, **options: Any) -> Path:
    """The three parts of a folder into a checkpoint."""
    return hf_to_megatron(vision=parts / "vision", llm=parts / "llm", output=output, **options)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Same names, dtypes, shapes and bits."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        raw = [each.contiguous().view(-1).view(torch.uint8) for each in (found[name], tensor)]
        assert torch.equal(*raw), name


def edit_safetensors(folder: Path, change: Any) -> None:
    """Apply a function to the dict of a folder's only safetensors file."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


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


def test_small_files_travel(tmp_path, write_tiny_parts):
    parts = write_tiny_parts(unknown_key={"kept": 1})
    (parts / "llm/generation_config.json").write_text('{"max_new_tokens": 5}')
    (parts / "vision/preprocessor_config.json").write_text('{"size": 56}')
    convert_in(parts, tmp_path / "ckpt")
    out = megatron_to_hf(load=tmp_path / "ckpt", output=tmp_path / "out", parts=True)
    tokenizer = {
        "tokenizer.model",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
    }
    for folder, names in {
        out: tokenizer | {"generation_config.json", "preprocessor_config.json", "config.json"},
        out / "llm": tokenizer | {"generation_config.json", "config.json"},
        out / "vision": {"preprocessor_config.json", "config.json", PROJECTOR_FILE},
    }.items():
        assert {name for name in names if (folder / name).is_file()} == names
    config = json.loads((out / "config.json").read_text())
    assert config["llm_config"]["unknown_key"] == {"kept": 1}
    for part, key in (("llm", "llm_config"), ("vision", "vision_config")):
        original = json.loads((parts / part / "config.json").read_text())
        assert json.loads((out / part / "config.json").read_text()) == original
        assert config[key] == original


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


def test_a_file_damaged_inside_leaves_no_checkpoint(tmp_path, write_tiny_parts, monkeypatch):
    parts = write_tiny_parts()
    from mmlm.conversion import hf_reader

    read = hf_reader._SafeFile.read

    def fail(self: Any, name: str) -> Tensor:
        if name == "model.norm.weight":
            raise OSError("Input/output error")
        return read(self, name)

    monkeypatch.setattr(hf_reader._SafeFile, "read", fail)
    message = r"llm/model.safetensors: tensor 'model.norm.weight' cannot be read.*Input/output"
    with pytest.raises(CheckpointError, match=message):
        convert_in(parts, tmp_path / "ckpt")
    assert list((tmp_path / "ckpt").iterdir()) == []


def test_a_value_too_large_for_fp16_is_refused(tmp_path, write_tiny_parts):
    parts = write_tiny_parts()
    edit_safetensors(
        parts / "llm", lambda t: t.update({"model.norm.weight": torch.full((48,), 1e5)})
    )
    with pytest.raises(CheckpointError, match=r"model.norm.weight' holds 100000, which is too lar"):
        convert_in(parts, tmp_path / "ckpt", dtype="fp16")


def test_other_element_types_are_refused_unless_converted(tmp_path, write_tiny_parts):
    parts = write_tiny_parts()
    projector = parts / "vision" / PROJECTOR_FILE
    torch.save({k: v.double() for k, v in torch.load(projector).items()}, projector)
    with pytest.raises(CheckpointError, match=r"'mlp1.0.weight' is torch.float64; supported are"):
        convert_in(parts, tmp_path / "ckpt")
    convert_in(parts, tmp_path / "ckpt", dtype="fp32")


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
    with pytest.raises(CheckpointError, match="give the ViT's and the LLM's folder"):
        hf_to_megatron(vision=parts / "vision", output=tmp_path / "ckpt")
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


def test_an_export_that_does_not_fit_its_manifest_is_refused(tmp_path, write_tiny_parts):
    directory = convert_in(write_tiny_parts(), tmp_path / "ckpt")
    file = directory / "mmlm.json"
    content = json.loads(file.read_text())
    content["model"]["vision"]["num_layers"] = 2
    file.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"stray: model.vision_model.decoder.layers.2"):
        megatron_to_hf(load=directory, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_without_huggingface_files_exports(tmp_path, write_tiny_parts):
    parts = write_tiny_parts()
    directory = convert_in(parts, tmp_path / "ckpt")
    model = Manifest.read(directory).model
    shutil.rmtree(directory / "hf_assets")
    out = megatron_to_hf(load=directory, output=tmp_path / "out")
    assert read_combined(out).model == model
    assert_equal(read_model_files(out), combined_state_dict(parts))
    assert not (out / "tokenizer.model").exists()


def test_the_exported_llm_is_a_llama(tmp_path, write_tiny_parts):
    transformers = pytest.importorskip("transformers")
    parts = write_tiny_parts()
    convert_in(parts, tmp_path / "ckpt")
    out = megatron_to_hf(load=tmp_path / "ckpt", output=tmp_path / "out", parts=True)
    ids = torch.arange(12)[None]
    logits = [
        transformers.LlamaForCausalLM.from_pretrained(folder / "llm").eval()(ids).logits
        for folder in (parts, out)
    ]
    assert torch.equal(*logits)
