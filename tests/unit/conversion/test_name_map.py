"""The table covers every tensor once, on both sides, and says everything that is wrong."""

from pathlib import Path

import pytest

from mmlm.conversion.hf_config import read_parts
from mmlm.conversion.name_map import TABLE, check_tensors, expand, part_name
from mmlm.errors import CheckpointError
from tests.tiny_weights import (
    TINY_LLM_CONFIG,
    TINY_VISION_CONFIG,
    combined_state_dict,
    write_parts,
)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    write_parts(tmp_path, TINY_VISION_CONFIG, TINY_LLM_CONFIG)
    return tmp_path


def test_names_and_shapes_are_those_of_the_files(tiny: Path):
    model = read_parts(tiny / "vision", tiny / "llm").model
    expected = {name: tuple(t.shape) for name, t in combined_state_dict(tiny).items()}
    found = {
        name: shape
        for entry in expand(model)
        for name, shape in zip(entry.hf_names, entry.hf_shapes, strict=True)
    }
    assert found == expected


def test_global_names_and_true_shapes(tiny: Path):
    model = read_parts(tiny / "vision", tiny / "llm").model
    entries = {entry.megatron_name: entry for entry in expand(model)}
    assert len(entries) == len(expand(model))
    assert len(entries) == 4 + 3 * 13 + 6 + 3 + 3 * 6
    vision = "vision_model.decoder.layers.2."
    text = "language_model.decoder.layers.2."
    for name, shape in {
        "vision_model.class_embedding": (1, 1, 40),
        "vision_model.position_embedding": (1, 17, 40),
        "vision_model.patch_embedding.weight": (40, 3, 14, 14),
        vision + "self_attention.linear_qkv.weight": (120, 40),
        vision + "self_attention.qk_norm.q_weight": (40,),
        vision + "attention_scale": (40,),
        vision + "mlp.linear_fc1.bias": (80,),
        "vision_projection.layernorm.weight": (160,),
        "vision_projection.linear_fc1.weight": (48, 160),
        "language_model.embedding.word_embeddings.weight": (96, 48),
        text + "self_attention.linear_qkv.weight": (96, 48),
        text + "mlp.linear_fc1.weight": (144, 48),
        "language_model.decoder.final_layernorm.weight": (48,),
        "language_model.output_layer.weight": (96, 48),
    }.items():
        assert entries[name].megatron_shape == shape, name
    qkv = entries[text + "self_attention.linear_qkv.weight"]
    assert qkv.hf_names == tuple(
        f"language_model.model.layers.2.self_attn.{kind}_proj.weight" for kind in "qkv"
    )


def test_the_table_names_nothing_twice():
    hf = [(row.part, name) for row in TABLE for name, _ in row.hf]
    megatron = [(row.part, row.megatron) for row in TABLE]
    assert len(set(hf)) == len(hf)
    assert len(set(megatron)) == len(megatron)


def test_part_name_splits_the_combined_name():
    assert part_name("mlp1.0.weight") == ("vision_projection", "0.weight")
    assert part_name("language_model.model.norm.weight") == ("language_model", "model.norm.weight")
    assert part_name("vision_model.encoder.x") == ("vision_model", "encoder.x")
    with pytest.raises(CheckpointError, match=r"'visual.x' belongs to no part.*mlp1\."):
        part_name("visual.x")


def test_everything_wrong_is_listed_at_once():
    found = {"a": (1,), "b": (2, 3), "stray.one": (4,), "stray.two": (5,)}
    expected = {"a": (1,), "b": (3, 2), "lost.one": (6,), "lost.two": (7,)}
    with pytest.raises(CheckpointError) as caught:
        check_tensors(found, expected, lambda name: f"file of {name}", "FOLDER")
    assert str(caught.value).splitlines() == [
        "FOLDER: 5 of 4 tensors do not fit the model "
        "(are config.json and weights of the same model?):",
        "  missing: lost.one [6]",
        "  missing: lost.two [7]",
        "  stray: stray.one [4] in file of stray.one",
        "  stray: stray.two [5] in file of stray.two",
        "  wrong shape: b is [2, 3], the config says [3, 2], in file of b",
    ]
