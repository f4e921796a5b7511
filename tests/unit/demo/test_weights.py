"""The tiny weights: the published three parts, readable by the converter, reproducible."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from examples.internvl_v1_2.demo import weights
from mmlm.conversion.hf_config import read_parts
from tests import tiny_weights


def test_config_is_what_mmlm_reads(world: Path) -> None:
    folder = world / "pretrained"
    model = read_parts(folder / weights.VISION_FOLDER, folder / weights.LLM_FOLDER).model
    assert model.vision.num_attention_heads == 5
    assert model.vision.embeddings_per_image == 4
    assert model.language.num_attention_heads == 2 * model.language.num_query_groups


def test_names_and_shapes_are_those_of_the_published_parts(world: Path) -> None:
    folder = world / "pretrained"
    vision = load_file(folder / weights.VISION_FOLDER / "model.safetensors")
    llm = load_file(folder / weights.LLM_FOLDER / "model.safetensors")
    config = json.loads((folder / weights.LLM_FOLDER / "config.json").read_text("utf-8"))
    projector = torch.load(
        folder / weights.VISION_FOLDER / weights.PROJECTOR_FILE, weights_only=True
    )
    for found, wanted in (
        (vision, tiny_weights.vision_shapes(weights.VISION_CONFIG)),
        (llm, tiny_weights.llm_shapes(config)),
        (projector, tiny_weights.projector_shapes(weights.VISION_CONFIG, config)),
    ):
        assert {name: tuple(tensor.shape) for name, tensor in found.items()} == wanted


def test_initial_values(world: Path) -> None:
    vision = load_file(world / "pretrained" / weights.VISION_FOLDER / "model.safetensors")
    assert torch.all(vision["encoder.layers.0.ls1"] == weights.LAYER_SCALE)
    assert torch.all(vision["encoder.layers.0.norm1.weight"] == 1)
    assert torch.all(vision["encoder.layers.0.mlp.fc1.bias"] == 0)
    qkv = vision["encoder.layers.0.attn.qkv.weight"]
    assert qkv.std().item() == pytest.approx(0.88 * 80**-0.5, rel=0.05)  # cut at 2 deviations
    assert qkv.abs().max() <= 2 * 80**-0.5


def test_same_seed_same_weights(world: Path, tmp_path: Path) -> None:
    folder = world / "pretrained"
    model = (folder / weights.LLM_FOLDER / "tokenizer.model").read_bytes()
    count = weights.write(tmp_path, model, 0)
    for part in (weights.VISION_FOLDER, weights.LLM_FOLDER):
        name = f"{part}/model.safetensors"
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    assert count == json.loads((world / "world.json").read_text("utf-8"))["num_parameters"]
