"""The state of megatron-core's distributed optimizer, under global names and in true shapes.

megatron-core keeps fp32 main weights and Adam's moments as slices of flat buffers over the DP
ranks. Every parameter has an owner among the ranks that hold slices of it. On saving, the slices
are brought together there and described like the parameter, so any layout can read them; on
loading, the owner reads the whole and hands out the slices. Owners are chosen so that all DP ranks
own about as much.

megatron-core's own way of doing this (format ``fully_reshardable``) is not used: it collects
everything on DP rank 0, it mixes up the parameters in silence when gradients have more than one
bucket (it drops the padding between buckets and then indexes as if it were there), and its loading
path gives all torch AdamW parameters one shared step tensor. Of the rest of its ``state_dict``
nothing is needed: rates and decay come from the configuration, and the number of steps is the
iteration.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import (
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer
from torch import Tensor

KEY_PREFIX = "optimizer.state."
"""Of the keys on disk. What `optimizer_sharded_state` describes under them to be saved are copies
of its own, which no later step of the optimizer changes."""

STATES = ("param", "exp_avg", "exp_avg_sq")
"""What is kept of each parameter: fp32 main weight and Adam's two moments."""


@dataclass(frozen=True, kw_only=True)
class _Sliced:
    """A parameter of this rank's model and who holds which part of its optimizer state."""

    parameter: torch.nn.Parameter
    optimizer: DistributedOptimizer
    slices: dict[int, slice]
    """DP rank -> elements of the flattened parameter; only ranks that hold some."""
    owner: int
    """The DP rank that saves and reads the whole."""


def optimizer_sharded_state(
    optimizer: MegatronOptimizer,
    model_state: ShardedStateDict,
    gloo_group: dist.ProcessGroup,
    *,
    is_loading: bool = False,
) -> dict[str, Any]:
    """Describe the optimizer's tensors for `storage.save_sharded` or `storage.load_sharded`.

    Collective over the DP ranks. Keys on disk are
    ``optimizer.state.{param,exp_avg,exp_avg_sq}.model.<name>``.

    Args:
        optimizer: megatron-core's.
        model_state: description of the parameters, from `model_state`.
        gloo_group: the DP ranks over gloo.
        is_loading: whether the result is to be filled.

    Returns:
        Key of a parameter -> state -> description, fp32 on the CPU, of the parameters that this
        rank owns.
    """
    described = {entry.data: entry for entry in model_state.values()}
    rank = gloo_group.rank()
    state: dict[str, Any] = {}
    for part in _parts(optimizer):
        if is_loading and not part.optimizer.state:
            # a step whose effect is overwritten by loading
            part._init_optimizer_states_with_dummy_values()
        for sliced in _sliced_parameters(part, gloo_group.size()):
            whole = None
            if not is_loading:
                whole = _bring_together(sliced, gloo_group)
            elif rank == sliced.owner:
                whole = torch.empty(len(STATES), sliced.parameter.numel())
            if whole is not None:
                entry = described[sliced.parameter]
                state[entry.key] = _describe(entry, whole)
    return state


@torch.no_grad()
def load_optimizer_state(
    optimizer: MegatronOptimizer,
    loaded: dict[str, Any],
    model_state: ShardedStateDict,
    gloo_group: dist.ProcessGroup,
    num_steps: int,
) -> None:
    """Put what was read into the optimizer; collective over the DP ranks.

    Args:
        optimizer: megatron-core's.
        loaded: what `storage.load_sharded` made of `optimizer_sharded_state`.
        model_state: as there.
        gloo_group: as there.
        num_steps: optimizer steps done, for Adam's bias correction.
    """
    keys = {entry.data: entry.key for entry in model_state.values()}
    for part in _parts(optimizer):
        # torch's AdamW counts steps in each parameter, which megatron-core does not expect here
        counters = {key: state.pop("step", None) for key, state in part.optimizer.state.items()}
        for sliced in _sliced_parameters(part, gloo_group.size()):
            whole = loaded.pop(keys[sliced.parameter], None)
            own = _hand_out(sliced, whole, gloo_group)
            if own is not None:
                part._set_main_param_and_optimizer_states(
                    sliced.parameter, dict(zip(STATES, own, strict=True))
                )
        for key, counter in counters.items():
            if counter is not None:
                part.optimizer.state[key]["step"] = torch.full_like(counter, num_steps)
        for group in part.optimizer.param_groups:
            if "step" in group:  # transformer-engine's FusedAdam counts in the group
                group["step"] = num_steps


