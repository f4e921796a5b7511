"""Learning rates by the published formula, and which parameters decay."""

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mmlm.config.presets import tiny
from mmlm.config.schema import BackendConfig, OptimizerConfig, ParallelConfig, TrainConfig
from mmlm.models.model_provider import build_model, initialize_weights
from mmlm.parallel import topology
from mmlm.parallel.backend import resolve_backend
from mmlm.parallel.stage_plan import make_stage_plan
from mmlm.train.optimizer import (
    decays,
    make_optimizer,
    make_scheduler,
    step_if_finite,
    warmup_iterations,
    wrap_ddp,
)
from tests.distributed.launch import run_ranks


def rates(config: OptimizerConfig, train_iters: int, start: int = 0) -> list[float]:
    """The rate of each iteration from ``start`` on."""
    optimizer: Any = SimpleNamespace(param_groups=[{"lr": None, "weight_decay": None}])
    scheduler = make_scheduler(optimizer, config, train_iters, start)
    found = []
    for _ in range(start, train_iters):
        found.append(optimizer.param_groups[0]["lr"])
        scheduler.step(increment=1)
    return found


def published_rate(iteration: int, train_iters: int, fraction: float) -> float:
    """HuggingFace's cosine schedule with ``warmup_ratio``, as a share of the highest rate."""
    warmup = math.ceil(train_iters * fraction)
    if iteration < warmup:
        return iteration / warmup
    progress = (iteration - warmup) / max(1, train_iters - warmup)
    return 0.5 * (1 + math.cos(math.pi * progress))


@pytest.mark.parametrize("train_iters", [1, 2, 3, 33, 34, 200, 2477])
@pytest.mark.parametrize("fraction", [0.03, 0.0, 0.5])
def test_rate_of_every_iteration(train_iters: int, fraction: float) -> None:
    config = OptimizerConfig(lr=2e-5, lr_warmup_fraction=fraction)
    found = rates(config, train_iters)
    expected = [2e-5 * published_rate(k, train_iters, fraction) for k in range(train_iters)]
    # measured 3e-21
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-18)
    if fraction == 0.03:
        assert found[0] == 0.0
        assert train_iters == 1 or found[-1] > 0.0


def test_warm_up_of_the_published_run() -> None:
    assert warmup_iterations(0.03, 2477) == 75


def test_cosine_ends_at_the_lowest_rate() -> None:
    config = OptimizerConfig(lr=1e-4, min_lr=4e-5, lr_warmup_fraction=0.0)
    expected = [4e-5 + 6e-5 * (1 + math.cos(math.pi * k / 8)) / 2 for k in range(8)]
    assert rates(config, 8) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("start", [1, 3, 20, 49])
def test_a_resumed_run_has_the_rates_of_an_uninterrupted_one(start: int) -> None:
    config = OptimizerConfig(lr_warmup_fraction=0.1)
    assert rates(config, 50, start) == rates(config, 50)[start:]


