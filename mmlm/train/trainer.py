"""The training loop."""

import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from mmlm.checkpoint.manifest import Manifest, iterations
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
from mmlm.train.determinism import make_deterministic
from mmlm.train.evaluate import evaluate
from mmlm.train.forward_step import DropPath, ForwardStep, training_forward_step
from mmlm.train.hf_export import export_hf
from mmlm.train.metrics import MetricsLog
from mmlm.train.nonfinite_count import NonfiniteCount
from mmlm.train.optimizer import gather_parameters
from mmlm.train.run_guard import guard_run
from mmlm.train.saver import Saver
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
from mmlm.train.start import (
    Start,
    agree_on_start,
    checkpoint_root,
    load_assets,
    load_tokenizer,
)
from mmlm.train.stop import Stopper, StopRequested, remove_marker, write_marker
from mmlm.train.summary import describe_run, parameter_counts
from mmlm.train.train_step import train_step
from mmlm.train.watch import Watch


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
    if config.train.deterministic:
        make_deterministic()
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
    saver = Saver(
        checkpoint_root(config),
        config.checkpoint,
        assets=run.assets,
        group=topology.control_group,
        say=metrics.say,
        note_stall=metrics.note_stall,
    )
    watch = Watch(
        topology,
        timeout_minutes=config.parallel.timeout_minutes,
        first_iteration=run.start.iteration,
    )
    with watch, _loader(run) as loader:
        for iteration in range(run.start.iteration, run.train_iters):
            watch.at("data", iteration)
            waiting = time.perf_counter()
            plan, batches = loader.batches(iteration)
            waited = time.perf_counter() - waiting
            forward_step = watch.counting(_forward_step(run, iteration))
            watch.at("forward-backward", iteration)
            result = train_step(
                run.state.model,
                run.state.optimizer,
                run.state.scheduler,
                forward_step,
                batches,
                topology,
                begin_update=lambda: watch.at("optimizer", iteration),  # noqa: B023, called at once
            )
            watch.at("logging", iteration)
            nonfinite = nonfinite.after(is_finite=result.is_finite)
            metrics.log(plan, result, waited, stopper, nonfinite)
            if spikes is not None:
                spikes.look(plan, result.loss)
            if saver.finish_ready():
                metrics.restart_clock()
            watch.at("replay", iteration)
            bad_numbers.handle(plan, batches, forward_step, result, nonfinite)
            watch.at("saving", iteration)
            _save_and_evaluate(run, saver, metrics, iteration + 1, stopper, nonfinite, watch)
            if stopper.reason is not None:
                saver.close()
                metrics.say(
                    f"stopped after iteration {iteration + 1} of {run.train_iters} by "
                    f"{stopper.reason}; the same command continues"
                )
                _mark(config, topology, stopper.reason, iteration + 1, run.train_iters)
                break
        watch.at("closing", run.train_iters)
        saver.close()
    metrics.close()


def _loader(run: Run) -> BatchLoader:
    config = run.config
    return BatchLoader(
        run.dataset,
        run.planner,
        data_parallel_rank=run.topology.dp_rank,
        end_iteration=run.train_iters,
        seed=config.data_seed,
        with_pixels=run.decodes,
        num_workers=config.data.num_workers,
        prefetch_iterations=config.data.prefetch_iterations,
        pad_to_multiple_of=config.parallel.token_multiple,
        pin_memory=run.topology.device.type == "cuda",
    )


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
    start = agree_on_start(config, topology.control_group)
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
        seed=config.data_seed,
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
        seed=run.config.drop_path_seed,
        iteration=iteration,
        max_rate=run.config.train.vision_drop_path_rate,
        mode=run.config.train.vision_drop_path_mode,
    )
    return training_forward_step(run.start.model, run.topology, drop_path)


def _save_and_evaluate(
    run: Run,
    saver: Saver,
    metrics: MetricsLog,
    done: int,
    stopper: Stopper,
    nonfinite: NonfiniteCount,
    watch: Watch,
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
        _save(run, saver, metrics, done, stopper, nonfinite)
        saves = True
    if exports and (is_last or stopper.reason is None):
        watch.at("exporting", done - 1)
        _export(run, metrics, done, stopper)
    if evaluates and (is_last or stopper.reason is None):
        watch.at("evaluation", done - 1)
        _evaluate(run, metrics, done, stopper)
    if stopper.reason is not None and not saves:
        _save(run, saver, metrics, done, stopper, nonfinite)


def _save(
    run: Run,
    saver: Saver,
    metrics: MetricsLog,
    done: int,
    stopper: Stopper,
    nonfinite: NonfiniteCount,
) -> None:
    """Begin a save; one that nothing follows is complete on return. Collective."""
    config, state = run.config, run.state
    manifest = Manifest(
        iteration=done,
        consumed_samples=consumed_samples(done, config.train.global_batch_size),
        dtype=config.train.dtype,
        model=run.start.model,
        run_config=to_json(config),
        data=data_fingerprint(run.dataset),
        nonfinite_iterations=nonfinite.total,
        nonfinite_in_a_row=nonfinite.in_a_row,
        has_optimizer=True,
    )
    saver.save(
        manifest,
        lambda: training_state_dict(state.chunks, state.optimizer, run.topology, is_loading=False),
        is_last=done == run.train_iters or stopper.reason is not None,
    )
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
        save_total_limit=run.config.checkpoint.save_total_limit,
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
