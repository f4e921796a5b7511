"""Loss weights, schedule, clipping and AdamW of the reference, on cases worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.parity.reference_training import (
    ReferenceSample,
    average,
    clip_gradients,
    cosine_learning_rates,
    iteration_loss,
    token_losses,
    train,
)
from tests.parity.tiny_reference import CONTEXT, VOCAB, tiny_input, tiny_model

NO_PIXELS = torch.zeros(0, 3, 56, 56)
NO_IMAGES = torch.zeros(0, dtype=torch.int64)


def text_sample(ids: list[int], supervised: int) -> ReferenceSample:
    """The last `supervised` labels count; the last position has none."""
    labels = torch.tensor([*ids[1:], -100])
    labels[: len(ids) - 1 - supervised] = -100
    return ReferenceSample(
        input_ids=torch.tensor(ids), labels=labels, pixel_values=NO_PIXELS, image_ids=NO_IMAGES
    )


def image_sample() -> ReferenceSample:
    ids, pixels, image_ids = tiny_input()
    labels = torch.cat([ids[1:], torch.tensor([-100])])
    labels[labels == CONTEXT] = -100
    return ReferenceSample(input_ids=ids, labels=labels, pixel_values=pixels, image_ids=image_ids)


def samples() -> list[ReferenceSample]:
    return [text_sample([1, 5, 9, 2, 7], 1), image_sample(), text_sample([4, 4, 8, 30, 31], 4)]


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        ("token", (2 + 1 + 3 + 5 + 7) / 5),
        ("sample", (2 + 4) / 2),
        # sample 1: one token of weight 1; sample 2: four tokens of weight 1/2
        ("square", (2 * 1 + (1 + 3 + 5 + 7) / 2) / (1 + 4 / 2)),
    ],
)
def test_average_by_hand(weight: str, expected: float) -> None:
    losses = [torch.tensor([2.0]), torch.tensor([]), torch.tensor([1.0, 3.0, 5.0, 7.0])]
    assert average(losses, weight).item() == pytest.approx(expected)


def test_nothing_supervised_is_zero_and_not_nan() -> None:
    model = tiny_model()
    loss = iteration_loss(model, [text_sample([1, 2, 3], 0)], img_context_token_id=CONTEXT)
    loss.backward()
    assert loss.item() == 0


def test_unknown_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="must be token, sample, square or micro_batch_mean"):
        average([torch.ones(1)], "median")


def test_token_losses_are_minus_log_probabilities() -> None:
    model = tiny_model()
    sample = image_sample()
    logits = model(sample.input_ids, sample.pixel_values, sample.image_ids, CONTEXT)
    expected = [
        -math.log(logits[i].double().softmax(-1)[label].item())
        for i, label in enumerate(sample.labels.tolist())
        if label != -100
    ]
    assert token_losses(model, sample, CONTEXT).tolist() == pytest.approx(expected, rel=1e-5)
    assert len(expected) == 6
    assert logits.shape[1] == VOCAB


def test_iteration_loss_joins_them() -> None:
    model = tiny_model()
    each = [token_losses(model, sample, CONTEXT) for sample in samples()]
    for weight in ("token", "sample", "square"):
        loss = iteration_loss(model, samples(), weight, img_context_token_id=CONTEXT)
        assert loss.item() == average(each, weight).item()


def test_cosine_schedule() -> None:
    rates = cosine_learning_rates(1e-5, 100)
    assert rates[:4] == pytest.approx([0, 1e-5 / 3, 2e-5 / 3, 1e-5])
    assert rates[50] == pytest.approx(0.5e-5 * (1 + math.cos(math.pi * 47 / 97)))
    assert 0 < rates[-1] < 1e-8
    assert cosine_learning_rates(1.0, 2, warmup_fraction=0) == pytest.approx([1, 0.5])
    # the published run: ceil(0.03 * 2477) = 75 iterations of warm-up
    published = cosine_learning_rates(1e-5, 2477)
    assert published[75] == 1e-5
    assert published[74] < 1e-5 > published[76]


def test_clip() -> None:
    large = [torch.tensor([3.0]), torch.tensor([[4.0]])]
    assert clip_gradients(large, 1.0) == 5
    assert large[0].item() == pytest.approx(3 / (5 + 1e-6))
    small = [torch.tensor([0.3, 0.4])]
    assert clip_gradients(small, 1.0) == pytest.approx(0.5)
    assert torch.equal(small[0], torch.tensor([0.3, 0.4]))


def adamw_by_hand(
    start: Tensor, gradients: list[Tensor], rates: list[float], decay: float
) -> Tensor:
    weight, first, second = start.double(), torch.zeros(()), torch.zeros(())
    for step, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        first = 0.9 * first + 0.1 * gradient.double()
        second = 0.999 * second + 0.001 * gradient.double() ** 2
        root = (second / (1 - 0.999**step)).sqrt()
        update = (first / (1 - 0.9**step)) / (root + 1e-8)
        weight = weight * (1 - rate * decay) - rate * update
    return weight


def test_train_is_adamw_with_clipped_gradients() -> None:
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    model = tiny_model(torch.float64)
    gradients, norms = [], []
    shadow = tiny_model(torch.float64)
    rates = [0.0, 1e-3, 5e-4]
    for step in range(3):
        # the gradient of each step is taken where a run of `step` iterations ended
        shadow = tiny_model(torch.float64)
        train(shadow, [samples()] * step, rates[:step], img_context_token_id=CONTEXT)
        shadow.zero_grad()
        iteration_loss(shadow, samples(), img_context_token_id=CONTEXT).backward()
        grads = {n: p.grad for n, p in shadow.named_parameters() if p.grad is not None}
        norm = math.sqrt(sum(g.square().sum().item() for g in grads.values()))
        norms.append(norm)
        gradients.append(grads[name] * (1 / (norm + 1e-6) if norm > 1 else 1))
    start = model.state_dict()[name].clone()
    run = train(model, [samples()] * 3, rates, img_context_token_id=CONTEXT)
    assert run.grad_norms == pytest.approx(norms)
    assert min(norms) > 1
    torch.testing.assert_close(run.weights[name], adamw_by_hand(start, gradients, rates, 0.05))
    assert run.losses[0] == run.losses[1] > run.losses[2]  # the first rate is 0
    assert run.learning_rates == rates


def test_unreached_parameters_decay_and_frozen_ones_do_not() -> None:
    model = tiny_model()
    for parameter in model.mlp1.parameters():
        parameter.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run = train(
        model,
        [[text_sample([1, 5, 9, 2, 7], 3)]],
        [0.1],
        img_context_token_id=CONTEXT,
        weight_decay=lambda name: 0.0 if name.endswith("ls1") else 0.5,
    )
    for name, tensor in before.items():
        if name.startswith("mlp1.") or name.endswith("ls1"):
            assert torch.equal(run.weights[name], tensor), name
        elif name.startswith("vision_model."):
            torch.testing.assert_close(run.weights[name], tensor * 0.95)
        else:
            assert not torch.equal(run.weights[name], tensor), name


def test_drop_path_follows_the_iteration() -> None:
    asked: list[int] = []

    def drop_path(iteration: int) -> None:
        asked.append(iteration)

    train(
        tiny_model(), [samples()] * 2, [0.0, 0.0], img_context_token_id=CONTEXT, drop_path=drop_path
    )
    assert asked == [0, 1]
