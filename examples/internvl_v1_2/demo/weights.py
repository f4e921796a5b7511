"""Writes tiny random weights in the published three-part HuggingFace layout.

```text
FOLDER/InternViT-tiny-56px/     config.json, model.safetensors, mlp_projector/hermes_2_yi_34b.pth
FOLDER/Nous-Hermes-2-Yi-tiny/   config.json, model.safetensors, tokenizer files
```
The shape is as awkward as the published one: 5 vision heads (no TP divides them), two query heads
for each key/value head, a ViT without final norm. Nothing is pre-trained, so the initial values are
chosen to learn from scratch in minutes: every matrix is a normal cut at two deviations with
deviation 1/sqrt(fan in), LayerScale starts at 0.3, norms at 1, biases at 0.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from examples.internvl_v1_2.demo import tokenizer

Shapes = dict[str, tuple[int, ...]]

VISION_FOLDER = "InternViT-tiny-56px"
LLM_FOLDER = "Nous-Hermes-2-Yi-tiny"
PROJECTOR_FILE = "mlp_projector/hermes_2_yi_34b.pth"

VISION_CONFIG: dict[str, Any] = {
    "architectures": ["InternVisionModel"],
    "attention_dropout": 0.0,
    "drop_path_rate": 0.0,
    "dropout": 0.0,
    "hidden_act": "gelu",
    "hidden_size": 80,
    "image_size": 56,
    "initializer_factor": 0.3,
    "initializer_range": 0.02,
    "intermediate_size": 160,
    "layer_norm_eps": 1e-6,
    "model_type": "intern_vit_6b",
    "norm_type": "rms_norm",
    "num_attention_heads": 5,
    "num_channels": 3,
    "num_hidden_layers": 2,
    "patch_size": 14,
    "qk_normalization": True,
    "qkv_bias": False,
    "torch_dtype": "float32",
    "use_flash_attn": False,
}
"""``config.json`` of the ViT; 56 pixels are 16 patches, which become 4 image tokens."""

LLM_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 7,
    "hidden_act": "silu",
    "hidden_size": 128,
    "initializer_range": 0.02,
    "intermediate_size": 256,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 8,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 5000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": False,
}
"""``config.json`` of the decoder, without the vocabulary's size."""

LAYER_SCALE = 0.3
EMBEDDING_STD = 0.02


def vision_shapes(config: dict[str, Any]) -> Shapes:
    """Return name -> shape of every tensor of the ViT."""
    hidden, inner, patch = (config[k] for k in ("hidden_size", "intermediate_size", "patch_size"))
    layer: Shapes = {
        "norm1.weight": (hidden,),
        "attn.qkv.weight": (3 * hidden, hidden),
        "attn.q_norm.weight": (hidden,),
        "attn.k_norm.weight": (hidden,),
        "attn.proj.weight": (hidden, hidden),
        "attn.proj.bias": (hidden,),
        "ls1": (hidden,),
        "norm2.weight": (hidden,),
        "mlp.fc1.weight": (inner, hidden),
        "mlp.fc1.bias": (inner,),
        "mlp.fc2.weight": (hidden, inner),
        "mlp.fc2.bias": (hidden,),
        "ls2": (hidden,),
    }
    shapes: Shapes = {
        "embeddings.class_embedding": (1, 1, hidden),
        "embeddings.position_embedding": (1, (config["image_size"] // patch) ** 2 + 1, hidden),
        "embeddings.patch_embedding.weight": (hidden, 3, patch, patch),
        "embeddings.patch_embedding.bias": (hidden,),
    }
    for index in range(config["num_hidden_layers"]):
        shapes |= {f"encoder.layers.{index}.{name}": shape for name, shape in layer.items()}
    return shapes


def llm_shapes(config: dict[str, Any]) -> Shapes:
    """Return name -> shape of every tensor of the decoder."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    key_value = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    layer: Shapes = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.k_proj.weight": (key_value, hidden),
        "self_attn.v_proj.weight": (key_value, hidden),
        "self_attn.o_proj.weight": (hidden, hidden),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    shapes: Shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for index in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    head: Shapes = {"lm_head.weight": (config["vocab_size"], hidden)}
    return shapes | {"model.norm.weight": (hidden,)} | head


def projector_shapes(vision: dict[str, Any], llm: dict[str, Any]) -> Shapes:
    """Return name -> shape of the projector: LayerNorm, linear, (GELU,) linear."""
    wide, hidden = 4 * vision["hidden_size"], llm["hidden_size"]
    return {
        "0.weight": (wide,),
        "0.bias": (wide,),
        "1.weight": (hidden, wide),
        "1.bias": (hidden,),
        "3.weight": (hidden, hidden),
        "3.bias": (hidden,),
    }


def _initial(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if name.endswith((".ls1", ".ls2")):
        return torch.full(shape, LAYER_SCALE)
    if name.endswith("bias"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    embedding = name.endswith(("_embedding", "embed_tokens.weight"))
    std = EMBEDDING_STD if embedding else 1 / math.sqrt(math.prod(shape[1:]))
    tensor = torch.empty(shape)
    torch.nn.init.trunc_normal_(tensor, std=std, a=-2 * std, b=2 * std, generator=generator)
    return tensor


def _tensors(shapes: Shapes, generator: torch.Generator) -> dict[str, Tensor]:
    return {name: _initial(name, shape, generator) for name, shape in shapes.items()}


def _write_folder(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2, sort_keys=True)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def write(folder: Path, tokenizer_model: bytes, seed: int) -> int:
    """Write the ViT folder with its projector and the LLM folder with its tokenizer.

    Args:
        folder: where the two folders are made; they must not be there yet.
        tokenizer_model: a serialised SentencePiece model; its size is the vocabulary.
        seed: the same seed gives the same weights.

    Returns:
        Number of parameters of the three parts.
    """
    generator = torch.Generator().manual_seed(seed)
    llm_folder = folder / LLM_FOLDER
    llm_folder.mkdir(parents=True)
    llm = {**LLM_CONFIG, "vocab_size": tokenizer.write(llm_folder, tokenizer_model)}
    vision_tensors = _tensors(vision_shapes(VISION_CONFIG), generator)
    llm_tensors = _tensors(llm_shapes(llm), generator)
    projector = _tensors(projector_shapes(VISION_CONFIG, llm), generator)
    _write_folder(folder / VISION_FOLDER, VISION_CONFIG, vision_tensors)
    _write_folder(llm_folder, llm, llm_tensors)
    file = folder / VISION_FOLDER / PROJECTOR_FILE
    file.parent.mkdir()
    torch.save(projector, file)
    parts = (vision_tensors, llm_tensors, projector)
    return sum(tensor.numel() for part in parts for tensor in part.values())
