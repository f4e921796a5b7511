"""What is printed before the first iteration: layout, parameters, backends, data, first steps."""

import importlib.metadata
from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories, is_main_replica

from mmlm.config.schema import RunConfig
from mmlm.data.dataset import Dataset
from mmlm.data.ledger import LEDGER_FILE, count_entries, describe_counts
from mmlm.data.planners import TrainPlanner
from mmlm.models.internvl_model import InternVLModel
from mmlm.models.model_provider import PARTS, model_state
from mmlm.parallel.backend import Backend
from mmlm.parallel.stage_plan import StagePlan
from mmlm.parallel.topology import Topology
from mmlm.train.optimizer import warmup_iterations
from mmlm.train.start import Start


def parameter_counts(chunks: Sequence[InternVLModel], topology: Topology) -> list[dict[str, int]]:
    """True parameters (no padding) of each part in each row of the pipeline layout; collective.

    Returns:
        One ``{part: count}`` a row, the same on every rank.
    """
    table = torch.zeros(
        topology.pp_size * len(chunks), len(PARTS), dtype=torch.int64, device=topology.device
    )
    for index, chunk in enumerate(chunks):
        state = model_state([chunk], topology.groups, prefix="")
        apply_factories(state)
        mine = dict.fromkeys(PARTS, 0)
        for shard in nested_values(state):
            if isinstance(shard, ShardedTensor) and is_main_replica(shard.replica_id):
                mine[shard.key.split(".")[0]] += prod(shard.local_shape)
        row = index * topology.pp_size + topology.pp_rank
        table[row] = torch.tensor(list(mine.values()), device=topology.device)
    dist.all_reduce(table)
    return [dict(zip(PARTS, row, strict=True)) for row in table.tolist()]


def describe_run(
    config: RunConfig,
    start: Start,
    topology: Topology,
    backend: Backend,
    plan: StagePlan,
    counts: list[dict[str, int]],
    dataset: Dataset,
    planner: TrainPlanner,
    train_iters: int,
) -> str:
    """The start-up summary as text."""
    lines = ["", "mmlm training", *_layout_lines(config, topology, plan, counts)]
    lines += _backend_lines(config, backend)
    if start.hf_dir is not None:
        lines.append(f"start       HuggingFace weights of {start.hf_dir}")
    elif start.checkpoint is None:
        lines.append("start       fresh weights")
    else:
        verb = "resumes" if start.resumes else "weights from"
        lines.append(f"start       {verb} {start.checkpoint}, iteration {start.iteration}")
    lines += _data_lines(config, dataset, planner)
    optimizer = config.optimizer
    lines += [
        f"iterations  {train_iters} of {config.train.global_batch_size} samples; warm-up "
        f"{warmup_iterations(optimizer.lr_warmup_fraction, train_iters)}, cosine to "
        f"{optimizer.min_lr:g}",
        f"AdamW       lr {optimizer.lr:g}, betas {optimizer.adam_beta1:g}/"
        f"{optimizer.adam_beta2:g}, weight decay {optimizer.weight_decay:g} ({optimizer.decay}), "
        f"clip {optimizer.clip_grad:g}",
        f"loss        weight '{config.train.loss_weight}', vision drop path "
        f"{config.train.vision_drop_path_rate:g} ({config.train.vision_drop_path_mode})",
        f"seeds       data {config.data_seed}, drop path {config.drop_path_seed}, fresh weights "
        f"{config.init_seed}{', deterministic' if config.train.deterministic else ''}",
        f"output      {config.output_dir}",
        "",
    ]
    return "\n".join(lines)


def _layout_lines(
    config: RunConfig, topology: Topology, plan: StagePlan, counts: list[dict[str, int]]
) -> list[str]:
    total = sum(sum(stage.values()) for stage in counts)
    parallel = config.parallel
    more = ""
    if parallel.virtual_pipeline_model_parallel_size is not None:
        more += f", VPP {parallel.virtual_pipeline_model_parallel_size}"
    if parallel.uses_sequence_parallel:
        more += ", sequence parallel"
    if parallel.overlap_grad_reduce:
        gathers = " and parameter gather" if parallel.overlap_param_gather else ""
        more += f", gradient reduction{gathers} overlapped"
    lines = [f"layout      {topology}{more}", f"            {plan.layout}"]
    for index, (chunk, stage) in enumerate(zip(plan.chunks, counts, strict=True)):
        parts = ", ".join(f"{part} {count:,}" for part, count in stage.items() if count)
        lines.append(f"  stage {index}   {chunk}: {sum(stage.values()):,} parameters ({parts})")
    lines.append(f"parameters  {total:,}")
    for part in PARTS:
        frozen = ", frozen" if getattr(config.train, f"freeze_{part}") else ""
        count = sum(stage[part] for stage in counts)
        lines.append(f"  {part:<18}{count:>16,}{frozen}")
    return lines


def _backend_lines(config: RunConfig, backend: Backend) -> list[str]:
    comm = "gloo" if backend.device == "cpu" else "nccl"
    packages = ", ".join(f"{name} {version}" for name, version in backend.packages)
    return [
        f"backend     {backend.device} ({comm}), {config.train.dtype}, layers "
        f"{backend.transformer_impl}, attention {backend.attention_backend}",
        f"recompute   vision {config.train.recompute_vision_model}, language "
        f"{config.train.recompute_language_model}",
        f"packages    torch {torch.__version__}, megatron-core "
        f"{importlib.metadata.version('megatron-core')}, {packages}",
    ]


def _data_lines(config: RunConfig, dataset: Dataset, planner: TrainPlanner) -> list[str]:
    table = dataset.table
    tokens = int(table.num_tokens[table.usable].sum())
    images = int(table.num_images[table.usable].sum())
    lines = [
        f"data        {len(table.usable):,} samples in {len(dataset.indexes)} sets, {tokens:,} "
        f"tokens, {images:,} images",
    ]
    for index in dataset.indexes:
        entry = index.annotation_set
        lines.append(f"  {entry.name:<52}{index.num_usable * entry.repeats:>9,} samples")
    counts = count_entries(dataset.ledger())
    where = f"; see {Path(config.output_dir) / LEDGER_FILE}" if counts else ""
    lines.append(f"ledger      {describe_counts(counts)}{where}")
    first = planner.plan(0)
    lines.append(
        f"a step      {first.num_samples} samples -> {first.num_rows} packs of "
        f"{config.data.seq_length} tokens ({first.pack_fill:.1%} full), "
        f"{first.num_images / first.num_rows:.1f} images a pack, {first.num_microbatches} "
        f"microbatches of {config.train.micro_batch_size} a rank"
    )
    if first.pads_rows:
        lines.append(
            f"            not packed ({config.data.packing}): {first.padding_share:.1%} of what is "
            "computed is padding"
        )
    return lines
