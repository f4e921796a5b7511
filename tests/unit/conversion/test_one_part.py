"""One part goes in alone and comes out alone, and is not taken for a model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mmlm.checkpoint.manifest import Manifest, resolve
from mmlm.checkpoint.part_manifest import PartManifest, read_any_manifest
from mmlm.checkpoint.tensor_reader import TensorReader
from mmlm.conversion.convert import hf_to_megatron, megatron_to_hf
from mmlm.conversion.hf_weights import open_weights
from mmlm.conversion.name_map import HF_PREFIXES, Part
from mmlm.conversion.one_part import open_one_part
from mmlm.errors import CheckpointError, ConfigError
from tests.conversion_helpers import assert_equal, convert_in
from tests.tiny_weights import (
    PROJECTOR_FILE,
    TINY_VISION_CONFIG,
    combined_state_dict,
    read_model_files,
    tiny_vision_config,
    write_parts,
)

PARTS: dict[Part, str] = {
    "vision_model": "vision",
    "vision_projection": "projector",
    "language_model": "llm",
}


def path_of(parts: Path, part: Part) -> Path:
    if part == "vision_projection":
        return parts / "vision" / PROJECTOR_FILE
    return parts / PARTS[part]


def of_part(parts: Path, part: Part) -> dict[str, torch.Tensor]:
    """Tensors of one part under its own names."""
    prefix = HF_PREFIXES[part]
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in combined_state_dict(parts).items()
        if name.startswith(prefix)
    }


def read_part(folder: Path, part: Part) -> dict[str, torch.Tensor]:
    if part == "vision_projection":
        content: dict[str, torch.Tensor] = torch.load(folder / PROJECTOR_FILE, weights_only=True)
        return content
    return read_model_files(folder)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_part_in_and_out(tmp_path: Path, write_tiny_parts, part: Part, dtype: torch.dtype):
    parts = write_tiny_parts(dtype=dtype, num_new_rows=0, file_format="bin", shards=2)
    given: dict[str, Any] = {PARTS[part]: path_of(parts, part)}
    directory = hf_to_megatron(**given, output=tmp_path / "ckpt")
    manifest = read_any_manifest(directory)
    assert isinstance(manifest, PartManifest)
    assert manifest.part == part
    keys = TensorReader(directory).infos.keys()
    assert keys and all(key.startswith(f"model.{part}.") for key in keys)
    out = megatron_to_hf(load=tmp_path / "ckpt", output=tmp_path / "out")
    # an LLM on its own keeps its vocabulary: no rows are added
    assert_equal(read_part(out, part), of_part(parts, part))
    if part != "vision_projection":
        original = json.loads((path_of(parts, part) / "config.json").read_text())
        assert json.loads((out / "config.json").read_text()) == original
    assert (out / "tokenizer.model").is_file() == (part == "language_model")


@pytest.mark.parametrize("part", PARTS)
def test_one_part_of_a_whole_model(tmp_path: Path, write_tiny_parts, part: Part):
    parts = write_tiny_parts()
    convert_in(parts, tmp_path / "ckpt")
    out = megatron_to_hf(load=tmp_path / "ckpt", output=tmp_path / "out", only=part)
    assert_equal(read_part(out, part), of_part(parts, part))
    others = {"vision", "llm", "model.safetensors.index.json"} - (
        set() if part == "vision_projection" else {"model.safetensors.index.json"}
    )
    assert not others & {each.name for each in out.iterdir()}


def test_one_part_is_no_model(tmp_path: Path, write_tiny_parts):
    parts = write_tiny_parts()
    directory = hf_to_megatron(vision=parts / "vision", output=tmp_path / "ckpt")
    assert resolve(tmp_path / "ckpt") == directory
    with pytest.raises(
        CheckpointError, match=r"mmlm\.json: holds the vision_model alone, and a whole model is ne"
    ):
        Manifest.read(directory)
    with pytest.raises(CheckpointError, match="holds the vision_model alone, not language_model"):
        megatron_to_hf(load=directory, output=tmp_path / "out", only="language_model")
    assert not (tmp_path / "out").exists()


def test_a_damaged_part_manifest_is_named(tmp_path: Path, write_tiny_parts):
    directory = hf_to_megatron(vision=write_tiny_parts() / "vision", output=tmp_path / "ckpt")
    file = directory / "mmlm.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "unknown": 1}))
    with pytest.raises(CheckpointError, match=r"mmlm\.json: damaged: .*unknown"):
        read_any_manifest(directory)


def test_something_else_is_no_projector(tmp_path: Path, write_tiny_parts):
    parts = write_tiny_parts()
    torch.save({"weight": torch.ones(3)}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"x\.pth: not a projector: there is no matrix '1.w"):
        open_one_part("vision_projection", tmp_path / "x.pth")
    (parts / "vision/config.json").write_text((parts / "llm/config.json").read_text())
    with pytest.raises(CheckpointError, match=r"stray: language_model\.encoder\.layers"):
        open_one_part("language_model", parts / "vision")
    with pytest.raises(ConfigError, match="--image-size is about the ViT, which is not given"):
        hf_to_megatron(llm=parts / "llm", output=tmp_path / "ckpt", image_size=28)


INTERN_VIT_300M = {
    **TINY_VISION_CONFIG,
    "norm_type": "layer_norm",
    "qkv_bias": True,
    "qk_normalization": False,
}


def test_intern_vit_300m_is_refused_by_name(tmp_path: Path, write_tiny_parts):
    parts = write_tiny_parts()
    (parts / "vision/config.json").write_text(json.dumps(INTERN_VIT_300M))
    with pytest.raises(ConfigError) as caught:
        hf_to_megatron(vision=parts / "vision", output=tmp_path / "ckpt")
    assert str(caught.value) == (
        f"{parts}/vision/config.json: qkv_bias is True, only False is supported; qk_normalization "
        "is False, only True is supported; norm_type is 'layer_norm', only 'rms_norm' is supported"
    )


def test_the_first_layers_of_a_deeper_vit(tmp_path: Path, write_tiny_parts):
    """As InternViT-6B-448px-V1-2 is the first 45 layers of V1-0."""
    parts = write_tiny_parts()
    expected = {
        name: tensor
        for name, tensor in combined_state_dict(parts).items()
        if not name.startswith("vision_model.encoder.layers.2.")
    }
    assert len(expected) == len(combined_state_dict(parts)) - 13
    convert_in(parts, tmp_path / "ckpt", vision_num_layers=2)
    out = megatron_to_hf(load=tmp_path / "ckpt", output=tmp_path / "out")
    assert_equal(read_model_files(out), expected)
    assert json.loads((out / "config.json").read_text())["vision_config"]["num_hidden_layers"] == 2
    for number in (0, 4):
        with pytest.raises(
            ConfigError, match=f"--vision-num-layers {number}: the ViT has layers 1"
        ):
            convert_in(parts, tmp_path / "other", vision_num_layers=number)


@pytest.mark.parametrize("alone", [True, False])
def test_another_picture_size_resizes_positions(tmp_path: Path, write_tiny_parts, alone: bool):
    parts = write_tiny_parts(dtype=torch.bfloat16)
    given = {} if alone else {"llm": parts / "llm"}
    hf_to_megatron(vision=parts / "vision", **given, output=tmp_path / "ckpt", image_size=112)
    out = megatron_to_hf(load=tmp_path / "ckpt", output=tmp_path / "out", only="vision_model")
    expected = of_part(parts, "vision_model")
    name = "embeddings.position_embedding"
    old = expected[name]
    grid = old[0, 1:].T.view(1, 40, 4, 4).float()
    new = torch.nn.functional.interpolate(grid, (8, 8), mode="bicubic", align_corners=False)
    expected[name] = torch.cat((old[0, :1], new[0].flatten(1).T.bfloat16()))[None]
    assert_equal(read_model_files(out), expected)
    assert json.loads((out / "config.json").read_text())["image_size"] == 112
    with pytest.raises(ConfigError, match=r"--image-size 70: vision: .* must be even and positive"):
        hf_to_megatron(vision=parts / "vision", output=tmp_path / "other", image_size=70)


def test_the_forced_picture_size_of_a_combined_folder_counts(tmp_path: Path, write_tiny_parts):
    """Published code resizes when force_image_size is not what the ViT was made for."""
    parts = write_tiny_parts()
    convert_in(parts, tmp_path / "ckpt")
    folder = megatron_to_hf(load=tmp_path / "ckpt", output=tmp_path / "combined")
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "force_image_size": 84}))
    weights = open_weights(folder)
    assert weights.model.vision.image_size == 84
    found = weights.reader.read("model.vision_model.position_embedding")
    assert found.shape == (1, 37, 40)
    hf_to_megatron(combined=folder, output=tmp_path / "again")
    out = megatron_to_hf(load=tmp_path / "again", output=tmp_path / "out")
    content = json.loads((out / "config.json").read_text())
    assert content["force_image_size"] == content["vision_config"]["image_size"] == 84
    hf_to_megatron(combined=folder, output=tmp_path / "back", image_size=56)
    back = megatron_to_hf(load=tmp_path / "back", output=tmp_path / "out2")
    assert_equal(read_model_files(back), combined_state_dict(parts))


def test_a_vit_of_another_grid_is_checked_against_its_own_config(tmp_path: Path):
    config = tiny_vision_config(image_size=112)
    write_parts(tmp_path / "in", config, {"vocab_size": 8} | dict(_llm()), 0)
    part = open_one_part("vision_model", tmp_path / "in" / "vision", image_size=56)
    assert part.reader.read("model.vision_model.position_embedding").shape == (1, 17, 40)


def _llm() -> dict[str, Any]:
    return {
        "hidden_size": 48,
        "intermediate_size": 72,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 1,
    }
