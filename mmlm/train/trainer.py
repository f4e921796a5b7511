"""The training loop."""

import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from mmlm.checkpoint.manifest import Manifest, iterations
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
from mmlm.train.bad_numbers import BadNumbers
from mmlm.train.evaluate import evaluate
from mmlm.train.forward_step import DropPath, ForwardStep, training_forward_step
from mmlm.train.hf_export import export_hf
from mmlm.train.metrics import MetricsLog
from mmlm.train.nonfinite_count import NonfiniteCount
from mmlm.train.optimizer import gather_parameters
from mmlm.train.run_guard import guard_run
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
from mmlm.train.spike_log import SpikeLog
from mmlm.train.start import Start, checkpoint_root, find_start, load_assets, load_tokenizer
from mmlm.train.stop import Stopper, StopRequested, remove_marker, write_marker
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


def train(
    config: RunConfig, topology: Topology, backend: Backend, stopper: Stopper | None = None
) -> None:
    """Train to the end, resuming where the output directory has a checkpoint; collective.

    Args:
        config: of the run; `mmlm.config.checks.check_run` has passed.
        topology: this rank's place.
        backend: which implementations.
        stopper: what may end the run early; without one only the settings can.

    Raises:
        MmlmError: for anything that the user can mend.
    """
    stopper = stopper or Stopper(config.train.exit_duration_minutes)
    with _guarded(config, topology):
        try:
            run = prepare(config, topology, backend, stopper)
        except StopRequested as stop:
            get_logger().info(f"stopped by {stop} before the first iteration")
            saved = iterations(checkpoint_root(config))
            done = int(saved[-1].name.removeprefix("iter_")) if saved else 0
            _mark(config, topology, str(stop), done, None)
            return
        if run.start.iteration >= run.train_iters:
            get_logger().info(
                f"nothing to do: iteration {run.start.iteration} of {run.train_iters} is done"
            )
            return
        _iterate(run, stopper)


def _iterate(run: Run, stopper: Stopper) -> None:
    """Train from the start to the end or to a stop; collective."""
    config, topology = run.config, run.topology
    metrics = MetricsLog(
        Path(config.output_dir),
        topology,
        start_iteration=run.start.iteration,
        train_iters=run.train_iters,
    )
    metrics.log_ledger(run.dataset)
    spikes = None
    if topology.rank == 0:
        spikes = SpikeLog(
            Path(config.output_dir),
            start_iteration=run.start.iteration,
            factor=config.train.loss_spike_factor,
            window=config.train.loss_spike_window,
        )
    nonfinite = run.start.nonfinite
    bad_numbers = BadNumbers(
        model=run.state.model,
        sizes=run.start.model,
        dataset=run.dataset,
        topology=topology,
        output_dir=Path(config.output_dir),
        limit=config.train.max_nonfinite_iterations,
    )
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
            forward_step = _forward_step(run, iteration)
            result = train_step(
                run.state.model,
                run.state.optimizer,
                run.state.scheduler,
                forward_step,
                batches,
                topology,
            )
            nonfinite = nonfinite.after(is_finite=result.is_finite)
            metrics.log(plan, result, waited, stopper, nonfinite)
            if spikes is not None:
                spikes.look(plan, result.loss)
            bad_numbers.handle(plan, batches, forward_step, result, nonfinite)
            _save_and_evaluate(run, metrics, iteration + 1, stopper, nonfinite)
            if stopper.reason is not None:
                metrics.say(
                    f"stopped after iteration {iteration + 1} of {run.train_iters} by "
                    f"{stopper.reason}; the same command continues"
                )
                _mark(config, topology, stopper.reason, iteration + 1, run.train_iters)
                break
    metrics.close()


@contextmanager
def _guarded(config: RunConfig, topology: Topology) -> Iterator[None]:
    """Hold the output directory while the block runs, and drop an earlier stop; collective."""
    folder = Path(config.output_dir)
    with ExitStack() as held:

        def begin() -> None:
            held.enter_context(guard_run(folder))
            remove_marker(folder)

        on_rank_zero(begin, topology.control_group)
        yield


