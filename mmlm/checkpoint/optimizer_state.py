"""The state of megatron-core's distributed optimizer, under global names and in true shapes.

megatron-core keeps fp32 main weights and Adam's moments as slices of flat buffers over the DP
ranks. On saving, the slices of a parameter are brought together on the DP rank that holds most of
it, and described like the parameter, so any layout can read them; on loading, a rank reads the
parameters that it holds a slice of. No rank ever holds more than its share and two parameters.

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

STATES = ("param", "exp_avg", "exp_avg_sq")
"""What is kept of each parameter: fp32 main weight and Adam's two moments."""


@dataclass(frozen=True, kw_only=True)
class _Sliced:
    """A parameter of this rank's model and who holds which part of its optimizer state."""

    parameter: torch.nn.Parameter
    optimizer: DistributedOptimizer
    slices: dict[int, slice]
    """DP rank -> elements of the flattened parameter; only ranks that hold some."""

    @property
    def owner(self) -> int:
        """The DP rank that holds most, and that saves the whole."""
        return max(self.slices, key=lambda r: self.slices[r].stop - self.slices[r].start)


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
        Key of a parameter -> state -> description, fp32 on the CPU; on saving the parameters that
        this rank owns, on loading those that it holds a slice of.
    """
    described = {entry.data: entry for entry in model_state.values()}
    rank = gloo_group.rank()
    state: dict[str, Any] = {}
    for part in _parts(optimizer):
        if is_loading and not part.optimizer.state:
            # a step whose effect is overwritten by loading
            part._init_optimizer_states_with_dummy_values()
        for sliced in _sliced_parameters(part, gloo_group.size()):
            if is_loading:
                shape = (len(STATES), sliced.parameter.numel())
                whole = torch.empty(shape) if rank in sliced.slices else None
            else:
                whole = _bring_together(sliced, gloo_group)
            if whole is not None:
                entry = described[sliced.parameter]
                state[entry.key] = _describe(entry, whole, is_main=rank == sliced.owner)
    return state


@torch.no_grad()
def load_optimizer_state(
    optimizer: MegatronOptimizer,
    loaded: dict[str, Any],
    model_state: ShardedStateDict,
    gloo_group: dist.ProcessGroup,
    num_steps: int,
) -> None:
    """Put what was read into the optimizer.

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
            own = sliced.slices.get(gloo_group.rank())
            if own is not None:
                whole = loaded[keys[sliced.parameter]]
                part._set_main_param_and_optimizer_states(
                    sliced.parameter, {name: whole[name].flatten()[own] for name in STATES}
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
            yield _Sliced(parameter=parameter, optimizer=part, slices=slices)


def _bring_together(sliced: _Sliced, group: dist.ProcessGroup) -> Tensor | None:
    """Send this rank's slice to the owner, or collect there; collective over the holders.

    Returns:
        On the owner fp32 [states, elements] on the CPU.
    """
    rank, owner = group.rank(), sliced.owner
    if rank not in sliced.slices:
        return None
    tensors = sliced.optimizer._get_main_param_and_optimizer_states(sliced.parameter)
    own = torch.stack([tensors[name].detach().float().cpu() for name in STATES])
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


def _describe(
    entry: ShardedTensor | ShardedTensorFactory, whole: Tensor, *, is_main: bool
) -> dict[str, ShardedTensor | ShardedTensorFactory]:
    """The states of a parameter, described as the parameter is."""
    *outer, _ = entry.replica_id  # the last number counts the DP ranks
    replica_id = (*outer, 0 if is_main else 1)
    described = {}
    for name, values in zip(STATES, whole, strict=True):
        changes: dict[str, Any] = {
            "key": f"optimizer.state.{name}.{entry.key}",
            "data": values.view(entry.data.shape),
            "replica_id": replica_id,
        }
        if isinstance(entry, ShardedTensor):
            changes["dtype"] = torch.float32
        described[name] = replace(entry, **changes)
    return described
