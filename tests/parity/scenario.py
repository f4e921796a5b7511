"""What is trained in a comparison, and both ways of training it: plain and parallel.

Errors are relative: of a loss by its value, of a tensor by its norm.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mmlm.config.schema import OptimizerConfig, TrainConfig
from mmlm.data.step_plan import samples_of
from mmlm.layers.drop_path import drop_path_scales
from tests.distributed.launch import run_ranks
from tests.parity.parallel_run import Layout, ParallelRun, make_samples, train_parallel
from tests.parity.reference_model import ReferenceInternVL
from tests.parity.reference_training import (
    ReferenceSample,
    TrainingRun,
    cosine_learning_rates,
    iteration_loss,
    train,
)
from tests.parity.tiny_reference import CONTEXT, VOCAB, tiny_config, tiny_model
from tests.tiny_weights import tiny_llm_config

NUM_SAMPLES = 10
GLOBAL_BATCH_SIZE = 6
SEED = 5

PREFIXES = {
    "vision_model": "vision_model.",
    "vision_projection": "mlp1.",
    "language_model": "language_model.",
}
"""Names of the parts: Megatron's and HuggingFace's."""

# with Adam's usual epsilon of 1e-8, a gradient of 1e-9 that is nothing but rounding moves a weight
OPTIMIZER = OptimizerConfig(lr=1e-2, lr_warmup_fraction=0.3, adam_eps=1e-4)


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A model, its data and its arithmetic; nothing of a layout."""

    images: tuple[int, ...] = (1, 0, 2, 1)
    """Images of the samples in turn."""
    weight: str = "token"
    """Loss weight."""
    drop_path: float = 0.0
    """Rate of the last vision layer."""
    ps_version: str = "v1"
    language_heads: tuple[int, int] = (4, 2)
    """Query heads and key/value heads of the decoder."""
    num_iterations: int = 3
    group_size: int = 4
    """Samples in a group of the weight "micro_batch_mean"."""
    frozen: str = ""
    """The part that is not trained, in Megatron's words."""
    dtype: str = "fp32"
    """bf16: computed in bf16, from weights that bf16 holds exactly."""

    @property
    def optimizer(self) -> OptimizerConfig:
        """Small steps in bf16: after large ones a loss differs by chaos more than by rounding."""
        return replace(OPTIMIZER, lr=OPTIMIZER.lr / 10) if self.dtype == "bf16" else OPTIMIZER

    def config(self) -> dict[str, Any]:
        """Sizes in HuggingFace's words."""
        heads, groups = self.language_heads
        llm = tiny_llm_config(VOCAB, num_attention_heads=heads, num_key_value_heads=groups)
        return tiny_config(ps_version=self.ps_version, llm_config=llm)

    def model(self) -> ReferenceInternVL:
        """The plain model with its random weights."""
        model = tiny_model(ps_version=self.ps_version, llm_config=self.config()["llm_config"])
        for name, parameter in model.named_parameters():
            if self.dtype == "bf16":
                parameter.data = parameter.data.bfloat16().float()
            parameter.requires_grad_(not (self.frozen and name.startswith(PREFIXES[self.frozen])))
        return model

    def train_config(self, **changes: Any) -> TrainConfig:
        """Settings of the parallel run."""
        return TrainConfig(
            **{
                "global_batch_size": GLOBAL_BATCH_SIZE,
                "dtype": self.dtype,
                "vision_drop_path_rate": self.drop_path,
                "loss_weight": self.weight,
                "loss_group_size": self.group_size,
                "seed": SEED,
                **({f"freeze_{self.frozen}": True} if self.frozen else {}),
                **changes,
            }
        )

    def run(self, layout: Layout, **changes: Any) -> ParallelRun:
        """Train in parallel.

        Args:
            layout: how the model and the batch are cut.
            **changes: fields of the TrainConfig, e.g. ``recompute_vision_model="full"``.
        """
        return run_ranks(
            layout.world_size,
            train_parallel,
            layout,
            self.config(),
            dict(self.model().state_dict()),
            make_samples(NUM_SAMPLES, CONTEXT, images_of_sample=self.images),
            self.train_config(**changes),
            self.optimizer,
            self.num_iterations,
        )[0]


def _drop_path(scenario: Scenario) -> Callable[[int], Any] | None:
    if not scenario.drop_path:
        return None

    def of_iteration(iteration: int) -> Callable[[int, int, int], float]:
        def multiplier(image_id: int, layer: int, branch: int) -> float:
            scales = drop_path_scales(
                seed=SEED,
                iteration=iteration,
                image_ids=[image_id],
                num_layers=3,
                max_rate=scenario.drop_path,
            )
            return float(scales[layer, branch, 0])

        return multiplier

    return of_iteration


