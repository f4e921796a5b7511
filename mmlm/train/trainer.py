"""The training loop."""

import time
from pathlib import Path

from mmlm.checkpoint.manifest import Manifest
from mmlm.checkpoint.save_load import save_checkpoint
from mmlm.config.load import to_json, write_resolved
from mmlm.config.schema import RunConfig
from mmlm.data.loader import BatchLoader
from mmlm.data.packing import packing_cost
from mmlm.data.planners import TrainPlanner
from mmlm.log import get_logger
from mmlm.parallel.agreement import on_rank_zero
from mmlm.parallel.backend import Backend
from mmlm.parallel.topology import Topology
from mmlm.train.evaluate import evaluate
from mmlm.train.forward_step import training_forward_step
from mmlm.train.metrics import MetricsLog
from mmlm.train.setup import (
    Start,
    TrainingState,
    build_training,
    check_data,
    checkpoint_root,
    find_start,
    load_tokenizer,
    open_data,
    train_iterations,
    training_state_dict,
)
from mmlm.train.summary import describe_run, parameter_counts
from mmlm.train.train_step import train_step


def train(config: RunConfig, topology: Topology, backend: Backend) -> None:
    """Train to the end, resuming where the output directory has a checkpoint; collective.

    Args:
        config: of the run; `mmlm.config.checks.check_run` has passed.
        topology: this rank's place.
        backend: which implementations.

    Raises:
        MmlmError: for anything that the user can mend.
    """
    start = on_rank_zero(lambda: find_start(config))
    output_dir = Path(config.output_dir)
    tokenizer = on_rank_zero(lambda: load_tokenizer(config, start))
    check_data(config, start, tokenizer)
    dataset = open_data(config, config.data.meta, start.model, tokenizer)
    held_out = (
        open_data(config, config.eval_meta, start.model, tokenizer)
        if config.train.eval_interval
        else None
    )
    planner = TrainPlanner(
        table=dataset.table,
        seed=config.train.seed,
        global_batch_size=config.train.global_batch_size,
        seq_length=config.data.seq_length,
        micro_batch_size=config.train.micro_batch_size,
        data_parallel_size=topology.dp_size,
        loss_weight=config.train.loss_weight,
        cost=packing_cost(start.model),
    )
    train_iters = train_iterations(config, planner)
    state = build_training(config, start, topology, backend, dataset, train_iters)
    counts = parameter_counts(state.model.module, topology)
    if topology.rank == 0:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_resolved(config, output_dir / "config.json")
        get_logger().info(
            describe_run(
                config,
                start,
                topology,
                backend,
                state.plan,
                counts,
                dataset,
                planner,
                train_iters,
            )
        )
    if start.iteration >= train_iters:
        get_logger().info(f"nothing to do: iteration {start.iteration} of {train_iters} is done")
        return
    on_rank_zero(lambda: None)  # the output directory exists from here on
    with_pixels = state.model.module.pre_process
    metrics = MetricsLog(
        output_dir, topology, start_iteration=start.iteration, train_iters=train_iters
    )
    with BatchLoader(
        dataset,
        planner,
        data_parallel_rank=topology.dp_rank,
        end_iteration=train_iters,
        seed=config.train.seed,
        with_pixels=with_pixels,
        num_workers=config.data.num_workers,
    ) as loader:
        for iteration in range(start.iteration, train_iters):
            waiting = time.perf_counter()
            plan, batches = loader.batches(iteration)
            waited = time.perf_counter() - waiting
            step = training_forward_step(
                start.model, topology.device, seed=config.train.seed, iteration=iteration
            )
            result = train_step(
                state.model, state.optimizer, state.scheduler, step, batches, topology
            )
            metrics.log(plan, result, waited)
            done = iteration + 1
            if _due(done, config.checkpoint.save_interval) or done == train_iters:
                path = save(config, start, state, topology, done)
                metrics.say(f"saved {path}")
                metrics.restart_clock()
            if held_out is not None and _due(done, config.train.eval_interval):
                report = evaluate(
                    state.model, config, start.model, held_out, topology, with_pixels=with_pixels
                )
                metrics.log_evaluation(done, report)
                metrics.restart_clock()
    metrics.close()


def _due(done: int, interval: int) -> bool:
    return interval > 0 and done % interval == 0


def save(
    config: RunConfig, start: Start, state: TrainingState, topology: Topology, iteration: int
) -> Path:
    """Save after ``iteration`` iterations; collective.

    Returns:
        The checkpoint's directory.
    """
    manifest = Manifest(
        iteration=iteration,
        consumed_samples=iteration * config.train.global_batch_size,
        dtype=config.train.dtype,
        model=start.model,
        run_config=to_json(config),
        has_optimizer=True,
    )
    return save_checkpoint(
        checkpoint_root(config),
        training_state_dict(state.model.module, state.optimizer, topology, is_loading=False),
        manifest,
        assets=_assets(config, start),
        keep=config.checkpoint.keep,
    )


def _assets(config: RunConfig, start: Start) -> Path | None:
    if start.assets is not None:
        return start.assets
    return Path(config.data.tokenizer) if config.data.tokenizer else None
