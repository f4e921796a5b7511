"""Everything a run needs, built once from its configuration."""

import hashlib
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from mmlm.checkpoint.integrity import refuse_damage
from mmlm.checkpoint.optimizer_state import load_optimizer_state, optimizer_sharded_state
from mmlm.checkpoint.storage import load_sharded
from mmlm.config.checks import check_model
from mmlm.config.model import ModelConfig
from mmlm.config.schema import RunConfig
from mmlm.conversion.load_model import load_hf_weights
from mmlm.data.dataset import Dataset, cache_folder, open_dataset
from mmlm.data.planners import TrainPlanner
from mmlm.data.sample import SampleSettings
from mmlm.data.tokenizer import Tokenizer
from mmlm.errors import ConfigError, DataError
from mmlm.log import get_logger
from mmlm.models.internvl_model import InternVLModel
from mmlm.models.model_provider import (
    build_model,
    initialize_weights,
    load_weights,
    model_state,
)
from mmlm.parallel.agreement import on_rank_zero
from mmlm.parallel.backend import Backend
from mmlm.parallel.stage_plan import StagePlan, make_stage_plan
from mmlm.parallel.topology import Topology
from mmlm.train.optimizer import make_optimizer, make_scheduler, wrap_ddp
from mmlm.train.start import Start
from mmlm.train.stop import Stopper


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """What a step changes, and what it needs."""

    model: list[DistributedDataParallel]
    """This rank's chunks, one without virtual stages."""
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    plan: StagePlan

    @property
    def chunks(self) -> list[InternVLModel]:
        """The chunks without their wrappers."""
        return [chunk.module for chunk in self.model]


def data_fingerprint(dataset: Dataset) -> dict[str, Any]:
    """What a run trains on, as JSON values that change with it; the order of the sets counts."""
    sets = [
        [
            index.annotation_set.name,
            index.annotation_set.repeats * index.num_usable,
        ]
        for index in dataset.indexes
    ]
    tokens = int(dataset.table.num_tokens[dataset.table.usable].sum())
    order = hashlib.blake2b(digest_size=8)
    for index in dataset.indexes:
        for name in ("identity", "num_tokens", "usable"):
            order.update(np.ascontiguousarray(index.rows[name]).tobytes())
    return {"samples_of_sets": sets, "tokens": tokens, "order": order.hexdigest()}


def refuse_other_data(start: Start, dataset: Dataset) -> None:
    """Refuse to resume on other data: the order would repeat or skip samples.

    Raises:
        ConfigError: with what was trained on and what is there now.
    """
    before = start.manifest.data if start.resumes and start.manifest is not None else None
    now = data_fingerprint(dataset)
    if any(now[name] != value for name, value in (before or {}).items()):
        raise ConfigError(
            f"{start.checkpoint} was trained on other data: {before}, now {now}; resume with the "
            "same data, or start a new run in another output_dir with this one as checkpoint.load"
        )


def open_data(
    config: RunConfig,
    meta: str,
    model: ModelConfig,
    tokenizer: Tokenizer,
    topology: Topology,
    stopper: Stopper | None = None,
) -> Dataset:
    """Measure (on rank 0, once) and open the sets of a meta json; collective.

    Raises:
        StopRequested: on every rank, if `stopper` of rank 0 is told while it measures.
        DataError: on every rank, as `open_dataset`.
    """
    settings = SampleSettings(
        seq_length=config.data.seq_length,
        image_size=model.vision.image_size,
        embeddings_per_image=model.vision.embeddings_per_image,
        special_literals=config.data.special_literals,
    )
    cache = cache_folder(config.data.cache_dir or Path(config.output_dir) / "data_cache", meta)

    def read(build: bool) -> Dataset:
        return open_dataset(
            meta,
            tokenizer,
            settings,
            cache_dir=cache,
            policy=config.data.policy,
            num_workers=config.data.num_workers,
            build=build,
        )

    def build() -> None:
        with nullcontext() if stopper is None else stopper.interruptible():
            read(build=True)  # may take an hour; the next start goes on where it got to

    on_rank_zero(build, topology.control_group)
    dataset = read(build=False)
    refuse_different_data(data_fingerprint(dataset), cache, topology.control_group)
    return dataset


