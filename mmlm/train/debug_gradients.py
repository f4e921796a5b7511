"""``mmlm debug gradients``: losses and gradients of one global batch in a file, in any layout.

It is the training's own forward and backward pass, without the optimizer. The file's keys,
metadata and order do not depend on the layout; its numbers do by rounding only.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from mmlm.config.schema import RunConfig
from mmlm.data.dataset import Dataset
from mmlm.data.loader import BatchLoader
from mmlm.data.packing import packing_cost
from mmlm.data.planners import SelectionPlanner, TrainPlanner
from mmlm.errors import ConfigError
from mmlm.models.model_provider import PARTS
from mmlm.parallel.agreement import on_rank_zero
from mmlm.parallel.backend import Backend
from mmlm.parallel.topology import Topology
from mmlm.train.forward_step import DropPath, training_forward_step
from mmlm.train.gradient_file import GradientFile, batch_specs, sample_specs
from mmlm.train.gradients import gradient_shards
from mmlm.train.optimizer import wrap_ddp
from mmlm.train.setup import build_chunks, check_data, data_fingerprint, open_data
from mmlm.train.start import Start, load_tokenizer, named_start
from mmlm.train.step_record import SampleLoss, StepRecord
from mmlm.train.train_step import run_schedule


@dataclass(frozen=True, kw_only=True)
class GradientRequest:
    """What is computed, and where it goes."""

    meta: str
    """Meta json of the data."""
    output: Path
    """File to write."""
    iteration: int = 0
    """Which global batch of the training's data order."""
    sample_ids: tuple[int, ...] | None = None
    """Exactly these samples instead."""
    activations: bool = False
    """Write inputs and activations of each sample as well."""
    drop_path: bool = False
    """Drop what the training would drop in this iteration; otherwise nothing is dropped."""


def debug_gradients(
    config: RunConfig, request: GradientRequest, topology: Topology, backend: Backend
) -> None:
    """Compute one global batch and write the file; collective.

    Args:
        config: weights (``checkpoint.load`` or ``load_hf``), layout, batch, lengths, precision and
            what is frozen.
        request: what is wanted.
        topology: this rank's place.
        backend: which implementations.

    Raises:
        MmlmError: for anything that the user can mend.
    """
    start = on_rank_zero(lambda: named_start(config), topology.control_group)
    tokenizer = on_rank_zero(lambda: load_tokenizer(config, start), topology.control_group)
    check_data(config, start, tokenizer)
    dataset = open_data(config, request.meta, start.model, tokenizer, topology)
    planner = _planner(config, request, start, dataset, topology)
    plan, chunks = build_chunks(config, start, topology, backend, dataset)
    model = wrap_ddp(chunks, topology)
    max_rate = config.train.vision_drop_path_rate if request.drop_path else 0.0
    drop_path = DropPath(
        seed=config.drop_path_seed,
        iteration=request.iteration,
        max_rate=max_rate,
        mode=config.train.vision_drop_path_mode,
    )
    step = training_forward_step(start.model, topology, drop_path)
    stages = plan.chunks[topology.pp_rank :: topology.pp_size]
    record = StepRecord(
        step, chunks, stages, start.model, topology, activations=request.activations
    )
    loss = _forward_backward(model, record, config, request, dataset, planner, topology)
    sample_ids = planner.sample_ids(request.iteration).tolist()
    specs = batch_specs(len(sample_ids))
    for sample_id in dict.fromkeys(sample_ids) if request.activations else ():
        specs += sample_specs(sample_id, dataset.table, start.model)
    frozen = [part for part in PARTS if getattr(config.train, f"freeze_{part}")]
    GradientFile(
        path=request.output,
        model=start.model,
        trained_parts=frozenset(PARTS) - frozenset(frozen),
        tensors=specs,
        metadata=_metadata(config, request, start, dataset, frozen, max_rate),
    ).write(
        _batch_tensors(sample_ids, loss, record, topology) | record.tensors,
        gradient_shards(model, topology),
        topology,
    )


