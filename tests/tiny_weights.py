"""Tiny random weights in the published three-part HuggingFace layout, for tests.

```
folder/vision/   config.json, model files of InternViT, mlp_projector/hermes_2_yi_34b.pth
folder/llm/      config.json, model files of the Llama decoder (tokenizer files are added by others)
```
Values are drawn so that nothing is symmetric by accident: norm weights scatter around 1, biases and
LayerScale are not 0. Reading back uses safetensors and torch alone.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FileFormat = Literal["safetensors", "bin"]

PROJECTOR_FILE = "mlp_projector/hermes_2_yi_34b.pth"

TINY_VISION_CONFIG: Mapping[str, Any] = {
    "architectures": ["InternVisionModel"],
    "attention_dropout": 0.0,
    "drop_path_rate": 0.0,
    "dropout": 0.0,
    "hidden_act": "gelu",
    "hidden_size": 40,
    "image_size": 56,
    "initializer_factor": 0.1,
    "initializer_range": 1e-10,
    "intermediate_size": 80,
    "layer_norm_eps": 1e-06,
    "model_type": "intern_vit_6b",
    "norm_type": "rms_norm",
    "num_attention_heads": 5,
    "num_channels": 3,
    "num_hidden_layers": 3,
    "patch_size": 14,
    "qk_normalization": True,
    "qkv_bias": False,
    "torch_dtype": "float32",
    "use_flash_attn": False,
}

TINY_LLM_CONFIG: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 48,
    "initializer_range": 0.02,
    "intermediate_size": 72,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 5000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": False,
    "vocab_size": 96,
}


def tiny_vision_config(**changes: Any) -> dict[str, Any]:
    """`TINY_VISION_CONFIG` with some keys changed, e.g. `num_hidden_layers=4`."""
    return {**TINY_VISION_CONFIG, **changes}


def tiny_llm_config(vocab_size: int, **changes: Any) -> dict[str, Any]:
    """`TINY_LLM_CONFIG` for a vocabulary of `vocab_size` tokens."""
    return {**TINY_LLM_CONFIG, "vocab_size": vocab_size, **changes}


def vision_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every InternViT tensor."""
    h, inner, p = config["hidden_size"], config["intermediate_size"], config["patch_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.class_embedding": (1, 1, h),
        "embeddings.position_embedding": (1, (config["image_size"] // p) ** 2 + 1, h),
        "embeddings.patch_embedding.weight": (h, 3, p, p),
        "embeddings.patch_embedding.bias": (h,),
    }
    layer: dict[str, tuple[int, ...]] = {
        "attn.qkv.weight": (3 * h, h),
        "attn.q_norm.weight": (h,),
        "attn.k_norm.weight": (h,),
        "attn.proj.weight": (h, h),
        "attn.proj.bias": (h,),
        "norm1.weight": (h,),
        "norm2.weight": (h,),
        "mlp.fc1.weight": (inner, h),
        "mlp.fc1.bias": (inner,),
        "mlp.fc2.weight": (h, inner),
        "mlp.fc2.bias": (h,),
        "ls1": (h,),
        "ls2": (h,),
    }
    for i in range(config["num_hidden_layers"]):
        shapes |= {f"encoder.layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


def llm_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of the decoder."""
    h, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = h // config["num_attention_heads"] * config["num_key_value_heads"]
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj.weight": (h, h),
        "self_attn.k_proj.weight": (kv, h),
        "self_attn.v_proj.weight": (kv, h),
        "self_attn.o_proj.weight": (h, h),
        "mlp.gate_proj.weight": (inner, h),
        "mlp.up_proj.weight": (inner, h),
        "mlp.down_proj.weight": (h, inner),
        "input_layernorm.weight": (h,),
        "post_attention_layernorm.weight": (h,),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, h)}
    for i in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes | {"model.norm.weight": (h,), "lm_head.weight": (vocab, h)}


def projector_shapes(
    vision_config: Mapping[str, Any], llm_config: Mapping[str, Any]
) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every projector tensor (four patches make a token)."""
    wide, h = 4 * vision_config["hidden_size"], llm_config["hidden_size"]
    return {
        "0.weight": (wide,),
        "0.bias": (wide,),
        "1.weight": (h, wide),
        "1.bias": (h,),
        "3.weight": (h, h),
        "3.bias": (h,),
    }


def _random_tensor(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """fp32 values that depend on the name and the seed alone, not on the other tensors."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
    noise = torch.randn(shape, generator=generator)
    if name.endswith((".ls1", ".ls2")):
        return 0.1 + 0.9 * torch.rand(shape, generator=generator) + 0.02 * noise
    if len(shape) == 1 and name.endswith("weight"):
        return 1 + 0.2 * noise
    if name.endswith("bias"):
        return 0.1 * noise
    if "embedding" in name and not name.endswith("patch_embedding.weight"):
        return 0.3 * noise
    if name.endswith("embed_tokens.weight"):
        return 0.5 * noise
    return noise / math.sqrt(math.prod(shape[1:]))


def random_tensors(
    shapes: Mapping[str, tuple[int, ...]], seed: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """One reproducible tensor a name."""
    return {name: _random_tensor(name, shape, seed).to(dtype) for name, shape in shapes.items()}


def write_model_files(
    folder: Path, tensors: Mapping[str, Tensor], file_format: FileFormat, shards: int
) -> list[Path]:
    """Writes tensors as HuggingFace does: one file, or shards with an index json beside them."""
    stem, suffix = {
        "safetensors": ("model", "safetensors"),
        "bin": ("pytorch_model", "bin"),
    }[file_format]
    if not 1 <= shards <= len(tensors):
        raise ValueError(f"{len(tensors)} tensors cannot fill {shards} shards")
    names = list(tensors)
    weight_map: dict[str, str] = {}
    files = []
    for shard in range(shards):
        mine = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        number = f"-{shard + 1:05d}-of-{shards:05d}" if shards > 1 else ""
        file = folder / f"{stem}{number}.{suffix}"
        content = {name: tensors[name].contiguous() for name in mine}
        if file_format == "safetensors":
            save_file(content, file, metadata={"format": "pt"})
        else:
            torch.save(content, file)
        weight_map |= dict.fromkeys(mine, file.name)
        files.append(file)
    if shards > 1:
        size_bytes = sum(each.numel() * each.element_size() for each in tensors.values())
        index = {"metadata": {"total_size": size_bytes}, "weight_map": weight_map}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index, indent=2))
    return files


def write_parts(
    folder: Path,
    vision_config: Mapping[str, Any],
    llm_config: Mapping[str, Any],
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    file_format: FileFormat = "safetensors",
    shards: int = 1,
) -> None:
    """Writes the three parts with random values.

    Args:
        folder: where `vision/` and `llm/` are made; other files in them are left alone.
        vision_config: as `TINY_VISION_CONFIG`; `torch_dtype` is replaced.
        llm_config: as `TINY_LLM_CONFIG`; `torch_dtype` is replaced.
        seed: same seed, same values.
        dtype: of every tensor.
        file_format: "safetensors", or "bin" for `pytorch_model*.bin`.
        shards: files of the ViT and of the LLM, each.
    """
    dtype_name = str(dtype).removeprefix("torch.")
    parts = {
        "vision": (vision_config, vision_shapes(vision_config)),
        "llm": (llm_config, llm_shapes(llm_config)),
    }
    for part, (config, shapes) in parts.items():
        place = folder / part
        place.mkdir(parents=True, exist_ok=True)
        written = {**config, "torch_dtype": dtype_name}
        (place / "config.json").write_text(json.dumps(written, indent=2))
        write_model_files(place, random_tensors(shapes, seed, dtype), file_format, shards)
    projector = folder / "vision" / PROJECTOR_FILE
    projector.parent.mkdir(exist_ok=True)
    torch.save(random_tensors(projector_shapes(vision_config, llm_config), seed, dtype), projector)


def _read_model_files(files: Iterable[Path]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in files:
        safe = file.suffix == ".safetensors"
        content = load_file(file) if safe else torch.load(file, weights_only=True)
        twice = tensors.keys() & content.keys()
        if twice:
            raise ValueError(f"{file}: {sorted(twice)} already came from another file")
        tensors |= content
    return tensors


def read_model_files(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the `*.safetensors` or `pytorch_model*.bin` files of a folder."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")])
    if not files:
        raise FileNotFoundError(f"{folder}: no *.safetensors and no pytorch_model*.bin")
    return _read_model_files(files)


def combined_state_dict(folder: Path) -> dict[str, Tensor]:
    """What `write_parts` wrote, under the names of the combined InternVL-Chat folder."""
    parts = {
        "vision_model.": read_model_files(folder / "vision"),
        "language_model.": read_model_files(folder / "llm"),
        "mlp1.": _read_model_files([folder / "vision" / PROJECTOR_FILE]),
    }
    return {
        prefix + name: tensor
        for prefix, tensors in parts.items()
        for name, tensor in tensors.items()
    }


def combined_config(folder: Path, ps_version: Literal["v1", "v2"] = "v1") -> dict[str, Any]:
    """The sizes of what `write_parts` wrote, as `ReferenceInternVL` takes them."""
    return {
        "vision_config": json.loads((folder / "vision" / "config.json").read_text()),
        "llm_config": json.loads((folder / "llm" / "config.json").read_text()),
        "ps_version": ps_version,
        "downsample_ratio": 0.5,
    }
