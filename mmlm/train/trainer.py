"""The training loop."""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from mmlm.checkpoint.manifest import Manifest
from mmlm.checkpoint.save_load import save_checkpoint
from mmlm.config.load import to_json, write_resolved
from mmlm.config.schema import RunConfig
from mmlm.data.dataset import Dataset
from mmlm.data.ledger import LEDGER_FILE
from mmlm.data.loader import BatchLoader
from mmlm.data.packing import packing_cost
from mmlm.data.planners import TrainPlanner
from mmlm.data.step_plan import consumed_samples
from mmlm.log import get_logger
from mmlm.parallel.agreement import on_rank_zero
from mmlm.parallel.backend import Backend
from mmlm.parallel.topology import Topology
from mmlm.train.evaluate import evaluate
from mmlm.train.forward_step import DropPath, ForwardStep, training_forward_step
from mmlm.train.hf_export import export_hf
from mmlm.train.metrics import MetricsLog
from mmlm.train.optimizer import gather_parameters
from mmlm.train.setup import (
    TrainingState,
    build_training,
    check_data,
    data_fingerprint,
    open_data,
    refuse_other_data,
    train_iterations,
    training_state_dict,
)
from mmlm.train.start import Start, checkpoint_root, find_start, load_assets, load_tokenizer
from mmlm.train.summary import describe_run, parameter_counts
from mmlm.train.train_step import train_step


@dataclass(frozen=True, kw_only=True)
class Run:
    """A training that is ready to go."""

    config: RunConfig
    topology: Topology
    start: Start
    assets: dict[str, bytes]
    dataset: Dataset
    held_out: Dataset | None
    planner: TrainPlanner
    train_iters: int
    state: TrainingState

    @property
    def decodes(self) -> bool:
        """Whether this rank decodes pictures: one TP rank of the stage that images enter."""
        return self.state.chunks[0].pre_process and self.topology.tp_rank == 0


def train(config: RunConfig, topology: Topology, backend: Backend) -> None:
    """Train to the end, resuming where the output directory has a checkpoint; collective.

    Args:
        config: of the run; `mmlm.config.checks.check_run` has passed.
        topology: this rank's place.
        backend: which implementations.

    Raises:
        MmlmError: for anything that the user can mend.
    """
    run = prepare(config, topology, backend)
    if run.start.iteration >= run.train_iters:
        get_logger().info(
            f"nothing to do: iteration {run.start.iteration} of {run.train_iters} is done"
        )
        return
    metrics = MetricsLog(
        Path(config.output_dir),
        topology,
        start_iteration=run.start.iteration,
        train_iters=run.train_iters,
    )
    metrics.log_ledger(run.dataset)
    with BatchLoader(
        run.dataset,
        run.planner,
        data_parallel_rank=topology.dp_rank,
        end_iteration=run.train_iters,
        seed=config.train.seed,
        with_pixels=run.decodes,
        num_workers=config.data.num_workers,
        prefetch_iterations=config.data.prefetch_iterations,
        pad_to_multiple_of=config.parallel.token_multiple,
        pin_memory=topology.device.type == "cuda",
    ) as loader:
        for iteration in range(run.start.iteration, run.train_iters):
            waiting = time.perf_counter()
            plan, batches = loader.batches(iteration)
            waited = time.perf_counter() - waiting
            result = train_step(
                run.state.model,
                run.state.optimizer,
                run.state.scheduler,
                _forward_step(run, iteration),
                batches,
                topology,
            )
            metrics.log(plan, result, waited)
            _save_and_evaluate(run, metrics, iteration + 1)
    metrics.close()