@cache
def reference_batches(scenario: Scenario) -> tuple[tuple[ReferenceSample, ...], ...]:
    """The samples of each iteration."""
    samples = [
        ReferenceSample(
            input_ids=torch.from_numpy(sample.input_ids),
            labels=torch.from_numpy(sample.labels),
            pixel_values=torch.from_numpy(sample.pixel_values),
            image_ids=torch.from_numpy(sample.image_ids),
        )
        for sample in make_samples(NUM_SAMPLES, CONTEXT, images_of_sample=scenario.images)
    ]
    return tuple(
        tuple(
            samples[index]
            for index in samples_of(
                NUM_SAMPLES,
                seed=SEED,
                iteration=iteration,
                global_batch_size=GLOBAL_BATCH_SIZE,
            )[1]
        )
        for iteration in range(scenario.num_iterations)
    )


@cache
def reference_gradients(
    scenario: Scenario, compute_dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Gradients of the first iteration by autograd; zero where nothing was used."""
    model, drop_path = scenario.model(), _drop_path(scenario)
    loss = iteration_loss(
        model,
        reference_batches(scenario)[0],
        scenario.weight,
        img_context_token_id=CONTEXT,
        drop_path=drop_path(0) if drop_path else None,
        compute_dtype=compute_dtype,
        group_size=scenario.group_size,
    )
    loss.backward()
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


@cache
def reference_run(scenario: Scenario, compute_dtype: torch.dtype | None = None) -> TrainingRun:
    """A few steps of torch's AdamW; in the weights' own fp32 unless another type is given."""
    optimizer = scenario.optimizer
    return train(
        scenario.model(),
        reference_batches(scenario),
        cosine_learning_rates(optimizer.lr, scenario.num_iterations, optimizer.lr_warmup_fraction),
        img_context_token_id=CONTEXT,
        weight=scenario.weight,
        eps=optimizer.adam_eps,
        weight_decay=optimizer.weight_decay,
        clip=optimizer.clip_grad,
        drop_path=_drop_path(scenario),
        compute_dtype=compute_dtype,
        group_size=scenario.group_size,
    )


@dataclass(frozen=True, kw_only=True)
class Errors:
    """Largest relative errors of a training, and the tensors they belong to."""

    loss: float
    """Of the first iteration."""
    losses: float
    """Of any iteration."""
    gradient: float
    """Of the first iteration's gradients, of any tensor."""
    gradient_name: str
    weight: float
    """After the last iteration, of any tensor."""
    weight_name: str


def errors_of(scenario: Scenario, found: ParallelRun) -> Errors:
    """Compare a parallel run with the plain fp32 one."""
    return _errors(scenario, found.losses, found.gradients, found.weights)


@cache
def plain_bf16_errors(scenario: Scenario) -> Errors:
    """How far plain PyTorch in bf16, in one process, is from plain PyTorch in fp32."""
    found = reference_run(scenario, torch.bfloat16)
    gradients = reference_gradients(scenario, torch.bfloat16)
    return _errors(scenario, found.losses, gradients, found.weights)


def _errors(
    scenario: Scenario,
    losses: list[float],
    gradients: dict[str, Tensor],
    weights: dict[str, Tensor],
) -> Errors:
    truth = reference_run(scenario)
    of_losses = [
        error(torch.tensor(value), torch.tensor(wanted))
        for value, wanted in zip(losses, truth.losses, strict=True)
    ]
    gradient, gradient_name = worst(gradients, reference_gradients(scenario))
    weight, weight_name = worst(weights, truth.weights)
    return Errors(
        loss=of_losses[0],
        losses=max(of_losses),
        gradient=gradient,
        gradient_name=gradient_name,
        weight=weight,
        weight_name=weight_name,
    )


def error(value: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of the truth; infinite where it is no number."""
    difference = (value.double() - truth.double()).norm()
    found = (difference / truth.double().norm().clamp_min(1e-30)).item()
    return found if math.isfinite(found) else math.inf  # max() would pass over a NaN


def worst(values: dict[str, Tensor], truth: dict[str, Tensor]) -> tuple[float, str]:
    """The largest error of all tensors and the name it belongs to."""
    assert values.keys() == truth.keys()
    return max((error(values[name], truth[name]), name) for name in truth)
