"""Train the real, parallel model on hand-made samples and bring back what the reference predicts.

`train_parallel` runs inside every rank; weights, gradients and results have HuggingFace names.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedStateDict,
    apply_factories,
    is_main_replica,
)
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor

from mmlm.checkpoint.optimizer_state import optimizer_sharded_state
from mmlm.config.model import ModelConfig
from mmlm.config.schema import (
    BackendConfig,
    OptimizerConfig,
    Packing,
    ParallelConfig,
    TrainConfig,
)
from mmlm.conversion.hf_config import language_from_hf, vision_from_hf
from mmlm.conversion.name_map import expand
from mmlm.data.collate import Batch, collate
from mmlm.data.sample import Sample
from mmlm.data.step_plan import SampleTable, step_plan
from mmlm.layers.vision_attention import PaddedHeadsSelfAttention
from mmlm.models.internvl_model import InternVLModel
from mmlm.models.model_provider import build_model, fill_weights, model_state
from mmlm.parallel.backend import resolve_backend
from mmlm.parallel.stage_plan import make_stage_plan
from mmlm.parallel.topology import Topology, initialize
from mmlm.train.forward_step import DropPath, training_forward_step
from mmlm.train.gradients import gather_gradients, gather_tensors
from mmlm.train.optimizer import gather_parameters, make_optimizer, make_scheduler, wrap_ddp
from mmlm.train.train_step import forward_backward, train_step


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A cut of the model and of the batch."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    pipeline_layout: str = "auto"
    seq_length: int = 64
    """Small rows hold one sample each: then nothing is packed."""
    micro_batch_size: int = 1
    vpp: int | None = None
    sp: bool = False
    packed: bool = True
    """False: every row is one sample, as the reference computes it."""
    packing: Packing = "pack"
    """Any other: as above, and rows are padded to the longest of their microbatch."""
    overlap: bool = False
    """Overlap gradient reduction and weight gathering with computation, in small buckets."""

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    def __str__(self) -> str:
        name = f"TP{self.tp}-PP{self.pp}-DP{self.dp}" + "-SP" * self.sp + "-OV" * self.overlap
        if self.vpp:
            name += f"-VPP{self.vpp}"
        if self.pipeline_layout != "auto":
            name += f"-{self.pipeline_layout}"
        rows = f"s{self.seq_length}x{self.micro_batch_size}" if self.packed else "unpacked"
        return f"{name}-{rows}" + f"-{self.packing}" * (self.packing != "pack")


@dataclass(frozen=True, kw_only=True)
class ParallelRun:
    """Results of rank 0, under HuggingFace names."""

    losses: list[float]
    grad_norms: list[float]
    learning_rates: list[float]
    gradients: dict[str, Tensor]
    """Of the first iteration, before clipping."""
    weights: dict[str, Tensor]
    """After the last iteration; with bf16 the fp32 main weights."""
    padding_is_zero: bool
    """Whether every padding head on every rank is still bitwise zero."""


def make_samples(
    count: int,
    context: int,
    *,
    seed: int = 0,
    images_of_sample: Sequence[int] = (1, 0, 2, 1),
) -> list[Sample]:
    """Random conversations with two supervised stretches, 5 to 13 labels in all.

    Args:
        count: how many.
        context: the ``<IMG_CONTEXT>`` token; ordinary tokens are below it.
        seed: of everything random.
        images_of_sample: images of the samples in turn.
    """
    generator = np.random.default_rng(seed)
    samples = []
    for sample_id in range(count):
        images = images_of_sample[sample_id % len(images_of_sample)]
        pieces = [generator.integers(1, context, size=3)]
        for _ in range(images):
            pieces += [np.full(4, context), generator.integers(1, context, size=2)]
        answer = 5 + 2 * (sample_id % 5)
        pieces.append(generator.integers(1, context, size=answer))
        ids = np.concatenate(pieces).astype(np.int64)
        labels = np.full(len(ids), -100, dtype=np.int64)
        first = len(ids) - answer
        labels[first : len(ids) - 1] = ids[first + 1 :]
        labels[1] = ids[2]
        samples.append(
            Sample(
                sample_id=sample_id,
                input_ids=ids,
                labels=labels,
                image_positions=np.flatnonzero(ids == context).astype(np.int64),
                image_ids=np.arange(images, dtype=np.int64) + 64 * sample_id,
                pixel_values=generator.normal(size=(images, 3, 56, 56)).astype(np.float32),
            )
        )
    return samples


def sample_table(samples: Sequence[Sample]) -> SampleTable:
    """Sizes of hand-made samples."""
    return SampleTable(
        num_tokens=np.array([len(s.input_ids) for s in samples]),
        num_images=np.array([len(s.image_ids) for s in samples]),
        num_supervised_tokens=np.array([(s.labels != -100).sum() for s in samples]),
        usable=np.arange(len(samples)),
    )


def rank_batches(
    samples: Sequence[Sample],
    iteration: int,
    layout: Layout,
    topology: Topology,
    parallel: ParallelConfig,
    train: TrainConfig,
    with_pixels: bool,
) -> list[Batch]:
    """This rank's microbatches, through the real step plan and collation."""
    table = sample_table(samples)
    if not layout.packed:  # as if every sample filled its row
        table = replace(table, num_tokens=np.full_like(table.num_tokens, layout.seq_length))
    plan = step_plan(
        table,
        seed=train.seed,
        iteration=iteration,
        global_batch_size=train.global_batch_size,
        seq_length=layout.seq_length,
        micro_batch_size=layout.micro_batch_size,
        data_parallel_size=topology.dp_size,
        loss_weight=train.loss_weight,
        loss_group_size=train.loss_group_size,
        microbatch_multiple=parallel.microbatch_multiple,
        packing=layout.packing,
    )
    samples_in_row = [len(row) for of_rank in plan.microbatches for rows in of_rank for row in rows]
    # packed means packed, but where the layout wants as many rows as there are samples
    may_share = layout.packed and layout.packing == "pack"
    can_share = may_share and len(samples_in_row) < sum(samples_in_row)
    assert can_share == (max(samples_in_row) > 1), samples_in_row
    return [
        collate(
            [[samples[index] for index in row] for row in rows],
            plan.token_weights,
            image_size=56,
            with_pixels=with_pixels,
            pad_to_multiple_of=parallel.token_multiple,
            pad_rows=plan.pads_rows,
        )
        for rows in plan.microbatches[topology.dp_rank]
    ]


