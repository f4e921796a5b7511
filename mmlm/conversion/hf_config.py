"""HuggingFace ``config.json`` <-> `ModelConfig`, for the ViT, the LLM and the combined folder.

Sizes are never assumed: a key that decides one must be there. A key that decides the architecture
may be missing where HuggingFace's own class has a default (cited below), and must have the one
value that mmlm builds. All other keys are kept and come out again on export.

Defaults are those of InternVisionConfig and InternVLChatConfig (OpenGVLab/InternVL,
internvl_chat/internvl/model/internvl_chat) and of transformers' LlamaConfig.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from mmlm.config.model import LanguageConfig, ModelConfig, VisionConfig
from mmlm.errors import ConfigError

Json = dict[str, Any]
_Section = TypeVar("_Section")

_REMOTE = "OpenGVLab/InternVL-Chat-V1-2--"
"""Where transformers finds the model's code (``auto_map``); the exported folder holds none."""

_VISION_VARIANTS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    # key: (HuggingFace's default, what mmlm builds)
    "model_type": ("intern_vit_6b", ("intern_vit_6b",)),
    "qkv_bias": (False, (False,)),
    "qk_normalization": (True, (True,)),
    "norm_type": ("rms_norm", ("rms_norm",)),
    "hidden_act": ("gelu", ("gelu",)),
    "num_channels": (3, (3,)),
}
_LLM_VARIANTS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "model_type": ("llama", ("llama",)),
    "hidden_act": ("silu", ("silu", "swish")),
    "attention_bias": (False, (False,)),
    "mlp_bias": (False, (False,)),
    "tie_word_embeddings": (False, (False,)),
    "rope_scaling": (None, (None,)),
}
_COMBINED_VARIANTS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "model_type": ("internvl_chat", ("internvl_chat",)),
    "select_layer": (-1, (-1,)),
    "downsample_ratio": (0.5, (0.5,)),
    "dynamic_image_size": (False, (False,)),
    "pad2square": (False, (False,)),
    "use_backbone_lora": (0, (0,)),
    "use_llm_lora": (0, (0,)),
}


@dataclass(frozen=True, kw_only=True)
class HFConfig:
    """The json of the parts and the sizes that they mean."""

    vision: Json
    """``config.json`` of the ViT."""
    llm: Json
    """``config.json`` of the LLM."""
    combined: Json | None
    """The combined folder's keys other than the two above; None for three separate parts."""
    model: ModelConfig
    """What the json means."""
    stored_image_size: int
    """Picture size that the position embedding in the files is made for, pixels."""

    @property
    def stored_model(self) -> ModelConfig:
        """Sizes of the tensors in the files."""
        vision = replace(self.model.vision, image_size=self.stored_image_size)
        return replace(self.model, vision=vision)


def read_parts(vision_dir: Path, llm_dir: Path, ps_version: Literal["v1", "v2"] = "v1") -> HFConfig:
    """Read the ``config.json`` of a ViT folder and of an LLM folder.

    Args:
        vision_dir: folder of the ViT.
        llm_dir: folder of the LLM.
        ps_version: pixel shuffle variant, which the parts do not say; V1-2 weights want v1.

    Raises:
        ConfigError: naming file and key, for a missing key or an unsupported variant.
    """
    vision_file, llm_file = vision_dir / "config.json", llm_dir / "config.json"
    vision, llm = read_json(vision_file), read_json(llm_file)
    model = ModelConfig(
        vision=vision_from_hf(vision, str(vision_file)),
        language=language_from_hf(llm, str(llm_file)),
        ps_version=ps_version,
    )
    return HFConfig(
        vision=vision,
        llm=llm,
        combined=None,
        model=model,
        stored_image_size=model.vision.image_size,
    )