def refuse_different_data(
    fingerprint: dict[str, Any], cache: Path, control_group: dist.ProcessGroup
) -> None:
    """Make sure that all ranks have opened the same indexes, or their plans differ; collective.

    Raises:
        DataError: on every rank, if they have not.
    """
    found: list[dict[str, Any]] = [{}] * dist.get_world_size()
    dist.all_gather_object(found, fingerprint, group=control_group)
    if any(other != found[0] for other in found):
        raise DataError(
            f"{cache}: the length indexes changed while the ranks opened them; another run or "
            "check is measuring the same data, start again when it is done"
        )


def train_iterations(config: RunConfig, planner: TrainPlanner) -> int:
    """Iterations of the whole run."""
    return config.train.train_iters or config.train.epochs * planner.iterations_per_epoch


def images_per_token(dataset: Dataset) -> float:
    """Images over tokens of the usable samples; decides the automatic pipeline cut."""
    table = dataset.table
    tokens = int(table.num_tokens[table.usable].sum())
    return float(table.num_images[table.usable].sum()) / tokens


def build_chunks(
    config: RunConfig, start: Start, topology: Topology, backend: Backend, dataset: Dataset
) -> tuple[StagePlan, list[InternVLModel]]:
    """Build this rank's chunks with the weights that the run starts from; collective.

    Raises:
        ConfigError: if the layout does not fit the model.
        CheckpointError: if the checkpoint does not.
    """
    plan = make_stage_plan(
        start.model,
        config.parallel.num_stages,
        config.parallel.pipeline_layout,
        images_per_token(dataset),
    )
    chunks = build_model(start.model, plan, topology, backend, config.train, config.parallel)
    if start.hf_dir is not None:
        weights = start.open_hf()
        show = topology.rank == 0
        num_bytes = load_hf_weights(chunks, topology.groups, weights, progress=show)
        if show:
            get_logger().info(
                f"rank 0 read {num_bytes / 1e9:.3g} of the {weights.reader.num_bytes / 1e9:.3g} GB "
                f"in {start.hf_dir}"
            )
    elif start.checkpoint is None:
        initialize_weights(chunks, topology.groups, config.init_seed)
    else:
        if not start.resumes:  # of a run's own checkpoints one was chosen that is not damaged
            refuse_damage(
                start.checkpoint,
                checksums=config.checkpoint.verify,
                group=topology.control_group,
            )
        loaded = load_sharded({"model": model_state(chunks, topology.groups)}, start.checkpoint)
        load_weights(chunks, topology.groups, loaded["model"])
    return plan, chunks


def build_training(
    config: RunConfig,
    start: Start,
    topology: Topology,
    backend: Backend,
    dataset: Dataset,
    train_iters: int,
) -> TrainingState:
    """Build model, optimizer and schedule, and resume them where the run does; collective."""
    plan, chunks = build_chunks(config, start, topology, backend, dataset)
    dtype = torch.bfloat16 if config.train.dtype == "bf16" else torch.float32
    model = wrap_ddp(chunks, topology, config.parallel)
    optimizer = make_optimizer(model, config.optimizer, dtype)
    if start.resumes and start.checkpoint is not None:
        state = training_state_dict(chunks, optimizer, topology, is_loading=True)
        loaded = load_sharded({"optimizer": state["optimizer"]}, start.checkpoint)
        load_optimizer_state(
            optimizer,
            loaded.get("optimizer", {}),
            state["model"],
            topology.dp_gloo_group,
            start.num_updates,
        )
    scheduler = make_scheduler(optimizer, config.optimizer, train_iters, start.num_updates)
    return TrainingState(model=model, optimizer=optimizer, scheduler=scheduler, plan=plan)


def training_state_dict(
    chunks: list[InternVLModel],
    optimizer: MegatronOptimizer,
    topology: Topology,
    *,
    is_loading: bool,
) -> dict[str, dict]:
    """Describe model and optimizer for a checkpoint; collective."""
    model = model_state(chunks, topology.groups)
    return {
        "model": model,
        "optimizer": optimizer_sharded_state(
            optimizer,
            model,
            topology.dp_gloo_group,
            is_loading=is_loading,
        ),
    }


def check_data(config: RunConfig, start: Start, tokenizer: Tokenizer) -> None:
    """Check the model against tokenizer and lengths; see `mmlm.config.checks`."""
    check_model(config, start.model, tokenizer.vocab_size)