def hf_names(model: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Megatron's global names -> HuggingFace names, through the conversion table."""
    named = {}
    for entry in expand(model):
        if entry.megatron_name in tensors:
            parts = entry.rule.to_hf(tensors[entry.megatron_name])
            named.update(zip(entry.hf_names, parts, strict=True))
    return named


def megatron_weights(model: ModelConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """HuggingFace names -> Megatron's global names."""
    return {
        entry.megatron_name: entry.rule.to_megatron([weights[name] for name in entry.hf_names])
        for entry in expand(model)
    }


def train_parallel(
    layout: Layout,
    hf_config: dict[str, Any],
    weights: dict[str, Tensor],
    samples: Sequence[Sample],
    train: TrainConfig,
    optimizer_config: OptimizerConfig,
    num_iterations: int,
) -> ParallelRun | None:
    """Train; called by every rank of a world of ``layout.world_size``."""
    parallel = ParallelConfig(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp,
        sequence_parallel=layout.sp,
        overlap_grad_reduce=layout.overlap,
        overlap_param_gather=layout.overlap,
        ddp_bucket_size=4000 if layout.overlap else None,
    )
    topology = initialize(parallel)
    config = ModelConfig(
        vision=vision_from_hf(hf_config["vision_config"], "tiny"),
        language=language_from_hf(hf_config["llm_config"], "tiny"),
        ps_version=hf_config.get("ps_version", "v1"),
    )
    plan = make_stage_plan(config, parallel.num_stages, layout.pipeline_layout)
    backend = resolve_backend(BackendConfig(), train.dtype)
    chunks = build_model(config, plan, topology, backend, train, parallel)
    source = megatron_weights(config, weights)
    fill_weights(chunks, topology.groups, lambda name, shape: source[name])
    dtype = torch.bfloat16 if train.dtype == "bf16" else torch.float32
    model = wrap_ddp(chunks, topology, parallel)
    optimizer = make_optimizer(model, optimizer_config, dtype)
    scheduler = make_scheduler(optimizer, optimizer_config, max(num_iterations, 1))

    def inputs(iteration: int) -> tuple[Any, list[Batch]]:
        drop_path = DropPath(
            seed=train.seed,
            iteration=iteration,
            max_rate=train.vision_drop_path_rate,
            mode=train.vision_drop_path_mode,
        )
        step = training_forward_step(config, topology, drop_path)
        first = plan.chunks[topology.pp_rank].has_vision_embedding and topology.tp_rank == 0
        return step, rank_batches(samples, iteration, layout, topology, parallel, train, first)

    step, batches = inputs(0)
    first_loss = forward_backward(model, step, batches, topology)
    gradients = gather_gradients(model, topology)
    results = []
    for iteration in range(num_iterations):
        step, batches = inputs(iteration)
        results.append(train_step(model, optimizer, scheduler, step, batches, topology))
    gather_parameters(model)
    final = gather_tensors(main_shards(model_state(chunks, topology.groups, prefix="")))
    if train.dtype == "bf16":
        final |= main_weights(optimizer, chunks, topology)
    zero = torch.tensor(float(_padding_is_zero(chunks)))
    torch.distributed.all_reduce(zero, op=torch.distributed.ReduceOp.MIN)
    if topology.rank:
        return None
    return ParallelRun(
        losses=[first_loss] if not results else [r.loss for r in results],
        grad_norms=[r.grad_norm for r in results],
        learning_rates=[r.learning_rate for r in results],
        gradients=hf_names(config, gradients),
        weights=hf_names(config, final),
        padding_is_zero=bool(zero),
    )


def main_shards(state: ShardedStateDict) -> list[ShardedTensor]:
    """This rank's blocks of a state; each element of the model is in one rank's list."""
    apply_factories(state)
    return [
        shard
        for shard in nested_values(state)
        if isinstance(shard, ShardedTensor) and is_main_replica(shard.replica_id)
    ]


def main_weights(
    optimizer: MegatronOptimizer, chunks: Sequence[InternVLModel], topology: Topology
) -> dict[str, Tensor]:
    """The optimizer's fp32 weights, which the bf16 ones are rounded from; collective."""
    state = optimizer_sharded_state(
        optimizer, model_state(chunks, topology.groups), topology.dp_gloo_group
    )
    found = gather_tensors(main_shards({key: tensors["param"] for key, tensors in state.items()}))
    return {key.removeprefix("optimizer.state.param.model."): found[key] for key in found}


def _padding_is_zero(chunks: Sequence[InternVLModel]) -> bool:
    return all(
        module.padding_is_zero()
        for chunk in chunks
        for module in chunk.modules()
        if isinstance(module, PaddedHeadsSelfAttention)
    )