def read_combined(folder: Path) -> HFConfig:
    """Read the ``config.json`` of a combined InternVL-Chat folder; errors as in `read_parts`.

    Where ``force_image_size`` differs from the ViT's own size, it is the size of the pictures.
    """
    file = folder / "config.json"
    content = read_json(file)
    _check_variants(content, _COMBINED_VARIANTS, str(file))
    vision = _get(content, "vision_config", dict, str(file))
    llm = _get(content, "llm_config", dict, str(file))
    stored = vision_from_hf(vision, f"{file}: vision_config")
    forced = _get_or(content, "force_image_size", int, stored.image_size, str(file))
    model = _build(
        ModelConfig,
        str(file),
        vision=_build(VisionConfig, str(file), **{**asdict(stored), "image_size": forced}),
        language=language_from_hf(llm, f"{file}: llm_config"),
        ps_version=content.get("ps_version", "v1"),
    )
    combined = {k: v for k, v in content.items() if k not in ("vision_config", "llm_config")}
    return HFConfig(
        vision=vision,
        llm=llm,
        combined=combined,
        model=model,
        stored_image_size=stored.image_size,
    )


def vision_from_hf(content: Json, where: str) -> VisionConfig:
    """Sizes of an InternViT from its json.

    Args:
        content: the json.
        where: the file, for messages.
    """
    _check_variants(content, _VISION_VARIANTS, where)
    return _build(
        VisionConfig,
        where,
        hidden_size=_get(content, "hidden_size", int, where),
        ffn_hidden_size=_get(content, "intermediate_size", int, where),
        num_layers=_get(content, "num_hidden_layers", int, where),
        num_attention_heads=_get(content, "num_attention_heads", int, where),
        image_size=_get(content, "image_size", int, where),
        patch_size=_get(content, "patch_size", int, where),
        layernorm_epsilon=_get(content, "layer_norm_eps", float, where),
    )


