"""The training loop."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mmlm.checkpoint.manifest import Manifest, iteration_name, iterations
from mmlm.config.load import to_json
from mmlm.config.schema import RunConfig
from mmlm.data.loader import BatchLoader
from mmlm.data.step_plan import consumed_samples
from mmlm.errors import MmlmError
from mmlm.log import get_logger
from mmlm.parallel.agreement import on_rank_zero
from mmlm.parallel.backend import Backend
from mmlm.parallel.topology import Topology
from mmlm.train.bad_numbers import BadNumbers
from mmlm.train.determinism import make_deterministic
from mmlm.train.evaluate import evaluate
from mmlm.train.forward_step import DropPath, ForwardStep, training_forward_step
from mmlm.train.hf_export import export_hf, remove_leftovers
from mmlm.train.metrics import MetricsLog
from mmlm.train.nonfinite_count import NonfiniteCount
from mmlm.train.optimizer import gather_parameters
from mmlm.train.prepare import Run, prepare
from mmlm.train.run_guard import guard_run
from mmlm.train.saver import Saver
from mmlm.train.setup import data_fingerprint, training_state_dict
from mmlm.train.spike_log import SpikeLog
from mmlm.train.start import checkpoint_root
from mmlm.train.stop import Stopper, StopRequested, remove_marker, write_marker
from mmlm.train.train_step import train_step
from mmlm.train.watch import Watch


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
            _make_up_export(run)
            return
        _iterate(run, stopper)


@dataclass(frozen=True, kw_only=True)
class _Aids:
    """What stands around the iterations."""

    metrics: MetricsLog
    saver: Saver
    stopper: Stopper
    bad_numbers: BadNumbers
    spikes: SpikeLog | None
    """On rank 0."""
    watch: Watch


def _aids(run: Run, stopper: Stopper) -> _Aids:
    config, topology = run.config, run.topology
    output_dir, done = Path(config.output_dir), run.start.iteration
    metrics = MetricsLog(output_dir, topology, start_iteration=done, train_iters=run.train_iters)
    metrics.log_ledger(run.dataset)
    return _Aids(
        metrics=metrics,
        saver=Saver(
            checkpoint_root(config),
            config.checkpoint,
            assets=run.assets,
            group=topology.control_group,
            say=metrics.say,
            note_stall=metrics.note_stall,
        ),
        stopper=stopper,
        bad_numbers=BadNumbers(
            model=run.state.model,
            sizes=run.start.model,
            dataset=run.dataset,
            topology=topology,
            output_dir=output_dir,
            limit=config.train.max_nonfinite_iterations,
        ),
        spikes=None
        if topology.rank
        else SpikeLog(
            output_dir,
            start_iteration=done,
            factor=config.train.loss_spike_factor,
            window=config.train.loss_spike_window,
        ),
        watch=Watch(
            topology, timeout_minutes=config.parallel.timeout_minutes, first_iteration=done
        ),
    )


def _iterate(run: Run, stopper: Stopper) -> None:
    """Train from the start to the end or to a stop; collective."""
    aids = _aids(run, stopper)
    watch, nonfinite = aids.watch, run.start.nonfinite
    with watch, _loader(run) as loader:
        for iteration in range(run.start.iteration, run.train_iters):
            watch.at("data", iteration)
            waiting = time.perf_counter()
            plan, batches = loader.batches(iteration)
            waited = time.perf_counter() - waiting
            watch.at("forward-backward", iteration)
            forward_step = watch.counting(_forward_step(run, iteration))
            result = train_step(
                run.state.model,
                run.state.optimizer,
                run.state.scheduler,
                forward_step,
                batches,
                run.topology,
                begin_update=partial(watch.at, "optimizer", iteration),
            )
            watch.at("logging", iteration)
            nonfinite = nonfinite.after(is_finite=result.is_finite)
            aids.metrics.log(plan, result, waited, stopper, nonfinite)
            if aids.spikes is not None:
                aids.spikes.look(plan, result.loss)
            watch.at("publishing", iteration)
            if aids.saver.finish_ready():
                aids.metrics.restart_clock()
            if not result.is_finite:
                aids.saver.settle()  # what follows may end the run
            watch.at("replay", iteration)
            aids.bad_numbers.handle(plan, batches, forward_step, result, nonfinite)
            watch.at("saving", iteration)
            _save_and_evaluate(run, aids, iteration + 1, nonfinite)
            if stopper.reason is not None:
                aids.saver.close()
                aids.metrics.say(
                    f"stopped after iteration {iteration + 1} of {run.train_iters} by "
                    f"{stopper.reason}; the same command continues"
                )
                _mark(run.config, run.topology, stopper.reason, iteration + 1, run.train_iters)
                break
        watch.at("closing", run.train_iters)
        aids.saver.close()
    aids.metrics.close()


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
            remove_leftovers(folder / "hf")

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


def _forward_step(run: Run, iteration: int) -> ForwardStep:
    drop_path = DropPath(
        seed=run.config.drop_path_seed,
        iteration=iteration,
        max_rate=run.config.train.vision_drop_path_rate,
        mode=run.config.train.vision_drop_path_mode,
    )
    return training_forward_step(run.start.model, run.topology, drop_path)


def _save_and_evaluate(run: Run, aids: _Aids, done: int, nonfinite: NonfiniteCount) -> None:
    """Do what is due after ``done`` iterations; collective.

    Once the run is asked to stop, it is saved and nothing else is begun, but for what belongs to
    the last iteration, which no resume would make up for.
    """
    config, stopper, is_last = run.config, aids.stopper, done == run.train_iters
    saves = _due(done, config.checkpoint.save_interval) or is_last
    interval = config.checkpoint.export_hf_interval
    exports = _due(done, interval) or (interval > 0 and is_last)
    evaluates = run.held_out is not None and _due(done, config.train.eval_interval)
    if saves or exports or evaluates or stopper.reason is not None:
        gather_parameters(run.state.model)
    if saves or stopper.reason is not None:
        _save(run, aids, done, nonfinite)
    if exports and (is_last or stopper.reason is None):
        aids.watch.at("exporting", done - 1)
        _export(run, aids, done)
    if evaluates and (is_last or stopper.reason is None):
        aids.watch.at("evaluation", done - 1)
        _evaluate(run, aids, done)
    # one that was due may have failed, and then it was not said that the run stops
    if stopper.reason is not None and not aids.saver.holds(done):
        _save(run, aids, done, nonfinite)


def _save(run: Run, aids: _Aids, done: int, nonfinite: NonfiniteCount) -> None:
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
    aids.saver.save(
        manifest,
        lambda: training_state_dict(state.chunks, state.optimizer, run.topology, is_loading=False),
        is_last=done == run.train_iters or aids.stopper.reason is not None,
    )
    aids.metrics.restart_clock()
    aids.stopper.agree(run.topology.control_group)


def _export(run: Run, aids: _Aids, done: int) -> None:
    """Export; only the last one must succeed. Collective."""
    try:
        folder = _export_folder(run, done)
    except MmlmError as error:  # all ranks have it
        if done == run.train_iters:
            raise
        if run.topology.rank == 0:
            get_logger().error(
                f"NOT EXPORTED after {done} iterations: {error}. The run goes on; "
                "megatron_to_hf.py makes the folder of a checkpoint"
            )
    else:
        aids.metrics.say(f"exported {folder}")
    aids.metrics.restart_clock()
    aids.stopper.agree(run.topology.control_group)


def _make_up_export(run: Run) -> None:
    """Export the weights of a run that is done, if it was killed before it could; collective."""
    done, config = run.start.iteration, run.config
    target = Path(config.output_dir) / "hf" / iteration_name(done)
    if not config.checkpoint.export_hf_interval or on_rank_zero(
        target.exists, run.topology.control_group
    ):
        return
    get_logger().info(f"{target} is missing: the run was ended before it was complete")
    gather_parameters(run.state.model)
    get_logger().info(f"exported {_export_folder(run, done)}")


def _export_folder(run: Run, done: int) -> Path:
    return export_hf(
        Path(run.config.output_dir) / "hf",
        done,
        run.state.chunks,
        run.start.model,
        run.assets,
        run.topology,
        save_total_limit=run.config.checkpoint.save_total_limit,
    )


def _evaluate(run: Run, aids: _Aids, done: int) -> None:
    assert run.held_out is not None
    try:
        report = evaluate(
            run.state.model,
            run.config,
            run.start.model,
            run.held_out,
            run.topology,
            with_pixels=run.decodes,
            stopper=aids.stopper if done < run.train_iters else None,
            counting=aids.watch.counting,
        )
    except StopRequested as stop:
        aids.metrics.say(f"the evaluation after {done} iterations is left unfinished: {stop}")
    else:
        aids.metrics.log_evaluation(done, report)
    aids.metrics.restart_clock()
    aids.stopper.agree(run.topology.control_group)


def _due(done: int, interval: int) -> bool:
    return interval > 0 and done % interval == 0
