"""Llama decoder of one sequence in plain PyTorch.

Part of `reference_model`. Letters: n tokens of one conversation, a heads, d head size, h hidden
size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.parity.reference_layers import RMSNorm, attend, split_heads


def rotate(x: Tensor, theta: float) -> Tensor:
    """Rotary positions 0 ... n-1 on `[a, n, d]`; channel c turns together with c + d/2."""
    half = x.shape[-1] // 2
    wide = torch.promote_types(x.dtype, torch.float32)
    exponents = torch.arange(half, dtype=wide, device=x.device) / half
    positions = torch.arange(x.shape[1], dtype=wide, device=x.device)
    angles = torch.outer(positions, 1.0 / theta**exponents)  # [n, d/2]
    cosine, sine = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)


class LlamaAttention(nn.Module):
    """Causal attention; each key/value head serves a run of neighbouring query heads."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        hidden = config["hidden_size"]
        self.num_heads = config["num_attention_heads"]
        self.num_key_value_heads = config["num_key_value_heads"]
        self.theta = float(config["rope_theta"])
        width = hidden // self.num_heads
        self.q_proj = nn.Linear(hidden, self.num_heads * width, bias=False)
        self.k_proj = nn.Linear(hidden, self.num_key_value_heads * width, bias=False)
        self.v_proj = nn.Linear(hidden, self.num_key_value_heads * width, bias=False)
        self.o_proj = nn.Linear(self.num_heads * width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        query = rotate(split_heads(self.q_proj(x), self.num_heads), self.theta)
        key = rotate(split_heads(self.k_proj(x), self.num_key_value_heads), self.theta)
        value = split_heads(self.v_proj(x), self.num_key_value_heads)
        served_by = torch.arange(self.num_heads, device=x.device) // (
            self.num_heads // self.num_key_value_heads
        )
        causal = torch.ones(len(x), len(x), dtype=torch.bool, device=x.device).tril()
        return self.o_proj(attend(query, key[served_by], value[served_by], mask=causal))


class LlamaMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaLayer(nn.Module):
    """Pre-norm decoder layer."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        hidden, eps = config["hidden_size"], config["rms_norm_eps"]
        self.input_layernorm = RMSNorm(hidden, eps)
        self.self_attn = LlamaAttention(config)
        self.post_attention_layernorm = RMSNorm(hidden, eps)
        self.mlp = LlamaMLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaBody(nn.Module):
    """Embedding, layers, final norm."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        hidden = config["hidden_size"]
        self.embed_tokens = nn.Embedding(config["vocab_size"], hidden)
        self.layers = nn.ModuleList(LlamaLayer(config) for _ in range(config["num_hidden_layers"]))
        self.norm = RMSNorm(hidden, config["rms_norm_eps"])

    def forward(self, embeddings: Tensor) -> Tensor:
        for layer in self.layers:
            embeddings = layer(embeddings)
        return self.norm(embeddings)


class ReferenceLlama(nn.Module):
    """Llama decoder with a head of its own: embeddings `[n, h]` -> logits `[n, vocab]`."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = LlamaBody(config)
        self.lm_head = nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)

    def forward(self, embeddings: Tensor) -> Tensor:
        return self.lm_head(self.model(embeddings))
