"""A microbatch through the step functions with a stand-in for the model: weights, scores."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from mmlm.config.presets import tiny
from mmlm.config.schema import ParallelConfig
from mmlm.data.collate import Batch, collate
from mmlm.data.sample import Sample
from mmlm.models.internvl_model import ModelInputs
from mmlm.parallel import topology
from mmlm.train.forward_step import (
    SampleScore,
    evaluation_forward_step,
    make_inputs,
    training_forward_step,
)
from tests.distributed.launch import run_ranks

CPU = torch.device("cpu")
VOCAB = 12


def sample(sample_id: int, labels: list[int], num_images: int = 0) -> Sample:
    """A sample with these shifted labels; image tokens come first."""
    return Sample(
        sample_id=sample_id,
        input_ids=np.arange(len(labels)) % VOCAB,
        labels=np.array(labels),
        image_positions=np.arange(4 * num_images),
        image_ids=64 * sample_id + np.arange(num_images),
        pixel_values=np.zeros((num_images, 3, 56, 56), np.float32),
    )


def make_batch(*rows: list[Sample]) -> Batch:
    """Samples weigh 0.1 x their id a token."""
    return collate(rows, {n: 0.1 * n for n in range(10)}, image_size=56, pad_to_multiple_of=8)


def two_samples() -> Batch:
    """Sample 3 has two answers, sample 5 an image and one answer; padding follows."""
    first = sample(3, [-100, 4, 5, -100, 7, -100])
    second = sample(5, [-100, -100, -100, -100, -100, 9, 2], num_images=1)
    return make_batch([first, second])


def logits_for(wanted: dict[int, int]) -> Callable[[ModelInputs], Tensor]:
    """A model that finds ``wanted[position]`` most likely and is otherwise unsure."""

    def chunk(inputs: ModelInputs) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        logits = torch.rand(len(inputs.label_positions), VOCAB, generator=generator)
        for row, position in enumerate(inputs.label_positions.tolist()):
            logits[row, wanted[position]] += 2.0
        return logits.unsqueeze(1).requires_grad_().clone()

    return chunk


RIGHT = {1: 4, 2: 5, 4: 7, 11: 9, 12: 2}
POSITIONS = list(RIGHT)


def plain_losses(wanted: dict[int, int]) -> Tensor:
    """Cross entropy of each supervised position."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.rand(len(POSITIONS), VOCAB, generator=generator)
    for row, position in enumerate(POSITIONS):
        logits[row, wanted[position]] += 2.0
    labels = torch.tensor(list(RIGHT.values()))
    return logits.logsumexp(dim=1) - logits[torch.arange(len(labels)), labels]


def test_inputs_describe_the_microbatch() -> None:
    inputs = make_inputs(two_samples(), tiny(), CPU, seed=4, iteration=6)
    assert inputs.segments.segment_lengths == (6, 7, 3)
    assert inputs.label_positions.tolist() == POSITIONS
    assert inputs.image_positions.tolist() == [6, 7, 8, 9]
    assert inputs.images.image_ids == (320,) and inputs.images.segment_lengths == (17,)
    assert (inputs.images.seed, inputs.images.iteration) == (4, 6)
    assert inputs.position_ids.tolist() == [*range(6), *range(7), *range(3)]


def test_microbatch_without_labels_still_has_a_row_of_logits() -> None:
    inputs = make_inputs(make_batch([]), tiny(), CPU, seed=0, iteration=0)
    assert inputs.label_positions.tolist() == [0]
    assert inputs.images.image_ids == () and inputs.image_positions.numel() == 0


def _train() -> tuple[float, float, float]:
    topology.initialize(ParallelConfig())
    step = training_forward_step(tiny(), CPU, seed=0, iteration=0)
    logits, loss_function = step(iter([two_samples()]), logits_for(RIGHT))
    loss, count, report = loss_function(logits)
    assert count.dtype == torch.int32 and not report["loss"].requires_grad
    logits, loss_function = step(iter([make_batch([])]), logits_for({0: 1}))
    leaf = logits.detach().requires_grad_()
    empty, _, _ = loss_function(leaf.clone())
    empty.backward()
    return float(loss), float(report["loss"]), float(empty) + float(leaf.grad.abs().sum())


@pytest.mark.distributed
def test_training_loss_is_the_weighted_sum() -> None:
    """And a microbatch without labels has loss and gradient 0, never NaN."""
    ((loss, reported, empty),) = run_ranks(1, _train)
    losses = plain_losses(RIGHT)
    expected = 0.3 * float(losses[:3].sum()) + 0.5 * float(losses[3:].sum())
    assert loss == reported == pytest.approx(expected, abs=1e-6)  # measured 5e-8
    assert empty == 0.0


@torch.no_grad()
def _evaluate(wanted: dict[int, int]) -> list[SampleScore]:
    place = topology.initialize(ParallelConfig())
    step = evaluation_forward_step(tiny(), place)
    seen: list[ModelInputs] = []

    def chunk(inputs: ModelInputs) -> Tensor:
        seen.append(inputs)
        return logits_for(wanted)(inputs)

    logits, judge = step(iter([two_samples()]), chunk)
    assert seen[0].images.iteration is None, "drop path is off"
    return judge(logits)[2]["samples"]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("changed", "answers"),
    [
        ({}, ((True, True), (True,))),
        ({2: 6}, ((False, True), (True,))),  # the second token of the first answer
        ({4: 0, 12: 0}, ((True, False), (False,))),
    ],
)
def test_evaluation_judges_answer_by_answer(
    changed: dict[int, int], answers: tuple[tuple[bool, ...], ...]
) -> None:
    wanted = RIGHT | changed
    (scores,) = run_ranks(1, _evaluate, wanted)
    losses = plain_losses(wanted)
    assert [score.sample_id for score in scores] == [3, 5]
    assert [score.num_tokens for score in scores] == [3, 2]
    assert tuple(score.answers for score in scores) == answers
    for score, expected in zip(scores, (losses[:3].sum(), losses[3:].sum()), strict=True):
        assert score.loss == pytest.approx(float(expected), abs=1e-5)  # measured 2.4e-7
