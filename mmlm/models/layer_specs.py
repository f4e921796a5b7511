"""Every ``ModuleSpec`` of the model, with the backend as an argument."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron.core.extensions.transformer_engine import (
    TEColumnParallelLinear,
    TENorm,
    TERowParallelLinear,
)
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)

from mmlm.config.model import LanguageConfig, VisionConfig
from mmlm.layers.norm import RMSNorm
from mmlm.layers.packed_attention import PackedAttention
from mmlm.layers.vision_attention import PaddedHeadsSelfAttention
from mmlm.layers.vision_layer import InternVisionLayer
from mmlm.parallel.backend import Backend


@dataclass(frozen=True, kw_only=True)
class _Parts:
    column_linear: type
    row_linear: type
    rms_norm: type
    core_attention: Callable[..., PackedAttention]


def _parts(backend: Backend) -> _Parts:
    core_attention = partial(PackedAttention, backend=backend.attention_backend)
    if backend.transformer_impl == "transformer_engine":
        return _Parts(
            column_linear=TEColumnParallelLinear,
            row_linear=TERowParallelLinear,
            rms_norm=TENorm,
            core_attention=core_attention,
        )
    return _Parts(
        column_linear=ColumnParallelLinear,
        row_linear=RowParallelLinear,
        rms_norm=RMSNorm,
        core_attention=core_attention,
    )


def _without_bias(linear: type) -> Callable[..., Any]:
    """The vision tower's qkv has no bias although its other linear layers have."""

    def build(*args: Any, **kwargs: Any) -> Any:
        return linear(*args, **{**kwargs, "bias": False})

    return build


def vision_layer_spec(backend: Backend, vision: VisionConfig) -> ModuleSpec:
    """One InternViT layer: full attention, padded heads, q/k norm, LayerScale, drop path."""
    parts = _parts(backend)
    return ModuleSpec(
        module=InternVisionLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=parts.rms_norm,
            self_attention=ModuleSpec(
                module=PaddedHeadsSelfAttention,
                params={
                    "attn_mask_type": AttnMaskType.no_mask,
                    "num_heads": vision.num_attention_heads,
                },
                submodules=SelfAttentionSubmodules(
                    linear_qkv=_without_bias(parts.column_linear),
                    core_attention=parts.core_attention,
                    linear_proj=parts.row_linear,
                ),
            ),
            pre_mlp_layernorm=parts.rms_norm,
            mlp=_mlp_spec(parts, vision.ffn_hidden_size),
        ),
    )


def decoder_layer_spec(backend: Backend, language: LanguageConfig) -> ModuleSpec:
    """One Llama-type layer: causal GQA attention, SwiGLU, RMSNorm, no bias."""
    parts = _parts(backend)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=parts.rms_norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=parts.column_linear,
                    core_attention=parts.core_attention,
                    linear_proj=parts.row_linear,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=parts.rms_norm,
            mlp=_mlp_spec(parts, language.ffn_hidden_size),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def block_spec(layer: ModuleSpec, num_layers: int, backend: Backend) -> TransformerBlockSubmodules:
    """``num_layers`` times ``layer``; the final norm is built where the block is told to."""
    return TransformerBlockSubmodules(
        layer_specs=[layer] * num_layers, layer_norm=_parts(backend).rms_norm
    )


def _mlp_spec(parts: _Parts, ffn_hidden_size: int) -> ModuleSpec:
    return ModuleSpec(
        module=MLP,
        params={"ffn_hidden_size": ffn_hidden_size},
        submodules=MLPSubmodules(linear_fc1=parts.column_linear, linear_fc2=parts.row_linear),
    )
