"""Everything that a training needs, put together before its first iteration."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from mmlm.config.load import write_resolved
from mmlm.config.schema import RunConfig
from mmlm.data.dataset import Dataset
from mmlm.data.ledger import LEDGER_FILE
from mmlm.data.packing import packing_cost
from mmlm.data.planners import TrainPlanner
from mmlm.log import get_logger
from mmlm.parallel.agreement import on_rank_zero
from mmlm.parallel.backend import Backend
from mmlm.parallel.topology import Topology
from mmlm.train.setup import (
    TrainingState,
    build_training,
    check_data,
    open_data,
    refuse_other_data,
    train_iterations,
)
from mmlm.train.start import Start, agree_on_start, load_assets, load_tokenizer
from mmlm.train.stop import Stopper
from mmlm.train.summary import describe_run, parameter_counts


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
