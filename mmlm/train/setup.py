"""Everything a run needs, built once from its configuration."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from mmlm.checkpoint.manifest import ASSETS_DIR, LATEST_FILE, Manifest, resolve
from mmlm.checkpoint.optimizer_state import load_optimizer_state, optimizer_sharded_state
from mmlm.checkpoint.storage import load_sharded
from mmlm.config.checks import check_model
from mmlm.config.schema import ModelConfig, RunConfig
from mmlm.data.dataset import Dataset, open_dataset
from mmlm.data.planners import TrainPlanner
from mmlm.data.sample import SampleSettings
from mmlm.data.tokenizer import Tokenizer
from mmlm.errors import CheckpointError, ConfigError
from mmlm.models.internvl_model import InternVLModel
from mmlm.models.model_provider import (
    build_model,
    initialize_weights,
    model_state,
    sharding_metadata,
)
from mmlm.parallel.agreement import on_rank_zero
from mmlm.parallel.backend import Backend
from mmlm.parallel.stage_plan import StagePlan, make_stage_plan
from mmlm.parallel.topology import Topology
from mmlm.train.optimizer import make_optimizer, make_scheduler, wrap_ddp


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a run begins."""

    checkpoint: Path | None
    """One iteration's directory; None for fresh weights."""
    manifest: Manifest | None
    """What it says."""
    resumes: bool
    """True: continue that run, optimizer and data order included. False: take the weights."""
    model: ModelConfig
    """Sizes."""

    @property
    def iteration(self) -> int:
        """Iterations already done."""
        return self.manifest.iteration if self.resumes and self.manifest is not None else 0

    @property
    def assets(self) -> Path | None:
        """Folder of HuggingFace configs and tokenizer files, if the checkpoint has one."""
        folder = None if self.checkpoint is None else self.checkpoint / ASSETS_DIR
        return folder if folder is not None and folder.is_dir() else None


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """What a step changes, and what it needs."""

    model: DistributedDataParallel
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    plan: StagePlan


def checkpoint_root(config: RunConfig) -> Path:
    """Folder of a run's own checkpoints."""
    return Path(config.output_dir) / "checkpoints"


def find_start(config: RunConfig) -> Start:
    """Decide where the run begins: its own newest checkpoint, else ``checkpoint.load``, else fresh.

    Raises:
        CheckpointError: if a named checkpoint cannot be used.
        ConfigError: if the sizes are given and differ from the checkpoint's, or are not given.
    """
    root = checkpoint_root(config)
    resumes = (root / LATEST_FILE).is_file()
    source = root if resumes else Path(config.checkpoint.load) if config.checkpoint.load else None
    if source is None:
        if config.model is None:
            raise ConfigError("model is not given and there is no checkpoint to read it from")
        return Start(checkpoint=None, manifest=None, resumes=False, model=config.model)
    checkpoint = resolve(source)
    manifest = Manifest.read(checkpoint)
    if config.model is not None and config.model != manifest.model:
        raise ConfigError(
            f"model in the recipe differs from the model in {checkpoint}: "
            f"{config.model} against {manifest.model}; leave model out of the recipe"
        )
    if resumes and not manifest.has_optimizer:
        raise CheckpointError(
            f"{checkpoint} has no optimizer state, so it cannot be resumed; use another output_dir "
            "and give it as checkpoint.load"
        )
    if resumes and manifest.consumed_samples != manifest.iteration * config.train.global_batch_size:
        raise ConfigError(
            f"{checkpoint} was trained for {manifest.consumed_samples} samples in "
            f"{manifest.iteration} iterations; resuming with train.global_batch_size "
            f"{config.train.global_batch_size} would repeat or skip samples"
        )
    return Start(checkpoint=checkpoint, manifest=manifest, resumes=resumes, model=manifest.model)


def load_tokenizer(config: RunConfig, start: Start) -> Tokenizer:
    """The tokenizer of ``data.tokenizer``, or the one kept beside the checkpoint.

    Raises:
        ConfigError: if there is neither.
    """
    if config.data.tokenizer:
        return Tokenizer(config.data.tokenizer)
    if start.assets is None:
        raise ConfigError(
            "data.tokenizer is empty and the checkpoint keeps no tokenizer files: give the folder "
            "that holds tokenizer.model"
        )
    return Tokenizer(start.assets)


