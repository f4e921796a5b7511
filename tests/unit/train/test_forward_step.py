"""A microbatch through the step functions with a stand-in for the model: weights, scores."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mmlm.config.presets import tiny
from mmlm.config.schema import ParallelConfig
from mmlm.data.collate import Batch, collate
from mmlm.data.sample import Sample
from mmlm.layers.drop_path import drop_path_scales
from mmlm.models.internvl_model import ModelInputs
from mmlm.parallel import topology
from mmlm.train.forward_step import (
    DropPath,
    SampleScore,
    evaluation_forward_step,
    label_positions,
    make_inputs,
    share_pixels,
    training_forward_step,
)
from tests.distributed.launch import run_ranks

ALONE: Any = SimpleNamespace(device=torch.device("cpu"), tp_rank=0, tp_size=1)
DROP = DropPath(seed=4, iteration=6, max_rate=0.9)
VOCAB = 12


def sample(
    sample_id: int, labels: list[int], num_images: int = 0, *, pixels: bool = True
) -> Sample:
    """A sample with these shifted labels; image tokens come first, pixels are 100 x id + slot."""
    numbers = 100 * sample_id + np.arange(num_images, dtype=np.float32)
    return Sample(
        sample_id=sample_id,
        input_ids=np.arange(len(labels)) % VOCAB,
        labels=np.array(labels),
        image_positions=np.arange(4 * num_images),
        image_ids=64 * sample_id + np.arange(num_images),
        pixel_values=numbers[:, None, None, None] + noise(num_images) if pixels else None,
    )


def noise(num_images: int) -> np.ndarray:
    """Different in every pixel, the same in every process."""
    generator = np.random.default_rng(7)
    return generator.random((num_images, 3, 56, 56), dtype=np.float32)


def make_batch(*rows: list[Sample], pixels: bool = True) -> Batch:
    """Samples weigh 0.1 x their id a token."""
    return collate(
        rows,
        {n: 0.1 * n for n in range(10)},
        image_size=56,
        pad_to_multiple_of=8,
        with_pixels=pixels,
    )


def two_samples(*, pixels: bool = True, num_images: int = 1) -> Batch:
    """Sample 3 has two answers, sample 5 an image and one answer; padding follows."""
    first = sample(3, [-100, 4, 5, -100, 7, -100], pixels=pixels)
    second = sample(5, [-100, -100, -100, -100, -100, 9, 2], num_images, pixels=pixels)
    return make_batch([first, second], pixels=pixels)


def logits_for(wanted: dict[int, int]) -> Callable[[ModelInputs], Tensor]:
    """A first stage that finds ``wanted[position]`` most likely and is otherwise unsure."""

    def chunk(inputs: ModelInputs) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        logits = torch.rand(len(inputs.label_positions), VOCAB, generator=generator)
        for row, position in enumerate(inputs.label_positions.tolist()):
            logits[row, wanted[position]] += 2.0
        return logits.unsqueeze(1).requires_grad_().clone()

    chunk.pre_process = True  # type: ignore[attr-defined]
    chunk.config = SimpleNamespace(sequence_parallel=False)  # type: ignore[attr-defined]
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
    batch = two_samples()
    inputs = make_inputs(batch, tiny(), ALONE, needs_pixels=True, drop_path=DROP)
    assert inputs.segments.segment_lengths == (6, 7, 3)
    assert inputs.label_positions.tolist() == POSITIONS
    assert inputs.image_positions.tolist() == [6, 7, 8, 9]
    assert inputs.images.image_ids == (320,) and inputs.images.segment_lengths == (17,)
    assert inputs.position_ids.tolist() == [*range(6), *range(7), *range(3)]
    assert torch.equal(inputs.input_ids, batch.input_ids)
    assert torch.equal(inputs.pixel_values, batch.pixel_values)


@pytest.mark.parametrize("num_images", [0, 1, 3])
def test_drop_path_is_drawn_once_for_the_whole_tower(num_images: int) -> None:
    """For the images' global ids, which other stages and ranks know as well."""
    inputs = make_inputs(
        two_samples(num_images=num_images), tiny(), ALONE, needs_pixels=True, drop_path=DROP
    )
    expected = drop_path_scales(
        seed=4,
        iteration=6,
        image_ids=[320 + slot for slot in range(num_images)],
        num_layers=3,
        max_rate=0.9,
    )
    assert inputs.images.drop_path_scales is not None
    assert inputs.images.drop_path_scales.shape == (3, 2, num_images)
    assert np.array_equal(inputs.images.drop_path_scales.numpy(), expected)