LAYER = "decoder.layers.0."
BIASES = {
    "vision_model.patch_embedding.bias",
    *(
        f"vision_model.{LAYER}{name}.bias"
        for name in ("self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
    ),
    "vision_projection.layernorm.bias",
    "vision_projection.linear_fc1.bias",
    "vision_projection.linear_fc2.bias",
}
OTHER_NORMS = {
    "vision_projection.layernorm.weight",
    f"language_model.{LAYER}input_layernorm.weight",
    f"language_model.{LAYER}pre_mlp_layernorm.weight",
    "language_model.decoder.final_layernorm.weight",
}
TOWER_VECTORS = {
    f"vision_model.{LAYER}{name}"
    for name in (
        "input_layernorm.weight",
        "pre_mlp_layernorm.weight",
        "self_attention.qk_norm.q_weight",
        "self_attention.qk_norm.k_weight",
        "attention_scale",
        "mlp_scale",
    )
}
KEPT = {
    "all": set(),
    "matrices_only": BIASES | OTHER_NORMS | TOWER_VECTORS,
    "huggingface": BIASES | OTHER_NORMS,
}
"""Rule -> parameters of a model of one layer each that do not decay."""


def _undecayed(rule: str) -> tuple[set[str], set[str]]:
    """What a step without any gradient leaves as it was, and what it shrinks by lr x decay."""
    place = topology.initialize(ParallelConfig())
    model = dataclasses.replace(
        tiny(),
        vision=dataclasses.replace(tiny().vision, num_layers=1),
        language=dataclasses.replace(tiny().language, num_layers=1),
    )
    (chunk,) = build_model(
        model,
        make_stage_plan(model, 1),
        place,
        resolve_backend(BackendConfig()),
        TrainConfig(dtype="fp32"),
    )
    initialize_weights([chunk], place.groups, seed=0)
    for parameter in chunk.parameters():
        parameter.data += 1.0
    before = {name: p.detach().clone() for name, p in chunk.named_parameters()}
    config = OptimizerConfig(lr=0.5, weight_decay=0.5, lr_warmup_fraction=0.0, decay=rule)
    wrapped = wrap_ddp([chunk], place)
    optimizer = make_optimizer(wrapped, config, torch.float32)
    make_scheduler(optimizer, config, train_iters=10)
    wrapped[0].zero_grad_buffer()
    assert optimizer.step()[0]
    kept, shrunk = set(), set()
    for name, parameter in chunk.named_parameters():
        if torch.equal(parameter, before[name]):
            kept.add(name)
        elif torch.allclose(parameter, before[name] * 0.75, rtol=1e-6):
            shrunk.add(name)
    return kept, shrunk


@pytest.mark.distributed
@pytest.mark.parametrize("rule", KEPT)
def test_a_step_without_gradients_shrinks_what_decays(rule: str) -> None:
    ((kept, shrunk),) = run_ranks(1, _undecayed, rule)
    assert kept == KEPT[rule]
    matrices = {
        "vision_model.class_embedding",
        "vision_model.position_embedding",
        "vision_model.patch_embedding.weight",
        f"vision_model.{LAYER}self_attention.linear_qkv.weight",
        "vision_projection.linear_fc1.weight",
        "language_model.embedding.word_embeddings.weight",
        "language_model.output_layer.weight",
    }
    assert matrices <= shrunk
    assert len(kept) + len(shrunk) == 17 + 6 + 9  # tower, projection, decoder: every parameter


@pytest.mark.parametrize("rule", KEPT)
def test_rule_by_name(rule: str) -> None:
    for name in BIASES | OTHER_NORMS | TOWER_VECTORS:
        assert decays(rule, name, 1) is (name not in KEPT[rule]), name
    assert decays(rule, "language_model.output_layer.weight", 2)


def _buckets(parallel: ParallelConfig) -> tuple[int, bool, set[tuple[torch.dtype, torch.dtype]]]:
    place = topology.initialize(parallel)
    plan = make_stage_plan(tiny(), 1)
    train = TrainConfig(dtype="bf16")
    chunks = build_model(tiny(), plan, place, resolve_backend(BackendConfig(), "bf16"), train)
    (chunk,) = wrap_ddp(chunks, place, parallel)
    dtypes = {(p.dtype, p.main_grad.dtype) for p in chunk.parameters()}
    return len(chunk.bucket_groups), chunk.ddp_config.overlap_param_gather, dtypes


@pytest.mark.distributed
def test_overlap_cuts_gradients_into_buckets() -> None:
    """Without several buckets nothing could overlap."""
    assert run_ranks(1, _buckets, ParallelConfig())[0][:2] == (1, False)
    overlap = ParallelConfig(
        overlap_grad_reduce=True, overlap_param_gather=True, ddp_bucket_size=4000
    )
    groups, gathers, _ = run_ranks(1, _buckets, overlap)[0]
    assert groups > 3 and gathers


@pytest.mark.distributed
def test_gradients_of_bf16_weights_add_up_in_fp32() -> None:
    _, _, dtypes = run_ranks(1, _buckets, ParallelConfig())[0]
    assert dtypes == {(torch.bfloat16, torch.float32)}


def _two_steps(ours: bool, dtype: torch.dtype) -> list[torch.Tensor]:
    """Weights after two steps with clipping, ours or megatron-core's."""
    place = topology.initialize(ParallelConfig())
    config = TrainConfig(dtype="fp32" if dtype == torch.float32 else "bf16")
    backend = resolve_backend(BackendConfig())
    (chunk,) = build_model(tiny(), make_stage_plan(tiny(), 1), place, backend, config)
    initialize_weights([chunk], place.groups, seed=0)
    wrapped = wrap_ddp([chunk], place)
    optimizer = make_optimizer(wrapped, OptimizerConfig(lr=0.5, clip_grad=0.1), dtype)
    generator = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(2):
        for parameter in chunk.parameters():
            parameter.main_grad.normal_(generator=generator)
        wrapped[0].start_grad_sync()
        wrapped[0].finish_grad_sync()
        if ours:
            assert step_if_finite(optimizer) > 1.0
        else:
            assert optimizer.step()[1] > 1.0
    return [parameter.detach().clone() for parameter in chunk.parameters()]


@pytest.mark.distributed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_finite_step_is_megatron_cores(dtype: torch.dtype) -> None:
    ours, theirs = run_ranks(2, _two_steps, True, dtype), run_ranks(2, _two_steps, False, dtype)
    for own, truth in zip(ours, theirs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(own, truth, strict=True))
