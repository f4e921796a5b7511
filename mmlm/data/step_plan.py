"""What an iteration trains on, as a pure function of numbers and the iteration.

A global batch is a number of samples. Each epoch has its own order; its last batch is completed
from the start of the epoch, as published, so every sample comes once and up to a batch of them
twice. Nothing is remembered between calls, so a run resumes exactly under any layout,
data-parallel size and number of workers: the samples of every iteration, their order, weights and
augmentation. Their packs are the same where the data-parallel size (and, with virtual stages, what
the number of microbatches must be a multiple of) is: the number of rows is a multiple of it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from mmlm.config.schema import LossWeight, Packing
from mmlm.data.annotation import IntArray
from mmlm.data.grouping import even_chunks, group_by_length
from mmlm.data.packing import PackingCost, one_a_row, pack

Row = tuple[int, ...]
Microbatch = tuple[Row, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class SampleTable:
    """Sizes of all samples; the columns are indexed by sample id.

    Sizes are int32 as `mmlm.data.dataset` makes them; wider integers do as well.
    """

    num_tokens: IntArray
    """int32 [samples]: tokens after the cut."""
    num_images: IntArray
    """int32 [samples]: pictures after the cut."""
    num_supervised_tokens: IntArray
    """int32 [samples]: labels that are trained on."""
    usable: IntArray
    """int64 [usable samples], ascending: ids of the samples that break no rule."""


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """The samples of one iteration and where each goes."""

    iteration: int
    """From 0."""
    epoch: int
    """From 0."""
    microbatches: tuple[tuple[Microbatch, ...], ...]
    """``[data-parallel rank][microbatch]`` = rows; a row is a tuple of sample ids."""
    token_weights: Mapping[int, float] = field(repr=False)
    """Sample id to the final weight of each of its supervised tokens."""
    num_samples: int
    """Samples of the global batch."""
    num_tokens: int
    """Their tokens, images' places included."""
    num_supervised_tokens: int
    """Their labels."""
    num_images: int
    """Their pictures."""
    num_computed_tokens: int
    """`num_tokens` and what fills rows up to the longest of their microbatch, if `pads_rows`. What
    is added for other reasons (a multiple of TP, a row without samples) is not counted."""
    pads_rows: bool
    """Whether the rows of a microbatch are padded to its longest, which packed ones are not."""
    seq_length: int
    """Tokens that a row can hold."""

    @property
    def num_microbatches(self) -> int:
        """Microbatches of every data-parallel rank."""
        return len(self.microbatches[0])

    @property
    def num_rows(self) -> int:
        """Packs of the iteration."""
        return sum(len(rows) for rank in self.microbatches for rows in rank)

    @property
    def pack_fill(self) -> float:
        """Share of the rows' room that holds tokens of samples."""
        return self.num_tokens / (self.num_rows * self.seq_length)

    @property
    def padding_share(self) -> float:
        """Share of `num_computed_tokens` that fills rows up; 0 where samples are packed."""
        return 1.0 - self.num_tokens / self.num_computed_tokens