@pytest.mark.parametrize("drop_path", [None, DropPath(seed=4, iteration=6, max_rate=0.0)])
def test_without_a_rate_nothing_is_dropped(drop_path: DropPath | None) -> None:
    inputs = make_inputs(two_samples(), tiny(), ALONE, needs_pixels=True, drop_path=drop_path)
    assert inputs.images.drop_path_scales is None


def test_later_stages_need_no_pixels() -> None:
    """Everything else is the same for all stages."""
    batch = two_samples(pixels=False)
    assert batch.pixel_values is None
    later = make_inputs(batch, tiny(), ALONE, needs_pixels=False, drop_path=DROP)
    assert later.pixel_values is None
    first = make_inputs(two_samples(), tiny(), ALONE, needs_pixels=True, drop_path=DROP)
    assert later.images.image_ids == first.images.image_ids
    assert torch.equal(later.images.drop_path_scales, first.images.drop_path_scales)
    assert torch.equal(later.image_positions, first.image_positions)


def test_microbatch_without_labels_still_has_a_row_of_logits() -> None:
    inputs = make_inputs(make_batch([]), tiny(), ALONE, needs_pixels=True, drop_path=DROP)
    assert inputs.label_positions.tolist() == [0]
    assert inputs.images.image_ids == () and inputs.image_positions.numel() == 0
    assert inputs.pixel_values.shape == (0, 3, 56, 56)


def test_logits_are_wanted_where_there_is_weight() -> None:
    assert label_positions(two_samples()).tolist() == POSITIONS
    empty = label_positions(make_batch([]))
    assert empty.tolist() == [0] and empty.dtype == torch.int64


def _shared(num_images: int) -> tuple[bool, Tensor, Tensor]:
    place = topology.initialize(ParallelConfig(tensor_model_parallel_size=2))
    # what the loaders give: one TP rank of each replica has decoded, and replicas differ
    pixels = place.tp_rank == 0
    samples = [sample(5 + place.dp_rank, [-100] * 4 * num_images + [9], num_images, pixels=pixels)]
    batch = make_batch(samples, pixels=pixels)
    shared = share_pixels(batch, tiny(), place)
    inputs = make_inputs(batch, tiny(), place, needs_pixels=True)
    dist.barrier()
    return batch.pixel_values is None, shared, inputs.pixel_values


@pytest.mark.distributed
@pytest.mark.parametrize("num_images", [0, 2])
def test_all_tp_ranks_get_the_pixels_of_the_first(num_images: int) -> None:
    """At TP 2 x DP 2: exactly those of their own replica, although they have decoded nothing."""
    for rank, (decoded_nothing, shared, of_inputs) in enumerate(run_ranks(4, _shared, num_images)):
        assert decoded_nothing == (rank % 2 == 1)
        numbers = 100.0 * (5 + rank // 2) + torch.arange(num_images)
        expected = numbers.view(-1, 1, 1, 1) + torch.from_numpy(noise(num_images))
        assert shared.shape == (num_images, 3, 56, 56) and shared.dtype == torch.float32
        assert torch.equal(shared, expected)
        assert torch.equal(of_inputs, expected)


def _train() -> tuple[float, float, float]:
    place = topology.initialize(ParallelConfig())
    step = training_forward_step(tiny(), place, DROP)
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

    chunk.pre_process = True  # type: ignore[attr-defined]
    chunk.config = SimpleNamespace(sequence_parallel=False)  # type: ignore[attr-defined]
    logits, judge = step(iter([two_samples()]), chunk)
    assert seen[0].images.drop_path_scales is None, "drop path is off"
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