def language_from_hf(content: Json, where: str) -> LanguageConfig:
    """Sizes of a Llama-type decoder from its json; arguments as in `vision_from_hf`."""
    _check_variants(content, _LLM_VARIANTS, where)
    architectures = content.get("architectures") or ["LlamaForCausalLM"]
    if architectures != ["LlamaForCausalLM"]:
        raise ConfigError(
            f"{where}: architectures is {architectures}, only ['LlamaForCausalLM'] is supported"
        )
    heads = _get(content, "num_attention_heads", int, where)
    hidden_size = _get(content, "hidden_size", int, where)
    if content.get("head_dim") is None and hidden_size % heads:
        raise ConfigError(
            f"{where}: hidden_size {hidden_size} is not a multiple of num_attention_heads {heads} "
            "and there is no head_dim"
        )
    return _build(
        LanguageConfig,
        where,
        hidden_size=hidden_size,
        ffn_hidden_size=_get(content, "intermediate_size", int, where),
        num_layers=_get(content, "num_hidden_layers", int, where),
        num_attention_heads=heads,
        # LlamaConfig: no num_key_value_heads means one for each query head.
        num_query_groups=_get_or(content, "num_key_value_heads", int, heads, where),
        kv_channels=_get_or(content, "head_dim", int, hidden_size // heads, where),
        vocab_size=_get(content, "vocab_size", int, where),
        layernorm_epsilon=_get(content, "rms_norm_eps", float, where),
        rotary_base=_get(_rope(content, where), "rope_theta", float, where),
        max_position_embeddings=_get(content, "max_position_embeddings", int, where),
    )


def vision_to_hf(config: VisionConfig, original: Json | None, dtype: str) -> Json:
    """The ViT's ``config.json``: the original with this model's sizes put in.

    Args:
        config: sizes.
        original: what the weights came with; None for a model that never was HuggingFace's.
        dtype: torch's name of the element type, e.g. ``bfloat16``.
    """
    defaults = {
        "architectures": ["InternVisionModel"],
        **{key: default for key, (default, _) in _VISION_VARIANTS.items()},
    }
    return {
        **(defaults if original is None else original),
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "layer_norm_eps": config.layernorm_epsilon,
        "torch_dtype": dtype,
    }


def language_to_hf(config: LanguageConfig, original: Json | None, dtype: str) -> Json:
    """The LLM's ``config.json``; arguments as in `vision_to_hf`."""
    defaults = {
        "architectures": ["LlamaForCausalLM"],
        **{key: default for key, (default, _) in _LLM_VARIANTS.items()},
    }
    content = {
        **(defaults if original is None else original),
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_query_groups,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.layernorm_epsilon,
        "max_position_embeddings": config.max_position_embeddings,
        "torch_dtype": dtype,
    }
    if "rope_parameters" in content:
        content["rope_parameters"] = {
            **content["rope_parameters"],
            "rope_theta": config.rotary_base,
        }
    else:
        content["rope_theta"] = config.rotary_base
    # InternVLChatConfig decides by this key which class the LLM is.
    content.setdefault("architectures", ["LlamaForCausalLM"])
    if "head_dim" in content or config.kv_channels * config.num_attention_heads != (
        config.hidden_size
    ):
        content["head_dim"] = config.kv_channels
    return content


def combined_to_hf(
    config: ModelConfig, vision: Json, llm: Json, original: Json | None, dtype: str
) -> Json:
    """``config.json`` of the combined folder, in the published form.

    Args:
        config: sizes.
        vision: from `vision_to_hf`.
        llm: from `language_to_hf`.
        original: the combined folder's other keys; None when the weights came in three parts.
        dtype: torch's name of the element type.
    """
    defaults = {
        "architectures": ["InternVLChatModel"],
        "auto_map": {
            "AutoConfig": _REMOTE + "configuration_internvl_chat.InternVLChatConfig",
            "AutoModel": _REMOTE + "modeling_internvl_chat.InternVLChatModel",
            "AutoModelForCausalLM": _REMOTE + "modeling_internvl_chat.InternVLChatModel",
        },
        **{key: default for key, (default, _) in _COMBINED_VARIANTS.items()},
        "max_dynamic_patch": 6,
        "min_dynamic_patch": 1,
        "template": "Hermes-2",
        "use_thumbnail": False,
    }
    return {
        **(defaults if original is None else original),
        "force_image_size": config.vision.image_size,
        "ps_version": config.ps_version,
        "torch_dtype": dtype,
        "llm_config": llm,
        "vision_config": vision,
    }


def read_json(file: Path) -> Json:
    """Read a json object.

    Raises:
        ConfigError: naming the file, when it is missing, not json, or not an object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{file}: missing") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: not readable as json: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: must be a json object, is {type(content).__name__}")
    return content


def _build(kind: type[_Section], where: str, **values: Any) -> _Section:
    """Make a section of the config; what it refuses is reported with the file."""
    try:
        return kind(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _rope(content: Json, where: str) -> Mapping[str, Any]:
    """Where the rotary base is; transformers 5 nests it in ``rope_parameters``."""
    nested = content.get("rope_parameters")
    if nested is None:
        return content
    if nested.get("rope_type", "default") != "default":
        raise ConfigError(
            f"{where}: rope_parameters.rope_type is {nested['rope_type']!r}, only 'default' is "
            "supported"
        )
    return {**content, **nested}


def _check_variants(
    content: Json, variants: Mapping[str, tuple[Any, tuple[Any, ...]]], where: str
) -> None:
    wrong = [
        f"{key} is {content[key]!r}, only {' or '.join(map(repr, accepted))} is supported"
        for key, (_, accepted) in variants.items()
        if key in content and content[key] not in accepted
    ]
    if wrong:
        raise ConfigError(f"{where}: " + "; ".join(wrong))


def _get(content: Mapping[str, Any], key: str, kind: type, where: str) -> Any:
    if key not in content:
        raise ConfigError(f"{where}: key '{key}' is missing")
    value = content[key]
    accepted = (int, float) if kind is float else (kind,)
    if not isinstance(value, accepted) or isinstance(value, bool):
        raise ConfigError(f"{where}: {key} must be {kind.__name__}, is {value!r}")
    return float(content[key]) if kind is float else value


def _get_or(content: Json, key: str, kind: type, default: Any, where: str) -> Any:
    return default if content.get(key) is None else _get(content, key, kind, where)
