"""One iteration: forward and backward over all microbatches, clip, AdamW, next learning rate."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func

from mmlm.data.collate import Batch
from mmlm.parallel.topology import Topology
from mmlm.train.forward_step import ForwardStep
from mmlm.train.optimizer import step_if_finite


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What an iteration reports; the same on every rank."""

    loss: float
    """Weighted sum over all tokens of the global batch."""
    grad_norm: float
    """Global norm before clipping."""
    learning_rate: float
    """The rate that was used."""

    @property
    def is_finite(self) -> bool:
        """Whether the iteration counts; if not, it has changed nothing but the gradients."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def run_schedule(
    model: Sequence[DistributedDataParallel],
    forward_step: ForwardStep,
    batches: Sequence[Batch],
    *,
    forward_only: bool,
) -> list[dict[str, Any]]:
    """Send all microbatches through megatron-core's schedule; collective.

    Returns:
        What the loss function reported for each microbatch; empty but on the last stage.
    """
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        # every chunk of the rank reads the microbatches for itself
        data_iterator=[iter(batches) for _ in model],
        model=list(model),
        num_microbatches=len(batches),
        seq_length=1,  # shapes are exchanged before each tensor
        micro_batch_size=1,
        forward_only=forward_only,
    )


def forward_backward(
    model: Sequence[DistributedDataParallel],
    forward_step: ForwardStep,
    batches: Sequence[Batch],
    topology: Topology,
) -> float:
    """Compute the loss and the final, summed gradients of an iteration; collective.

    Returns:
        The loss, the same on every rank.
    """
    for chunk in model:
        chunk.zero_grad_buffer()
    reports = run_schedule(model, forward_step, batches, forward_only=False)
    loss = torch.zeros((), dtype=torch.float64, device=topology.device)
    if topology.tp_rank == 0:
        for report in reports:
            loss += report["loss"]
    dist.all_reduce(loss)
    return loss.item()


def train_step(
    model: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    forward_step: ForwardStep,
    batches: Sequence[Batch],
    topology: Topology,
    begin_update: Callable[[], None] = lambda: None,
) -> StepResult:
    """Train one iteration; collective.

    Args:
        model: this rank's wrapped chunks.
        optimizer: of `make_optimizer`.
        scheduler: of the learning rate.
        forward_step: of this iteration.
        batches: this rank's microbatches.
        topology: its place.
        begin_update: called when the gradients are there.

    Returns:
        Loss, norm and rate. If the loss or the norm is not finite, which all ranks see alike,
        weights, optimizer state and scheduler are as they were, to the bit.
    """
    loss = forward_backward(model, forward_step, batches, topology)
    begin_update()
    learning_rate = _learning_rate(optimizer, topology)
    grad_norm = float("nan")
    if math.isfinite(loss):
        grad_norm = step_if_finite(optimizer)
    result = StepResult(loss=loss, grad_norm=grad_norm, learning_rate=learning_rate)
    if result.is_finite:
        scheduler.step(increment=1)
    return result


def _learning_rate(optimizer: MegatronOptimizer, topology: Topology) -> float:
    """The rate of this iteration; a rank with nothing to train learns it from the others."""
    rates = [group["lr"] for group in optimizer.param_groups if group["params"]]
    rate = torch.tensor(max(rates, default=0.0), dtype=torch.float64, device=topology.device)
    dist.all_reduce(rate, op=dist.ReduceOp.MAX)
    return rate.item()
