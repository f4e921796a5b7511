"""Into and out of the regions where tokens are shared between the TP ranks (sequence parallel).

Outside of a region every TP rank computes the same on the whole stream, so its gradient is already
whole there: entering a region splits it, and leaving one keeps the own part of the gradient. (A
reduce-scatter in that place would scale the gradients before it by the number of ranks.)

Legend: t tokens of the stream, a multiple of the TP size; h hidden size.
"""

import copy

import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


def enter_sequence_region(
    x: Tensor, config: TransformerConfig, groups: ProcessGroupCollection
) -> Tensor:
    """Keep this TP rank's tokens: [t, 1, h] -> [t / TP, 1, h]; the same tensor without SP."""
    if not config.sequence_parallel:
        return x
    return scatter_to_sequence_parallel_region(x, group=groups.tp)


def leave_sequence_region(
    x: Tensor, config: TransformerConfig, groups: ProcessGroupCollection
) -> Tensor:
    """Collect all tokens on every TP rank: [t / TP, 1, h] -> [t, 1, h]; the same without SP."""
    if not config.sequence_parallel:
        return x
    return gather_from_sequence_parallel_region(
        x, tensor_parallel_output_grad=False, group=groups.tp
    )


def outside_sequence_region(config: TransformerConfig) -> TransformerConfig:
    """The config for layers that work on the whole stream: the same without SP."""
    if not config.sequence_parallel:
        return config
    outside = copy.copy(config)
    outside.sequence_parallel = False
    return outside


def padding_tokens(num_tokens: int, config: TransformerConfig) -> int:
    """Tokens to add so that the TP ranks can share a stream equally; 0 without SP."""
    multiple = config.tensor_model_parallel_size if config.sequence_parallel else 1
    return -num_tokens % multiple


def pad_stream(x: Tensor, num_tokens: int) -> Tensor:
    """Add ``num_tokens`` zero rows behind a stream [t, 1, h]."""
    return F.pad(x, (0, 0, 0, 0, 0, num_tokens)) if num_tokens else x


def local_part(x: Tensor, config: TransformerConfig, groups: ProcessGroupCollection) -> Tensor:
    """This TP rank's rows of something that has one row a token and no gradient."""
    if not config.sequence_parallel:
        return x
    return x.chunk(groups.tp.size())[groups.tp.rank()]
