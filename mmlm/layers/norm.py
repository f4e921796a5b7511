"""RMSNorm and LayerNorm with the constructor that a megatron-core spec calls.

megatron-core's own local norm refuses sequence parallelism; these mark their parameters instead, so
that ``finalize_model_grads`` sums the gradients over the TP ranks.
"""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension; statistics in fp32."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel


class LayerNorm(torch.nn.LayerNorm):
    """LayerNorm with weight and bias over the last dimension."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel
        self.bias.sequence_parallel = config.sequence_parallel