def _forward_backward(
    model: Sequence[DistributedDataParallel],
    record: StepRecord,
    config: RunConfig,
    request: GradientRequest,
    dataset: Dataset,
    planner: TrainPlanner | SelectionPlanner,
    topology: Topology,
) -> float:
    """Run the schedule once; return this rank's part of the loss; collective."""
    with BatchLoader(
        dataset,
        planner,
        data_parallel_rank=topology.dp_rank,
        end_iteration=request.iteration + 1,
        seed=config.data_seed,
        with_pixels=model[0].module.pre_process and topology.tp_rank == 0,
        num_workers=config.data.num_workers,
        pad_to_multiple_of=config.parallel.token_multiple,
    ) as loader:
        _, batches = loader.batches(request.iteration)
    for chunk in model:
        chunk.zero_grad_buffer()
    with record:
        reports = run_schedule(model, record, batches, forward_only=False)
    return sum(float(report["loss"]) for report in reports) if topology.tp_rank == 0 else 0.0


def _planner(
    config: RunConfig,
    request: GradientRequest,
    start: Start,
    dataset: Dataset,
    topology: Topology,
) -> TrainPlanner | SelectionPlanner:
    shared: dict[str, Any] = {
        "table": dataset.table,
        "seq_length": config.data.seq_length,
        "micro_batch_size": config.train.micro_batch_size,
        "data_parallel_size": topology.dp_size,
        "loss_weight": config.train.loss_weight,
        "loss_group_size": config.train.loss_group_size,
        "microbatch_multiple": config.parallel.microbatch_multiple,
        "cost": packing_cost(start.model),
        "packing": config.data.packing,
    }
    if request.sample_ids is None:
        return TrainPlanner(
            seed=config.data_seed, global_batch_size=config.train.global_batch_size, **shared
        )
    _check_ids(request.sample_ids, dataset)
    return SelectionPlanner(selection=request.sample_ids, **shared)


def _check_ids(sample_ids: Sequence[int], dataset: Dataset) -> None:
    count = len(dataset.table.num_tokens)
    usable = set(dataset.table.usable.tolist())
    for number, sample_id in enumerate(sample_ids):
        if not 0 <= sample_id < count:
            raise ConfigError(
                f"--ids: there is no sample {sample_id}; the sets have samples 0 to {count - 1}, "
                "counted through them in the order of the meta json"
            )
        if sample_id not in usable:
            raise ConfigError(
                f"--ids: sample {sample_id} ({dataset.record(sample_id).place}) is left out of the "
                "training; data_ledger.jsonl in the data's cache says why"
            )
        if sample_id in sample_ids[:number]:
            raise ConfigError(f"--ids: sample {sample_id} is given twice")


def _batch_tensors(
    sample_ids: Sequence[int], local_loss: float, record: StepRecord, topology: Topology
) -> dict[str, Tensor]:
    """The losses of the whole batch on rank 0, nothing on the others; collective."""
    local = (local_loss, record.losses)
    everything: list[tuple[float, dict[int, SampleLoss]]] = [local] * topology.world_size
    dist.gather_object(
        local,
        everything if topology.rank == 0 else None,
        dst=0,
        group=topology.control_group,
    )
    if topology.rank:
        return {}
    losses = {key: value for _, of_rank in everything for key, value in of_rank.items()}
    samples = [losses[sample_id] for sample_id in sample_ids]
    return {
        "loss": torch.tensor(sum(part for part, _ in everything), dtype=torch.float64),
        "sample_ids": torch.tensor(sample_ids, dtype=torch.int64),
        "sample_num_tokens": torch.tensor([sample.num_tokens for sample in samples]),
        "sample_losses": torch.tensor([sample.mean for sample in samples]),
    }


def _metadata(
    config: RunConfig,
    request: GradientRequest,
    start: Start,
    dataset: Dataset,
    frozen: Sequence[str],
    max_rate: float,
) -> dict[str, Any]:
    """What decides the numbers; nothing of the layout, of this machine or of where files are."""
    train = config.train
    settings: dict[str, Any] = {
        "dtype": train.dtype,
        "seq_length": config.data.seq_length,
        "loss_weight": train.loss_weight,
        "vision_drop_path_rate": max_rate,
        "seed": config.data_seed,
        "drop_path_seed": config.drop_path_seed,
    }
    if train.loss_weight == "micro_batch_mean":
        settings["loss_group_size"] = train.loss_group_size
    batch: dict[str, Any] = {"ids": "given"}
    if request.sample_ids is None:
        batch = {"iteration": request.iteration, "global_batch_size": train.global_batch_size}
    return {
        "model": dataclasses.asdict(start.model),
        "settings": settings,
        "batch": batch,
        "data": data_fingerprint(dataset),
        # these have no gradients in the file
        "frozen": frozen,
    }