def iterations_per_epoch(num_samples: int, global_batch_size: int) -> int:
    """Return the iterations of an epoch; a short last batch counts."""
    return -(-num_samples // global_batch_size)


def consumed_samples(iteration: int, global_batch_size: int) -> int:
    """Return how many samples were trained on before ``iteration`` (completed batches are full)."""
    return iteration * global_batch_size


@lru_cache(maxsize=2)
def epoch_order(num_samples: int, seed: int, epoch: int) -> IntArray:
    """Return the order of an epoch: a permutation of ``range(num_samples)``, int64.

    Raw generator words are sorted, because numpy promises those, and not its shuffles, to stay the
    same from version to version.
    """
    words = np.random.PCG64(np.random.SeedSequence((seed, epoch))).random_raw(num_samples)
    order = np.argsort(words, kind="stable").astype(np.int64, copy=False)
    order.setflags(write=False)
    return order


def samples_of(
    num_samples: int, *, seed: int, iteration: int, global_batch_size: int
) -> tuple[int, IntArray]:
    """Return the epoch of an iteration and which samples (from 0 to ``num_samples``) it takes."""
    epoch, step = divmod(iteration, iterations_per_epoch(num_samples, global_batch_size))
    order = epoch_order(num_samples, seed, epoch)
    return epoch, order[_slots(num_samples, step, global_batch_size)]


def ordered_samples(
    table: SampleTable,
    *,
    seed: int,
    iteration: int,
    global_batch_size: int,
    packing: Packing = "pack",
    chunk_size: int = 8,
) -> tuple[int, IntArray]:
    """Return the epoch of an iteration and the ids of its samples in their order.

    Args:
        table: sizes of all samples.
        seed: seed of the order.
        iteration: from 0.
        global_batch_size: samples of the iteration.
        packing: ``group_by_length`` changes which samples an iteration has, ``published`` their
            order within it.
        chunk_size: samples of a rank's micro-batch in the published code.
    """
    num_samples = len(table.usable)
    if packing != "group_by_length":
        epoch, places = samples_of(
            num_samples, seed=seed, iteration=iteration, global_batch_size=global_batch_size
        )
    else:
        epoch, step = divmod(iteration, iterations_per_epoch(num_samples, global_batch_size))
        order = _grouped_order(table, seed, epoch, global_batch_size)
        places = order[_slots(num_samples, step, global_batch_size)]
    sample_ids = table.usable[places]
    if packing == "published":
        sample_ids = even_chunks(sample_ids, table.num_tokens[sample_ids], chunk_size)
    return epoch, sample_ids


@lru_cache(maxsize=2)
def _grouped_order(table: SampleTable, seed: int, epoch: int, global_batch_size: int) -> IntArray:
    order = epoch_order(len(table.usable), seed, epoch)
    return group_by_length(order, table.num_tokens[table.usable], global_batch_size)


def _slots(num_samples: int, step: int, global_batch_size: int) -> IntArray:
    return (step * global_batch_size + np.arange(global_batch_size)) % num_samples


def token_weights(
    sample_ids: IntArray,
    num_supervised_tokens: IntArray,
    loss_weight: LossWeight,
    loss_group_size: int = 8,
) -> dict[int, float]:
    """Return the final weight of each supervised token, by sample.

    With n_i supervised tokens in sample i of N: ``token`` 1 / sum n_j; ``sample`` 1 / (N n_i);
    ``square`` (1 / sqrt(n_i)) / sum sqrt(n_j); ``micro_batch_mean`` 1 / (G sum of n_j in the group
    of i), where the samples, in their order, make G groups. The weights of all tokens sum to 1.

    The last is the arithmetic of the published trainer: the token mean of each rank's micro-batch,
    and the mean of those over ranks and accumulation steps.

    Args:
        sample_ids: samples of the global batch; one that appears twice counts twice.
        num_supervised_tokens: n_i, in the same order.
        loss_weight: which of the four.
        loss_group_size: samples of a group; the last group may have fewer.
    """
    counts = [int(count) for count in num_supervised_tokens]
    if loss_weight == "token":
        total = sum(counts)
        weights = [1.0 / total for _ in counts]
    elif loss_weight == "sample":
        weights = [1.0 / (len(counts) * count) for count in counts]
    elif loss_weight == "square":
        total_root = math.fsum(math.sqrt(count) for count in counts)
        weights = [1.0 / (math.sqrt(count) * total_root) for count in counts]
    else:
        starts = range(0, len(counts), loss_group_size)
        groups = [counts[start : start + loss_group_size] for start in starts]
        weights = [1.0 / (len(groups) * sum(group)) for group in groups for _ in group]
    by_sample: dict[int, list[float]] = {}
    for sample_id, weight in zip(sample_ids.tolist(), weights, strict=True):
        by_sample.setdefault(sample_id, []).append(weight)
    # one that appears twice, in groups of different weight, gets their mean twice: the same sum
    return {sample_id: math.fsum(each) / len(each) for sample_id, each in by_sample.items()}


def step_plan(
    table: SampleTable,
    *,
    seed: int,
    iteration: int,
    global_batch_size: int,
    seq_length: int,
    micro_batch_size: int,
    data_parallel_size: int,
    loss_weight: LossWeight = "token",
    loss_group_size: int = 8,
    microbatch_multiple: int = 1,
    cost: PackingCost | None = None,
    packing: Packing = "pack",
) -> StepPlan:
    """Plan one training iteration.

    Args:
        table: sizes of all samples.
        seed: seed of the order.
        iteration: from 0.
        global_batch_size: samples of the iteration.
        seq_length: tokens of a row.
        micro_batch_size: rows of a microbatch.
        data_parallel_size: ranks that share the batch.
        loss_weight: how the tokens of the global batch are weighed.
        loss_group_size: samples of a group of ``micro_batch_mean``.
        microbatch_multiple: the microbatches of a rank are a multiple of this.
        cost: what levelling evens out.
        packing: whether and in which order samples share rows.

    Returns:
        The plan; the same on every rank.
    """
    epoch, sample_ids = ordered_samples(
        table,
        seed=seed,
        iteration=iteration,
        global_batch_size=global_batch_size,
        packing=packing,
        chunk_size=loss_group_size,
    )
    counts = table.num_supervised_tokens[sample_ids]
    weights = token_weights(sample_ids, counts, loss_weight, loss_group_size)
    return assemble(
        table,
        sample_ids,
        weights,
        iteration=iteration,
        epoch=epoch,
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        data_parallel_size=data_parallel_size,
        microbatch_multiple=microbatch_multiple,
        cost=cost or PackingCost(),
        packing=packing,
    )


def assemble(
    table: SampleTable,
    sample_ids: IntArray,
    weights: Mapping[int, float],
    *,
    iteration: int,
    epoch: int,
    seq_length: int,
    micro_batch_size: int,
    data_parallel_size: int,
    cost: PackingCost,
    microbatch_multiple: int = 1,
    packing: Packing = "pack",
) -> StepPlan:
    """Put given samples into rows and the rows into a plan.

    Args:
        table: sizes of all samples.
        sample_ids: of this iteration, in order.
        weights: sample id to the weight of each supervised token.
        iteration: from 0.
        epoch: from 0.
        seq_length: tokens of a row.
        micro_batch_size: rows of a microbatch.
        data_parallel_size: ranks that share the batch.
        cost: what levelling evens out.
        microbatch_multiple: the microbatches of a rank are a multiple of this.
        packing: ``pack``; otherwise every sample has a row of its own.
    """
    lengths = table.num_tokens[sample_ids].tolist()
    images = table.num_images[sample_ids].tolist()
    if packing == "pack":
        packs = pack(
            lengths,
            [cost.of(tokens, count) for tokens, count in zip(lengths, images, strict=True)],
            seq_length=seq_length,
            micro_batch_size=micro_batch_size,
            data_parallel_size=data_parallel_size,
            microbatch_multiple=microbatch_multiple,
        )
    else:
        packs = one_a_row(
            len(lengths),
            micro_batch_size=micro_batch_size,
            data_parallel_size=data_parallel_size,
            microbatch_multiple=microbatch_multiple,
        )
    ids = sample_ids.tolist()
    num_padded = sum(
        len(rows) * max(sum(lengths[item] for item in row) for row in rows)
        for rank in packs
        for rows in rank
    )
    return StepPlan(
        iteration=iteration,
        epoch=epoch,
        microbatches=tuple(
            tuple(tuple(tuple(ids[item] for item in row) for row in rows) for rows in rank)
            for rank in packs
        ),
        token_weights=weights,
        num_samples=len(ids),
        num_tokens=sum(lengths),
        num_supervised_tokens=int(table.num_supervised_tokens[sample_ids].sum()),
        num_images=sum(images),
        num_computed_tokens=sum(lengths) if packing == "pack" else num_padded,
        pads_rows=packing != "pack",
        seq_length=seq_length,
    )
