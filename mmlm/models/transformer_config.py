"""The two megatron-core ``TransformerConfig`` of a model: the vision tower's and the decoder's."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from mmlm.config.model import ModelConfig
from mmlm.config.schema import Recompute
from mmlm.layers.head_partition import HeadPartition
from mmlm.parallel.cpu_backend import use_cpu
from mmlm.parallel.stage_plan import StagePlan

VOCAB_MULTIPLE = 64
"""Each rank's vocabulary rows are padded to this multiple, which matrix kernels like."""


@dataclass(frozen=True, kw_only=True)
class TransformerConfigs:
    """Both configs; the schedule uses the language one for every chunk."""

    vision: TransformerConfig
    language: TransformerConfig


def padded_vocab_size(vocab_size: int, tp_size: int) -> int:
    """Smallest multiple of ``VOCAB_MULTIPLE * tp_size`` that holds ``vocab_size`` rows."""
    multiple = VOCAB_MULTIPLE * tp_size
    return -(-vocab_size // multiple) * multiple


def make_transformer_configs(
    model: ModelConfig,
    plan: StagePlan,
    *,
    tp_size: int,
    pp_size: int,
    dtype: torch.dtype,
    vpp_size: int | None = None,
    sequence_parallel: bool = False,
    recompute_vision: Recompute = "none",
    recompute_language: Recompute = "none",
    deterministic: bool = False,
) -> TransformerConfigs:
    """Build the configs for a layout.

    Args:
        model: sizes.
        plan: where the layers are cut.
        tp_size: tensor-parallel ranks.
        pp_size: pipeline stages.
        dtype: of weights, activations and tensors between stages (float32 or bfloat16).
        vpp_size: chunks of each pipeline rank, None without virtual stages.
        sequence_parallel: whether the TP ranks share the tokens; needs ``tp_size`` > 1.
        recompute_vision: activations of the tower that are computed again in the backward pass.
        recompute_language: the same for the decoder.
        deterministic: only algorithms that add in a fixed order.

    Returns:
        The two configs, with every fusion off that needs a package we do not require.
    """
    vision, language = model.vision, model.language
    slots = HeadPartition(num_heads=vision.num_attention_heads, tp_size=tp_size).num_slots
    shared = _shared_settings(
        tp_size=tp_size,
        pp_size=pp_size,
        vpp_size=vpp_size,
        dtype=dtype,
        sequence_parallel=sequence_parallel,
        deterministic=deterministic,
    )
    return TransformerConfigs(
        vision=TransformerConfig(
            num_layers=vision.num_layers,
            hidden_size=vision.hidden_size,
            ffn_hidden_size=vision.ffn_hidden_size,
            num_attention_heads=slots,
            num_query_groups=slots,
            kv_channels=vision.kv_channels,
            layernorm_epsilon=vision.layernorm_epsilon,
            activation_func=F.gelu,
            add_bias_linear=True,
            pipeline_model_parallel_layout=plan.vision_layout if pp_size > 1 else None,
            **_recompute_settings(recompute_vision),
            **shared,
        ),
        language=TransformerConfig(
            num_layers=language.num_layers,
            hidden_size=language.hidden_size,
            ffn_hidden_size=language.ffn_hidden_size,
            num_attention_heads=language.num_attention_heads,
            num_query_groups=language.num_query_groups,
            kv_channels=language.kv_channels,
            layernorm_epsilon=language.layernorm_epsilon,
            activation_func=F.silu,
            gated_linear_unit=True,
            add_bias_linear=False,
            pipeline_model_parallel_layout=plan.language_layout if pp_size > 1 else None,
            **_recompute_settings(recompute_language),
            **shared,
        ),
    )


def _recompute_settings(recompute: Recompute) -> dict[str, Any]:
    if recompute == "full":
        return {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    if recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return {}


def _shared_settings(
    *,
    tp_size: int,
    pp_size: int,
    vpp_size: int | None,
    dtype: torch.dtype,
    sequence_parallel: bool,
    deterministic: bool,
) -> dict[str, Any]:
    return {
        "deterministic_mode": deterministic,
        "tensor_model_parallel_size": tp_size,
        "pipeline_model_parallel_size": pp_size,
        "virtual_pipeline_model_parallel_size": vpp_size,
        # with both neighbours on one rank (PP 2), batched exchanges of the interleaved schedule mix
        # activations with gradients, silently where shapes agree
        "overlap_p2p_comm": vpp_size is not None,
        "batch_p2p_comm": vpp_size is None,
        "sequence_parallel": sequence_parallel,
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "pipeline_dtype": dtype,
        "normalization": "RMSNorm",
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        # weights are set under their global names, see model_provider
        "perform_initialization": False,
        "use_cpu_initialization": use_cpu(),
        # shapes differ between stages and microbatches; megatron-core ties this to a MoE setting
        "variable_seq_lengths": True,
        "moe_token_dispatcher_type": "alltoall",
        "deallocate_pipeline_outputs": True,
        # the loss is already weighted: nothing is divided by counts afterwards
        "calculate_per_token_loss": True,
        "gradient_accumulation_fusion": False,
        "bias_dropout_fusion": False,
        "bias_activation_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
    }
