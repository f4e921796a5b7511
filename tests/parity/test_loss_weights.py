"""The four loss weights against their definitions, with numbers of labels that are all different.

Samples have 1 to 11 supervised tokens, so microbatches and DP ranks have uneven shares. Errors are
relative. Measured over the cases below (fp32, two x86 cores): loss 1.7e-7, gradients 2.0e-6.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from mmlm.config.schema import OptimizerConfig, TrainConfig
from mmlm.data.sample import IGNORE, Sample
from mmlm.data.step_plan import samples_of
from tests.distributed.launch import run_ranks
from tests.parity.parallel_run import Layout, ParallelRun, make_samples, train_parallel
from tests.parity.planted_faults import loss_divided_by_each_rank
from tests.parity.reference_training import ReferenceSample, token_losses
from tests.parity.scenario import worst
from tests.parity.tiny_reference import CONTEXT, tiny_config, tiny_model

LOSS_TOLERANCE = 1e-6
GRADIENT_TOLERANCE = 1e-5

NUM_SAMPLES, GLOBAL_BATCH_SIZE, GROUP_SIZE, SEED = 8, 6, 4, 2
TWO_RANKS = Layout(dp=2, micro_batch_size=2)
UNPACKED = Layout(pp=2, dp=2, packed=False)


def _groups(losses: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    return [losses[start : start + GROUP_SIZE] for start in range(0, len(losses), GROUP_SIZE)]


DEFINITIONS: dict[str, Callable[[Sequence[Tensor]], Tensor]] = {
    "token": lambda losses: torch.cat(list(losses)).mean(),
    "sample": lambda losses: torch.stack([each.mean() for each in losses]).mean(),
    "square": lambda losses: (
        torch.stack([each.sum() / math.sqrt(len(each)) for each in losses]).sum()
        / sum(math.sqrt(len(each)) for each in losses)
    ),
    "micro_batch_mean": lambda losses: torch.stack(
        [torch.cat(list(group)).mean() for group in _groups(losses)]
    ).mean(),
}


@cache
def samples() -> list[Sample]:
    """Conversations whose supervised tokens are everything but images, then fewer and fewer."""
    uneven = []
    for number, sample in enumerate(make_samples(NUM_SAMPLES, CONTEXT)):
        labels = np.append(sample.input_ids[1:], IGNORE)
        labels[labels == CONTEXT] = IGNORE
        (places,) = np.nonzero(labels != IGNORE)
        labels[places[1 + 5 * number % 12 :]] = IGNORE
        uneven.append(replace(sample, labels=labels))
    return uneven


@cache
def truth(weight: str) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the first iteration by definition."""
    model = tiny_model()
    _, places = samples_of(NUM_SAMPLES, seed=SEED, iteration=0, global_batch_size=GLOBAL_BATCH_SIZE)
    losses = [
        token_losses(
            model,
            ReferenceSample(
                input_ids=torch.from_numpy(sample.input_ids),
                labels=torch.from_numpy(sample.labels),
                pixel_values=torch.from_numpy(sample.pixel_values),
                image_ids=torch.from_numpy(sample.image_ids),
            ),
            CONTEXT,
        )
        for sample in (samples()[place] for place in places)
    ]
    loss = DEFINITIONS[weight](losses)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


def run(weight: str, layout: Layout) -> ParallelRun:
    """The first iteration of the parallel model."""
    train = TrainConfig(
        global_batch_size=GLOBAL_BATCH_SIZE,
        dtype="fp32",
        vision_drop_path_rate=0.0,
        loss_weight=weight,
        loss_group_size=GROUP_SIZE,
        seed=SEED,
    )
    return run_ranks(
        layout.world_size,
        train_parallel,
        layout,
        tiny_config(),
        dict(tiny_model().state_dict()),
        samples(),
        train,
        OptimizerConfig(),
        0,
    )[0]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("weight", "layout"),
    [
        *((weight, TWO_RANKS) for weight in DEFINITIONS),
        ("square", UNPACKED),
        ("micro_batch_mean", UNPACKED),
    ],
    ids=str,
)
def test_a_weight_is_its_definition(weight: str, layout: Layout) -> None:
    (loss, gradients), found = truth(weight), run(weight, layout)
    assert found.losses == pytest.approx([loss], rel=LOSS_TOLERANCE)
    assert worst(found.gradients, gradients)[0] < GRADIENT_TOLERANCE


def test_the_definitions_differ() -> None:
    counts = [int((sample.labels != IGNORE).sum()) for sample in samples()]
    assert len(set(counts)) == NUM_SAMPLES, counts
    losses = sorted(truth(weight)[0] for weight in DEFINITIONS)
    gaps = [later - earlier for earlier, later in pairwise(losses)]
    assert min(gaps) > 1e3 * LOSS_TOLERANCE * losses[-1], losses


@pytest.mark.distributed
def test_a_mean_of_each_rank_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault of many trainers: every DP rank divides by its own number of labels."""
    loss_divided_by_each_rank(monkeypatch)
    (loss, gradients), found = truth("token"), run("token", TWO_RANKS)
    assert abs(found.losses[0] - loss) > 1e3 * LOSS_TOLERANCE * loss
    assert worst(found.gradients, gradients)[0] > 1e3 * GRADIENT_TOLERANCE