def prepare(config: RunConfig, topology: Topology, backend: Backend) -> Run:
    """Find the start, open the data, build the model, say what will be done; collective."""
    start = on_rank_zero(lambda: find_start(config), topology.control_group)
    tokenizer = on_rank_zero(lambda: load_tokenizer(config, start), topology.control_group)
    assets = on_rank_zero(lambda: load_assets(config, start), topology.control_group)
    check_data(config, start, tokenizer)
    dataset = open_data(config, config.data.meta, start.model, tokenizer, topology)
    refuse_other_data(start, dataset)
    held_out = None
    if config.train.eval_interval:
        held_out = open_data(config, config.eval_meta, start.model, tokenizer, topology)
    planner = TrainPlanner(
        table=dataset.table,
        seed=config.train.seed,
        global_batch_size=config.train.global_batch_size,
        seq_length=config.data.seq_length,
        micro_batch_size=config.train.micro_batch_size,
        data_parallel_size=topology.dp_size,
        loss_weight=config.train.loss_weight,
        loss_group_size=config.train.loss_group_size,
        microbatch_multiple=config.parallel.microbatch_multiple,
        cost=packing_cost(start.model),
        packing=config.data.packing,
    )
    train_iters = train_iterations(config, planner)
    state = build_training(config, start, topology, backend, dataset, train_iters)
    counts = parameter_counts(state.chunks, topology)

    def announce() -> None:
        Path(config.output_dir).mkdir(parents=True, exist_ok=True)
        write_resolved(config, Path(config.output_dir) / "config.json")
        if dataset.ledger_file is not None and dataset.ledger_file.is_file():
            # a run of other settings may share the cache, and writes its own there
            shutil.copyfile(dataset.ledger_file, Path(config.output_dir) / LEDGER_FILE)
        get_logger().info(
            describe_run(
                config, start, topology, backend, state.plan, counts, dataset, planner, train_iters
            )
        )

    on_rank_zero(announce, topology.control_group)
    return Run(
        config=config,
        topology=topology,
        start=start,
        assets=assets,
        dataset=dataset,
        held_out=held_out,
        planner=planner,
        train_iters=train_iters,
        state=state,
    )


def _forward_step(run: Run, iteration: int) -> ForwardStep:
    drop_path = DropPath(
        seed=run.config.train.seed,
        iteration=iteration,
        max_rate=run.config.train.vision_drop_path_rate,
        mode=run.config.train.vision_drop_path_mode,
    )
    return training_forward_step(run.start.model, run.topology, drop_path)


def _save_and_evaluate(run: Run, metrics: MetricsLog, done: int) -> None:
    """Do what is due after ``done`` iterations; collective."""
    config = run.config
    saves = _due(done, config.checkpoint.save_interval) or done == run.train_iters
    evaluates = run.held_out is not None and _due(done, config.train.eval_interval)
    interval = config.checkpoint.export_hf_interval
    exports = _due(done, interval) or (interval > 0 and done == run.train_iters)
    if saves or evaluates or exports:
        gather_parameters(run.state.model)
    if saves:
        metrics.say(f"saved {save(run, done)}")
        metrics.restart_clock()
    if exports:
        folder = export_hf(
            Path(config.output_dir) / "hf",
            done,
            run.state.chunks,
            run.start.model,
            run.assets,
            run.topology,
            keep=config.checkpoint.keep,
        )
        metrics.say(f"exported {folder}")
        metrics.restart_clock()
    if run.held_out is not None and evaluates:
        report = evaluate(
            run.state.model,
            config,
            run.start.model,
            run.held_out,
            run.topology,
            with_pixels=run.decodes,
        )
        metrics.log_evaluation(done, report)
        metrics.restart_clock()


def _due(done: int, interval: int) -> bool:
    return interval > 0 and done % interval == 0


def save(run: Run, iteration: int) -> Path:
    """Save after ``iteration`` iterations; collective.

    Returns:
        The checkpoint's directory.
    """
    config, topology = run.config, run.topology
    manifest = Manifest(
        iteration=iteration,
        consumed_samples=consumed_samples(iteration, config.train.global_batch_size),
        dtype=config.train.dtype,
        model=run.start.model,
        run_config=to_json(config),
        data=data_fingerprint(run.dataset),
        has_optimizer=True,
    )
    return save_checkpoint(
        checkpoint_root(config),
        training_state_dict(run.state.chunks, run.state.optimizer, topology, is_loading=False),
        manifest,
        assets=run.assets,
        keep=config.checkpoint.keep,
        control_group=topology.control_group,
    )
