"""The state of megatron-core's distributed optimizer, under global names and in true shapes.

megatron-core keeps fp32 main weights and Adam's moments as flat shards over the DP ranks. On saving
they are gathered on DP rank 0 and described like the parameters they belong to (format
``fully_reshardable``), so any layout can read them. Of the rest of its ``state_dict`` nothing is
needed: rates and decay come from the configuration, and the number of steps is the iteration. That
also avoids its loading path, which gives all torch AdamW parameters one shared step tensor.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer


def optimizer_sharded_state(
    optimizer: MegatronOptimizer,
    model_state: ShardedStateDict,
    metadata: dict[str, Any],
    gloo_group: dist.ProcessGroup,
    *,
    is_loading: bool = False,
) -> dict[str, Any]:
    """Describe the optimizer's tensors for `storage.save_sharded` or `storage.load_sharded`.

    Collective. Keys on disk are ``optimizer.state.{param,exp_avg,exp_avg_sq}.model.<name>``.

    Args:
        optimizer: megatron-core's.
        model_state: description of the parameters, from `model_state`.
        metadata: megatron-core's sharding metadata.
        gloo_group: the DP ranks over gloo.
        is_loading: whether the result is to be filled.

    Returns:
        One entry a contained optimizer that has parameters on this rank.
    """
    state: dict[str, Any] = {}
    for index, part in enumerate(_parts(optimizer)):
        part.data_parallel_group_gloo = gloo_group
        if is_loading:
            _allocate_moments(part)
        described = part.sharded_param_state_fully_reshardable(model_state, is_loading, metadata)
        if described:
            state[str(index)] = described
    return state


def _allocate_moments(part: DistributedOptimizer) -> None:
    """Give a fresh inner optimizer its moments: a step whose effect is overwritten by loading."""
    if not part.optimizer.state:
        part._init_optimizer_states_with_dummy_values()


def load_optimizer_state(
    optimizer: MegatronOptimizer, loaded: dict[str, Any], num_steps: int
) -> None:
    """Put what was read into the optimizer.

    Args:
        optimizer: megatron-core's.
        loaded: what `storage.load_sharded` made of `optimizer_sharded_state`.
        num_steps: optimizer steps done, for Adam's bias correction.
    """
    for index, part in enumerate(_parts(optimizer)):
        # torch's AdamW counts steps in each parameter, which megatron-core does not expect here
        counters = {key: state.pop("step", None) for key, state in part.optimizer.state.items()}
        if str(index) in loaded:
            part.load_parameter_state_from_fully_reshardable(loaded[str(index)])
        for key, counter in counters.items():
            if counter is not None:
                part.optimizer.state[key]["step"] = torch.full_like(counter, num_steps)
        for group in part.optimizer.param_groups:
            if "step" in group:  # transformer-engine's FusedAdam counts in the group
                group["step"] = num_steps


def _parts(optimizer: MegatronOptimizer) -> list[DistributedOptimizer]:
    parts = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    return [part for part in parts if not part.is_stub_optimizer]