def _mark(
    config: RunConfig, topology: Topology, reason: str, done: int, train_iters: int | None
) -> None:
    """Leave the file that says that the run was stopped; collective."""
    on_rank_zero(
        lambda: write_marker(
            Path(config.output_dir), iteration=done, train_iters=train_iters, reason=reason
        ),
        topology.control_group,
    )


def prepare(config: RunConfig, topology: Topology, backend: Backend, stopper: Stopper) -> Run:
    """Find the start, open the data, build the model, say what will be done; collective.

    Raises:
        StopRequested: on every rank, when `stopper` says so before the first iteration.
        MmlmError: for anything that the user can mend.
    """
    start = on_rank_zero(lambda: find_start(config), topology.control_group)
    tokenizer = on_rank_zero(lambda: load_tokenizer(config, start), topology.control_group)
    assets = on_rank_zero(lambda: load_assets(config, start), topology.control_group)
    check_data(config, start, tokenizer)
    dataset = open_data(config, config.data.meta, start.model, tokenizer, topology, stopper)
    refuse_other_data(start, dataset)
    held_out = None
    if config.train.eval_interval:
        held_out = open_data(config, config.eval_meta, start.model, tokenizer, topology, stopper)
    stopper.raise_if_agreed(topology.control_group)
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
    stopper.raise_if_agreed(topology.control_group)
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


def _save_and_evaluate(
    run: Run, metrics: MetricsLog, done: int, stopper: Stopper, nonfinite: NonfiniteCount
) -> None:
    """Do what is due after ``done`` iterations; collective.

    Once the run is asked to stop, it is saved and nothing else is begun, but for what belongs to
    the last iteration, which no resume would make up for.
    """
    config, is_last = run.config, done == run.train_iters
    saves = _due(done, config.checkpoint.save_interval) or is_last
    interval = config.checkpoint.export_hf_interval
    exports = _due(done, interval) or (interval > 0 and is_last)
    evaluates = run.held_out is not None and _due(done, config.train.eval_interval)
    if saves or exports or evaluates or stopper.reason is not None:
        gather_parameters(run.state.model)
    if saves or stopper.reason is not None:
        _save(run, metrics, done, stopper, nonfinite)
        saves = True
    if exports and (is_last or stopper.reason is None):
        _export(run, metrics, done, stopper)
    if evaluates and (is_last or stopper.reason is None):
        _evaluate(run, metrics, done, stopper)
    if stopper.reason is not None and not saves:
        _save(run, metrics, done, stopper, nonfinite)


def _save(
    run: Run, metrics: MetricsLog, done: int, stopper: Stopper, nonfinite: NonfiniteCount
) -> None:
    metrics.say(f"saved {save(run, done, nonfinite)}")
    metrics.restart_clock()
    stopper.agree(run.topology.control_group)


def _export(run: Run, metrics: MetricsLog, done: int, stopper: Stopper) -> None:
    folder = export_hf(
        Path(run.config.output_dir) / "hf",
        done,
        run.state.chunks,
        run.start.model,
        run.assets,
        run.topology,
        keep=run.config.checkpoint.keep,
    )
    metrics.say(f"exported {folder}")
    metrics.restart_clock()
    stopper.agree(run.topology.control_group)


def _evaluate(run: Run, metrics: MetricsLog, done: int, stopper: Stopper) -> None:
    assert run.held_out is not None
    try:
        report = evaluate(
            run.state.model,
            run.config,
            run.start.model,
            run.held_out,
            run.topology,
            with_pixels=run.decodes,
            stopper=stopper if done < run.train_iters else None,
        )
    except StopRequested as stop:
        metrics.say(f"the evaluation after {done} iterations is left unfinished: {stop}")
    else:
        metrics.log_evaluation(done, report)
    metrics.restart_clock()
    stopper.agree(run.topology.control_group)


def _due(done: int, interval: int) -> bool:
    return interval > 0 and done % interval == 0


def save(run: Run, iteration: int, nonfinite: NonfiniteCount) -> Path:
    """Save after ``iteration`` iterations, of which some may have changed nothing; collective.

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
        nonfinite_iterations=nonfinite.total,
        nonfinite_in_a_row=nonfinite.in_a_row,
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