def open_data(config: RunConfig, meta: str, model: ModelConfig, tokenizer: Tokenizer) -> Dataset:
    """Measure (on rank 0, once) and open the sets of a meta json; collective.

    Raises:
        DataError: on every rank, as `open_dataset`.
    """
    settings = SampleSettings(
        seq_length=config.data.seq_length,
        image_size=model.vision.image_size,
        embeddings_per_image=model.vision.embeddings_per_image,
    )
    name = hashlib.sha256(str(Path(meta).resolve()).encode()).hexdigest()[:8]
    cache = Path(config.data.cache_dir or Path(config.output_dir) / "data_cache")
    cache = cache / f"{Path(meta).stem}-{name}"

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

    on_rank_zero(lambda: read(build=True) and None)
    return read(build=False)


def train_iterations(config: RunConfig, planner: TrainPlanner) -> int:
    """Iterations of the whole run."""
    return config.train.train_iters or config.train.epochs * planner.iterations_per_epoch


def images_per_pack(dataset: Dataset, seq_length: int) -> float:
    """Mean images in ``seq_length`` tokens of data; decides the automatic pipeline cut."""
    table = dataset.table
    tokens = int(table.num_tokens[table.usable].sum())
    return float(table.num_images[table.usable].sum()) * seq_length / tokens


def build_chunk(
    config: RunConfig, start: Start, topology: Topology, backend: Backend, dataset: Dataset
) -> tuple[StagePlan, InternVLModel]:
    """Build this rank's chunk with the weights that the run starts from; collective.

    Raises:
        ConfigError: if the layout does not fit the model.
        CheckpointError: if the checkpoint does not.
    """
    plan = make_stage_plan(
        start.model,
        topology.pp_size,
        config.parallel.pipeline_layout,
        images_per_pack(dataset, config.data.seq_length),
    )
    chunk = build_model(start.model, plan, topology, backend, config.train)
    if start.checkpoint is None:
        initialize_weights(chunk, topology.groups, config.train.seed)
    else:
        loaded = load_sharded({"model": model_state(chunk, topology.groups)}, start.checkpoint)
        chunk.load_state_dict(
            {name.removeprefix("model."): tensor for name, tensor in loaded["model"].items()}
        )
    return plan, chunk


def build_training(
    config: RunConfig,
    start: Start,
    topology: Topology,
    backend: Backend,
    dataset: Dataset,
    train_iters: int,
) -> TrainingState:
    """Build model, optimizer and schedule, and resume them where the run does; collective."""
    plan, chunk = build_chunk(config, start, topology, backend, dataset)
    dtype = torch.bfloat16 if config.train.dtype == "bf16" else torch.float32
    model = wrap_ddp(chunk, topology)
    optimizer = make_optimizer(model, config.optimizer, dtype)
    if start.resumes and start.checkpoint is not None:
        state = training_state_dict(chunk, optimizer, topology, is_loading=True)
        loaded = load_sharded({"optimizer": state["optimizer"]}, start.checkpoint)
        load_optimizer_state(optimizer, loaded.get("optimizer", {}), start.iteration)
    scheduler = make_scheduler(optimizer, config.optimizer, train_iters, start.iteration)
    return TrainingState(model=model, optimizer=optimizer, scheduler=scheduler, plan=plan)


def training_state_dict(
    chunk: InternVLModel, optimizer: MegatronOptimizer, topology: Topology, *, is_loading: bool
) -> dict[str, dict]:
    """Describe model and optimizer for a checkpoint; collective."""
    model = model_state(chunk, topology.groups)
    return {
        "model": model,
        "optimizer": optimizer_sharded_state(
            optimizer,
            model,
            sharding_metadata(topology.groups),
            topology.dp_gloo_group,
            is_loading=is_loading,
        ),
    }


def check_data(config: RunConfig, start: Start, tokenizer: Tokenizer) -> None:
    """Check the model against tokenizer and lengths; see `mmlm.config.checks`."""
    check_model(config, start.model, tokenizer.vocab_size)