def _parts(optimizer: MegatronOptimizer) -> list[DistributedOptimizer]:
    parts = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    return [part for part in parts if not part.is_stub_optimizer]


def _sliced_parameters(part: DistributedOptimizer, dp_size: int) -> Iterator[_Sliced]:
    """Every parameter of an optimizer, in an order that all DP ranks share.

    A bucket is cut into one equal shard a DP rank, whatever parameters lie in it.
    """
    owned = [0] * dp_size
    for buffer in part.buffers:
        for parameter, (start, end, bucket_id) in buffer.param_index_map.items():
            bucket = buffer.buckets[bucket_id]
            shard = bucket.grad_data.numel() // dp_size
            slices = {}
            for rank in range(dp_size):
                first = max(start, bucket.offset + rank * shard)
                last = min(end, bucket.offset + (rank + 1) * shard)
                if first < last:
                    slices[rank] = slice(first - start, last - start)
            owner = min(slices, key=lambda rank: owned[rank])
            owned[owner] += end - start
            yield _Sliced(parameter=parameter, optimizer=part, slices=slices, owner=owner)


def _bring_together(sliced: _Sliced, group: dist.ProcessGroup) -> Tensor | None:
    """Send this rank's slice to the owner, or collect there; collective over the holders.

    Returns:
        On the owner fp32 [states, elements] on the CPU.
    """
    rank, owner = group.rank(), sliced.owner
    if rank not in sliced.slices:
        return None
    tensors = sliced.optimizer._get_main_param_and_optimizer_states(sliced.parameter)
    main = tensors["param"].detach()
    # before its first step Adam has no moments, which are zeros then
    own = torch.stack(
        [tensors.get(name, torch.zeros_like(main)).detach().float().cpu() for name in STATES]
    )
    if rank != owner:
        dist.send(own, group=group, group_dst=owner)
        return None
    whole = torch.empty(len(STATES), sliced.parameter.numel())
    for source, place in sliced.slices.items():
        if source == owner:
            whole[:, place] = own
        else:
            received = torch.empty(len(STATES), place.stop - place.start)
            dist.recv(received, group=group, group_src=source)
            whole[:, place] = received
    return whole


def _hand_out(
    sliced: _Sliced, whole: dict[str, Tensor] | None, group: dist.ProcessGroup
) -> Tensor | None:
    """The reverse of `_bring_together`.

    Args:
        sliced: which parameter.
        whole: its states, on the owner.
        group: the DP ranks over gloo.

    Returns:
        This rank's slice, fp32 [states, elements] on the CPU; None where it holds none.
    """
    rank = group.rank()
    if rank == sliced.owner:
        assert whole is not None, "the owner has read it"
        states = torch.stack([whole[name].flatten() for name in STATES])
        for goal, place in sliced.slices.items():
            if goal != rank:
                dist.send(states[:, place].contiguous(), group=group, group_dst=goal)
        return states[:, sliced.slices[rank]]
    if rank not in sliced.slices:
        return None
    place = sliced.slices[rank]
    own = torch.empty(len(STATES), place.stop - place.start)
    dist.recv(own, group=group, group_src=sliced.owner)
    return own


def _describe(
    entry: ShardedTensor | ShardedTensorFactory, whole: Tensor
) -> dict[str, ShardedTensor | ShardedTensorFactory]:
    """The states of a parameter, described as the parameter is."""
    *outer, _ = entry.replica_id  # the last number counts the DP ranks: the owner stands for them
    replica_id = (*outer, 0)
    described = {}
    for name, values in zip(STATES, whole, strict=True):
        changes: dict[str, Any] = {
            "key": f"{KEY_PREFIX}{name}.{entry.key}",
            "data": values.view(entry.data.shape),
            "replica_id": replica_id,
        }
        if isinstance(entry, ShardedTensor):
            changes["dtype"] = torch.float32
        described[name] = replace(entry, **changes)
    return described
