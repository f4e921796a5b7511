"""Loss and exact match of the assistant's answers on a held-out split."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from tqdm import tqdm

from mmlm.config.model import ModelConfig
from mmlm.config.schema import RunConfig
from mmlm.data.dataset import Dataset
from mmlm.data.loader import BatchLoader
from mmlm.data.packing import packing_cost
from mmlm.data.planners import EvaluationPlanner
from mmlm.models.internvl_model import InternVLModel
from mmlm.parallel.topology import Topology
from mmlm.train.forward_step import ForwardStep, SampleScore, evaluation_forward_step
from mmlm.train.stop import Stopper
from mmlm.train.train_step import run_schedule


@torch.no_grad()
def evaluate(
    model: Sequence[DistributedDataParallel | InternVLModel],
    config: RunConfig,
    sizes: ModelConfig,
    dataset: Dataset,
    topology: Topology,
    *,
    with_pixels: bool,
    stopper: Stopper | None = None,
    counting: Callable[[ForwardStep], ForwardStep] | None = None,
) -> dict[str, Any]:
    """Judge every sample of a split once, without drop path; collective.

    Args:
        model: this rank's chunks, wrapped or not; they are left in training mode.
        config: of the run; batch sizes and lengths are used.
        sizes: of the model.
        dataset: the split.
        topology: this rank's place.
        with_pixels: whether images enter the model on this rank.
        stopper: what may end it early; asked before each batch.
        counting: wraps the forward step, so that a watch sees that it moves on.

    Returns:
        On rank 0 ``{"total": scores, "sets": {name: scores}}`` with ``loss`` (mean over supervised
        tokens), ``exact_match`` (share of answers whose every token is the most likely one),
        ``num_samples``, ``num_answers``, ``num_tokens``; empty on the others.

    Raises:
        StopRequested: on every rank, if `stopper` says so.
    """
    planner = EvaluationPlanner(
        table=dataset.table,
        global_batch_size=config.train.global_batch_size,
        seq_length=config.data.seq_length,
        micro_batch_size=config.train.micro_batch_size,
        data_parallel_size=topology.dp_size,
        microbatch_multiple=config.parallel.microbatch_multiple,
        cost=packing_cost(sizes),
    )
    step: ForwardStep = evaluation_forward_step(sizes, topology)
    if counting is not None:
        step = counting(step)
    scores: list[SampleScore] = []
    with (
        _left_in_training(model),
        BatchLoader(
            dataset,
            planner,
            data_parallel_rank=topology.dp_rank,
            end_iteration=planner.num_iterations,
            with_pixels=with_pixels,
            num_workers=config.data.num_workers,
            prefetch_iterations=config.data.prefetch_iterations,
            pad_to_multiple_of=config.parallel.token_multiple,
        ) as loader,
    ):
        rounds = range(planner.num_iterations)
        for iteration in tqdm(rounds, desc="evaluate", unit="it", disable=topology.rank > 0):
            if stopper is not None:
                stopper.raise_if_agreed(topology.control_group)
            _, batches = loader.batches(iteration)
            for report in run_schedule(model, step, batches, forward_only=True):
                scores += report["samples"]
    return _report(dataset, scores if topology.tp_rank == 0 else [])


@contextmanager
def _left_in_training(model: Sequence[torch.nn.Module]) -> Iterator[None]:
    for chunk in model:
        chunk.eval()
    try:
        yield
    finally:
        for chunk in model:
            chunk.train()


def _report(dataset: Dataset, scores: list[SampleScore]) -> dict[str, Any]:
    everything: list[list[SampleScore]] = [[] for _ in range(dist.get_world_size())]
    dist.gather_object(scores, everything if dist.get_rank() == 0 else None, dst=0)
    if dist.get_rank():
        return {}
    by_set: dict[str, list[SampleScore]] = defaultdict(list)
    flat = sorted((s for of_rank in everything for s in of_rank), key=lambda s: s.sample_id)
    for score in flat:
        by_set[dataset.annotation_set(score.sample_id).name].append(score)
    return {
        "total": _summary(flat),
        "sets": {name: _summary(of_set) for name, of_set in by_set.items()},
    }


def _summary(scores: list[SampleScore]) -> dict[str, Any]:
    answers = [right for score in scores for right in score.answers]
    num_tokens = sum(score.num_tokens for score in scores)
    return {
        "loss": sum(score.loss for score in scores) / num_tokens,
        "exact_match": sum(answers) / len(answers),
        "num_samples": len(scores),
        "num_answers": len(answers),
        "num_tokens": num_tokens,
    }
