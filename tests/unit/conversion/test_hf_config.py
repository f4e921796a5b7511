"""config.json of the parts and of the combined folder, both ways, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from mmlm.conversion.hf_config import (
    combined_to_hf,
    language_from_hf,
    language_to_hf,
    read_combined,
    read_json,
    read_parts,
    vision_from_hf,
    vision_to_hf,
)
from mmlm.errors import ConfigError
from tests.tiny_weights import TINY_LLM_CONFIG, TINY_VISION_CONFIG

YI_34B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 7168,
    "intermediate_size": 20480,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 56,
    "num_hidden_layers": 60,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 5000000.0,
    "vocab_size": 64000,
}


def write(file: Path, content: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def test_sizes_come_from_the_json(tmp_path: Path):
    write(tmp_path / "v/config.json", dict(TINY_VISION_CONFIG))
    write(tmp_path / "l/config.json", YI_34B)
    config = read_parts(tmp_path / "v", tmp_path / "l", "v2").model
    assert config.ps_version == "v2"
    assert (config.vision.hidden_size, config.vision.num_layers) == (40, 3)
    assert (config.vision.num_attention_heads, config.vision.ffn_hidden_size) == (5, 80)
    assert (config.vision.image_size, config.vision.patch_size) == (56, 14)
    language = config.language
    assert (language.hidden_size, language.ffn_hidden_size) == (7168, 20480)
    assert (language.num_attention_heads, language.num_query_groups) == (56, 8)
    assert (language.kv_channels, language.num_layers, language.vocab_size) == (128, 60, 64000)
    assert (language.layernorm_epsilon, language.rotary_base) == (1e-5, 5e6)


def test_defaults_are_huggingfaces():
    assert language_from_hf({**YI_34B, "num_key_value_heads": None}, "x").num_query_groups == 56
    assert language_from_hf({**YI_34B, "head_dim": 64}, "x").kv_channels == 64
    nested = {k: v for k, v in YI_34B.items() if k != "rope_theta"}
    nested["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4}
    language = language_from_hf(nested, "x")
    assert language.rotary_base == 1e4
    assert language_to_hf(language, nested, "bfloat16") == {**nested, "torch_dtype": "bfloat16"}


def test_export_keeps_unknown_keys_and_puts_sizes_in():
    original = {**TINY_VISION_CONFIG, "unknown": {"kept": True}}
    vision = vision_from_hf(original, "x")
    assert vision_to_hf(vision, original, "float32") == original
    llm = {**TINY_LLM_CONFIG, "unknown": 7}
    language = language_from_hf({**llm, "vocab_size": 105}, "x")
    assert language_to_hf(language, llm, "float32") == {**llm, "vocab_size": 105}


def test_export_without_original_reads_back():
    vision = vision_from_hf(dict(TINY_VISION_CONFIG), "x")
    language = language_from_hf({**YI_34B, "head_dim": 64}, "x")
    assert vision_from_hf(vision_to_hf(vision, None, "float32"), "x") == vision
    assert language_from_hf(language_to_hf(language, None, "float32"), "x") == language


def test_combined_config_has_the_published_form(tmp_path: Path):
    write(tmp_path / "v/config.json", dict(TINY_VISION_CONFIG))
    write(tmp_path / "l/config.json", dict(TINY_LLM_CONFIG))
    parts = read_parts(tmp_path / "v", tmp_path / "l")
    content = combined_to_hf(parts.model, parts.vision, parts.llm, None, "bfloat16")
    assert content["model_type"] == "internvl_chat"
    assert content["architectures"] == ["InternVLChatModel"]
    assert content["vision_config"]["model_type"] == "intern_vit_6b"
    assert content["llm_config"]["architectures"] == ["LlamaForCausalLM"]
    published = {
        "downsample_ratio": 0.5,
        "select_layer": -1,
        "ps_version": "v1",
        "template": "Hermes-2",
        "force_image_size": 56,
        "dynamic_image_size": False,
        "use_thumbnail": False,
        "pad2square": False,
        "torch_dtype": "bfloat16",
    }
    assert {key: content[key] for key in published} == published
    write(tmp_path / "c/config.json", {**content, "unknown": 1})
    combined = read_combined(tmp_path / "c")
    assert combined.model == parts.model
    assert combined.combined is not None
    assert combined.combined["unknown"] == 1
    assert "vision_config" not in combined.combined


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("qkv_bias", True, "qkv_bias is True, only False is supported"),
        ("norm_type", "layer_norm", "norm_type is 'layer_norm', only 'rms_norm' is supported"),
        ("qk_normalization", False, "qk_normalization is False, only True is supported"),
        ("hidden_act", "relu", "hidden_act is 'relu', only 'gelu' is supported"),
        ("num_channels", 1, "num_channels is 1, only 3 is supported"),
        ("hidden_size", "40", "hidden_size must be int, is '40'"),
        (
            "num_attention_heads",
            7,
            "FILE: vision: hidden_size 40 must be a multiple of",
        ),
    ],
)
def test_vision_variants_are_refused(key: str, value: Any, message: str):
    with pytest.raises(ConfigError, match=message):
        vision_from_hf({**TINY_VISION_CONFIG, key: value}, "FILE")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("tie_word_embeddings", True, "FILE: tie_word_embeddings is True, only False"),
        ("attention_bias", True, "FILE: attention_bias is True"),
        ("rope_scaling", {"type": "linear"}, "FILE: rope_scaling is .*only None is supported"),
        ("rope_parameters", {"rope_type": "yarn"}, "rope_type is 'yarn', only 'default'"),
        ("architectures", ["InternLM2ForCausalLM"], r"only \['LlamaForCausalLM'\] is supported"),
        ("model_type", "qwen2", "model_type is 'qwen2', only 'llama' is supported"),
        ("num_attention_heads", 5, "hidden_size 48 is not a multiple of num_attention_heads 5"),
        (
            "num_key_value_heads",
            3,
            "FILE: language: num_attention_heads 4 must be a multiple",
        ),
    ],
)
def test_llm_variants_are_refused(key: str, value: Any, message: str):
    with pytest.raises(ConfigError, match=message):
        language_from_hf({**TINY_LLM_CONFIG, key: value}, "FILE")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"select_layer": -4}, "select_layer is -4, only -1 is supported"),
        ({"downsample_ratio": 1.0}, "downsample_ratio is 1.0"),
        ({"force_image_size": "448"}, "force_image_size must be int, is '448'"),
        ({"force_image_size": 70}, r"image_size // patch_size = 5 must be even"),
        ({"ps_version": "v3"}, "config.json: model: ps_version 'v3' must be v1 or v2"),
        ({"llm_config": None}, "llm_config must be dict, is None"),
    ],
)
def test_combined_variants_are_refused(tmp_path: Path, change: dict[str, Any], message: str):
    content = {
        "vision_config": dict(TINY_VISION_CONFIG),
        "llm_config": dict(TINY_LLM_CONFIG),
        **change,
    }
    write(tmp_path / "config.json", content)
    with pytest.raises(ConfigError, match=message):
        read_combined(tmp_path)


def test_missing_keys_and_files_are_named(tmp_path: Path):
    for key in ("layer_norm_eps", "num_hidden_layers", "image_size"):
        content = {k: v for k, v in TINY_VISION_CONFIG.items() if k != key}
        with pytest.raises(ConfigError, match=f"FILE: key '{key}' is missing"):
            vision_from_hf(content, "FILE")
    with pytest.raises(ConfigError, match=r"config\.json: missing"):
        read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json: not readable as json"):
        read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="must be a json object, is list"):
        read_json(tmp_path / "config.json")
