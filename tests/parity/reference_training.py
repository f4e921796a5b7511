"""The published loss, schedule, clipping and optimizer in plain PyTorch, for one process.

Each loss is written as its definition reads: one cross entropy a token, then the average asked for.
Nothing here knows of microbatches, ranks or packs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional

from tests.parity.reference_model import DropPath, ReferenceInternVL

IGNORED = -100


class SampleLike(Protocol):
    """What the reference reads of a sample; the samples of `mmlm.data` qualify."""

    @property
    def input_ids(self) -> Tensor:
        """int64 `[n]`."""
        ...

    @property
    def labels(self) -> Tensor:
        """int64 `[n]`, already shifted: the token that follows, or -100."""
        ...

    @property
    def pixel_values(self) -> Tensor:
        """float32 `[k, 3, S, S]`."""
        ...

    @property
    def image_ids(self) -> Tensor | Sequence[int]:
        """k image ids."""
        ...


@dataclass(frozen=True, kw_only=True)
class ReferenceSample:
    """A sample made by hand; fields as in `SampleLike`."""

    input_ids: Tensor
    labels: Tensor
    pixel_values: Tensor
    image_ids: Tensor


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """What `train` saw: one entry an iteration, and the weights it ended with."""

    losses: list[float]
    grad_norms: list[float]
    learning_rates: list[float]
    weights: dict[str, Tensor]


def token_losses(
    model: ReferenceInternVL,
    sample: SampleLike,
    img_context_token_id: int,
    drop_path: DropPath | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """Cross entropies, fp32, of the supervised tokens of one sample: `[supervised tokens]`.

    `compute_dtype` runs the model on weights cast to it, as mixed precision does; the gradients of
    the samples then add up in the weights' own dtype.
    """
    dtype = compute_dtype or model.language_model.lm_head.weight.dtype
    logits = functional_call(
        model,
        {name: tensor.to(dtype) for name, tensor in model.named_parameters()},
        (
            sample.input_ids,
            sample.pixel_values.to(dtype),
            torch.as_tensor(sample.image_ids, dtype=torch.int64),
            img_context_token_id,
            drop_path,
        ),
    )
    supervised = sample.labels != IGNORED
    wide = logits[supervised].to(torch.promote_types(dtype, torch.float32))
    return functional.cross_entropy(wide, sample.labels[supervised], reduction="none")


def average(losses: Sequence[Tensor], weight: str, group_size: int = 8) -> Tensor:
    """The loss of an iteration from the token losses of each of its samples.

    Args:
        losses: one `[supervised tokens]` a sample; samples without any take no part.
        weight: "token": mean over all supervised tokens; "sample": mean over the samples of their
            means; "square": every token of a sample with m supervised tokens weighs 1 / sqrt(m),
            divided by the sum of all these weights; "micro_batch_mean": the published trainer's
            own, mean over groups of samples, in order, of the mean over the tokens of a group.
        group_size: samples in a group of "micro_batch_mean".

    Returns:
        The loss, a scalar; 0 where nothing is supervised.
    """
    supervised = [each for each in losses if len(each)]
    if not supervised:
        return torch.stack([each.sum() for each in losses]).sum()
    if weight == "token":
        return torch.cat(supervised).mean()
    if weight == "sample":
        return torch.stack([each.mean() for each in supervised]).mean()
    if weight == "square":
        weighted = torch.stack([each.sum() / math.sqrt(len(each)) for each in supervised]).sum()
        return weighted / sum(len(each) / math.sqrt(len(each)) for each in supervised)
    if weight == "micro_batch_mean":
        starts = range(0, len(losses), group_size)
        groups = [torch.cat(list(losses[start : start + group_size])) for start in starts]
        return torch.stack([group.mean() for group in groups]).mean()
    raise ValueError(f"loss weight '{weight}' must be token, sample, square or micro_batch_mean")


def iteration_loss(
    model: ReferenceInternVL,
    samples: Sequence[SampleLike],
    weight: str = "token",
    *,
    img_context_token_id: int,
    drop_path: DropPath | None = None,
    compute_dtype: torch.dtype | None = None,
    group_size: int = 8,
) -> Tensor:
    """The loss of one global batch; see `average` for the weights."""
    losses = [
        token_losses(model, each, img_context_token_id, drop_path, compute_dtype)
        for each in samples
    ]
    return average(losses, weight, group_size)


def cosine_learning_rates(
    peak: float, train_iters: int, warmup_fraction: float = 0.03
) -> list[float]:
    """The rate of every iteration: k / warm-up of the peak, then half a cosine down to 0.

    The first iteration has rate 0 (where there is a warm-up), the last a rate above 0.
    """
    warmup = math.ceil(warmup_fraction * train_iters)
    rates = []
    for k in range(train_iters):
        if k < warmup:
            rates.append(peak * k / warmup)
        else:
            progress = (k - warmup) / max(1, train_iters - warmup)
            rates.append(peak * 0.5 * (1 + math.cos(math.pi * progress)))
    return rates


def clip_gradients(gradients: Sequence[Tensor], limit: float) -> float:
    """Scales the gradients in place where their global norm exceeds `limit`; returns that norm."""
    norm = math.sqrt(sum(float(each.double().square().sum()) for each in gradients))
    if norm > limit:
        for each in gradients:
            each.mul_(limit / (norm + 1e-6))
    return norm


def train(
    model: ReferenceInternVL,
    iterations: Sequence[Sequence[SampleLike]],
    learning_rates: Sequence[float],
    *,
    img_context_token_id: int,
    weight: str = "token",
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float | Callable[[str], float] = 0.05,
    clip: float = 1.0,
    drop_path: Callable[[int], DropPath | None] | None = None,
    compute_dtype: torch.dtype | None = None,
    group_size: int = 8,
) -> TrainingRun:
    """Trains `model` in place with `torch.optim.AdamW`, one optimizer step an iteration.

    A parameter that an iteration does not reach (a vision tower without images) has gradient 0
    there, not none: it decays and its moments fade, as under any flat gradient buffer.

    Args:
        model: parameters with `requires_grad` false are frozen: no update, no part in the norm.
        iterations: the samples of each global batch.
        learning_rates: one an iteration; see `cosine_learning_rates`.
        img_context_token_id: see `ReferenceInternVL.forward`.
        weight: see `average`.
        betas: of AdamW.
        eps: of AdamW, outside the root.
        weight_decay: decoupled; one number for every parameter, or a function of its name.
        clip: largest global gradient norm.
        drop_path: iteration from 0 -> `DropPath`.
        compute_dtype: of weights and activations in the forward and backward pass; the optimizer
            works on the model's own. None: the model's own everywhere.
        group_size: see `average`.

    Returns:
        Loss, norm before clipping and rate of each iteration; final weights by HuggingFace name.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    decay_of = weight_decay if callable(weight_decay) else (lambda _: weight_decay)
    groups = [{"params": [p], "weight_decay": decay_of(n)} for n, p in trainable.items()]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, foreach=False)
    losses, norms = [], []
    for iteration, (samples, rate) in enumerate(zip(iterations, learning_rates, strict=True)):
        for parameter in trainable.values():
            parameter.grad = torch.zeros_like(parameter)
        loss = iteration_loss(
            model,
            samples,
            weight,
            img_context_token_id=img_context_token_id,
            drop_path=drop_path(iteration) if drop_path else None,
            compute_dtype=compute_dtype,
            group_size=group_size,
        )
        loss.backward()
        gradients = [p.grad for p in trainable.values() if p.grad is not None]
        norms.append(clip_gradients(gradients, clip))
        losses.append(float(loss.detach()))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    return TrainingRun(
        losses=losses,
        grad_norms=norms,
        learning_rates=list(learning_rates),
        weights={name: tensor.detach().clone() for name, tensor in model.state_dict().items()},
    )
