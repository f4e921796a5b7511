"""Who says what an iteration contains: a training run, named samples, or a pass over a split."""

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from mmlm.config.schema import LossWeight, Packing
from mmlm.data.annotation import IntArray
from mmlm.data.packing import PackingCost
from mmlm.data.step_plan import (
    SampleTable,
    StepPlan,
    assemble,
    iterations_per_epoch,
    ordered_samples,
    step_plan,
    token_weights,
)


class Planner(Protocol):
    """Anything that says what an iteration contains."""

    def plan(self, iteration: int) -> StepPlan:
        """Return the plan of ``iteration`` (from 0)."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainPlanner:
    """Plans of a training run."""

    table: SampleTable
    """Sizes of all samples."""
    seed: int
    """Seed of the order."""
    global_batch_size: int
    """Samples of an iteration."""
    seq_length: int
    """Tokens of a row."""
    micro_batch_size: int
    """Rows of a microbatch."""
    data_parallel_size: int
    """Ranks that share the batch."""
    loss_weight: LossWeight = "token"
    """How the tokens of the global batch are weighed."""
    loss_group_size: int = 8
    """Samples of a group of ``micro_batch_mean``."""
    microbatch_multiple: int = 1
    """The microbatches of a rank are a multiple of this."""
    cost: PackingCost = field(default_factory=PackingCost)
    """What levelling evens out."""
    packing: Packing = "pack"
    """Whether and in which order samples share rows."""

    @property
    def iterations_per_epoch(self) -> int:
        """Iterations that see every usable sample at least once."""
        return iterations_per_epoch(len(self.table.usable), self.global_batch_size)

    def sample_ids(self, iteration: int) -> IntArray:
        """Return the samples of ``iteration`` in their order, int64 [global_batch_size]."""
        _, sample_ids = ordered_samples(
            self.table,
            seed=self.seed,
            iteration=iteration,
            global_batch_size=self.global_batch_size,
            packing=self.packing,
            chunk_size=self.loss_group_size,
        )
        return sample_ids

    def plan(self, iteration: int) -> StepPlan:
        """Return the plan of ``iteration`` (from 0)."""
        return step_plan(
            self.table,
            seed=self.seed,
            iteration=iteration,
            global_batch_size=self.global_batch_size,
            seq_length=self.seq_length,
            micro_batch_size=self.micro_batch_size,
            data_parallel_size=self.data_parallel_size,
            loss_weight=self.loss_weight,
            loss_group_size=self.loss_group_size,
            microbatch_multiple=self.microbatch_multiple,
            cost=self.cost,
            packing=self.packing,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class SelectionPlanner:
    """Every iteration is one global batch of exactly the named samples."""

    table: SampleTable
    """Sizes of all samples."""
    selection: tuple[int, ...]
    """Ids of usable samples, each once."""
    seq_length: int
    """Tokens of a row."""
    micro_batch_size: int
    """Rows of a microbatch."""
    data_parallel_size: int
    """Ranks that share the batch."""
    loss_weight: LossWeight = "token"
    """How the tokens of the batch are weighed."""
    loss_group_size: int = 8
    """Samples of a group of ``micro_batch_mean``."""
    microbatch_multiple: int = 1
    """The microbatches of a rank are a multiple of this."""
    cost: PackingCost = field(default_factory=PackingCost)
    """What levelling evens out."""
    packing: Packing = "pack"
    """Whether and in which order samples share rows."""

    def sample_ids(self, iteration: int) -> IntArray:
        """Return the selection, int64; the same for every iteration."""
        return np.array(self.selection, dtype=np.int64)

    def plan(self, iteration: int) -> StepPlan:
        """Return the plan of ``iteration`` (from 0), of epoch 0."""
        sample_ids = self.sample_ids(iteration)
        counts = self.table.num_supervised_tokens[sample_ids]
        return assemble(
            self.table,
            sample_ids,
            token_weights(sample_ids, counts, self.loss_weight, self.loss_group_size),
            iteration=iteration,
            epoch=0,
            seq_length=self.seq_length,
            micro_batch_size=self.micro_batch_size,
            data_parallel_size=self.data_parallel_size,
            microbatch_multiple=self.microbatch_multiple,
            cost=self.cost,
            packing=self.packing,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class EvaluationPlanner:
    """Plans of a pass over all samples in order, each once; the last batch may be short.

    Every supervised token weighs 1 / (supervised tokens of all samples), so that the sum over all
    iterations is the token mean of the whole split.
    """

    table: SampleTable
    """Sizes of all samples."""
    global_batch_size: int
    """Samples of an iteration."""
    seq_length: int
    """Tokens of a row."""
    micro_batch_size: int
    """Rows of a microbatch."""
    data_parallel_size: int
    """Ranks that share the batch."""
    microbatch_multiple: int = 1
    """The microbatches of a rank are a multiple of this."""
    cost: PackingCost = field(default_factory=PackingCost)
    """What levelling evens out."""

    @property
    def num_iterations(self) -> int:
        """Iterations of one pass."""
        return iterations_per_epoch(len(self.table.usable), self.global_batch_size)

    def plan(self, iteration: int) -> StepPlan:
        """Return the plan of ``iteration`` (from 0, below `num_iterations`)."""
        start = iteration * self.global_batch_size
        usable = self.table.usable
        total = int(self.table.num_supervised_tokens[usable].sum())
        sample_ids = usable[start : start + self.global_batch_size]
        return assemble(
            self.table,
            sample_ids,
            dict.fromkeys(sample_ids.tolist(), 1.0 / total),
            iteration=iteration,
            epoch=0,
            seq_length=self.seq_length,
            micro_batch_size=self.micro_batch_size,
            data_parallel_size=self.data_parallel_size,
            microbatch_multiple=self.microbatch_multiple,
            cost=self.cost,
        )
