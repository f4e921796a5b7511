"""The projection against plain torch at TP 1 and 2, and its inert row."""

import dataclasses

import pytest
import torch
from torch import Tensor

from mmlm.config.presets import tiny
from mmlm.config.schema import ParallelConfig
from mmlm.models.transformer_config import make_transformer_configs
from mmlm.models.vision_projection import VisionProjection
from mmlm.parallel import topology
from mmlm.parallel.stage_plan import make_stage_plan
from tests.distributed.launch import run_ranks
from tests.parity.reference_vision import pixel_shuffle
from tests.tiny_weights import (
    projector_shapes,
    random_tensors,
    tiny_llm_config,
    tiny_vision_config,
)

EPS = 0.05  # large, so that it matters


def make_values() -> tuple[dict[str, Tensor], Tensor]:
    """Weights under HuggingFace's names and the tower's output for two images."""
    shapes = projector_shapes(tiny_vision_config(), tiny_llm_config(50))
    generator = torch.Generator().manual_seed(2)
    return random_tensors(shapes, 5, torch.float32), torch.randn(2, 17, 40, generator=generator)


def plain(weights: dict[str, Tensor], features: Tensor) -> Tensor:
    """LayerNorm, Linear, GELU (erf), Linear of the shuffled patches, [tokens, h]."""
    x = torch.cat([pixel_shuffle(image[1:], 2, "v1") for image in features])
    centred = x - x.mean(dim=1, keepdim=True)
    variance = centred.square().mean(dim=1, keepdim=True)
    x = centred / torch.sqrt(variance + EPS) * weights["0.weight"] + weights["0.bias"]
    x = x @ weights["1.weight"].T + weights["1.bias"]
    x = x * (1 + torch.erf(x / 2**0.5)) / 2
    return x @ weights["3.weight"].T + weights["3.bias"]


def _project(tp_size: int) -> tuple[Tensor, Tensor, list[str]]:
    place = topology.initialize(ParallelConfig(tensor_model_parallel_size=tp_size))
    model = dataclasses.replace(tiny(), projection_layernorm_epsilon=EPS)
    configs = make_transformer_configs(
        model, make_stage_plan(model, 1), tp_size=tp_size, pp_size=1, dtype=torch.float32
    )
    projection = VisionProjection(configs.language, model, place.groups)
    weights, features = make_values()
    half = slice(place.tp_rank * 48 // tp_size, (place.tp_rank + 1) * 48 // tp_size)
    for parameter, value in (
        (projection.layernorm.weight, weights["0.weight"]),
        (projection.layernorm.bias, weights["0.bias"]),
        (projection.linear_fc1.weight, weights["1.weight"][half]),
        (projection.linear_fc1.bias, weights["1.bias"][half]),
        (projection.linear_fc2.weight, weights["3.weight"][:, half]),
        (projection.linear_fc2.bias, weights["3.bias"]),
    ):
        parameter.data.copy_(value)
    padded = torch.cat([features.reshape(-1, 1, 40), torch.full((3, 1, 40), 9.0)])
    out = projection(padded, 2).detach()
    inert = projection(torch.randn(2, 1, 40), 0)
    inert.mul(0.0).sum().backward()
    unused = [name for name, p in projection.named_parameters() if p.grad is None or p.grad.any()]
    return out, inert.detach(), unused


@pytest.mark.distributed
@pytest.mark.parametrize("tp_size", [1, 2])
def test_projection_is_plain_torch(tp_size: int) -> None:
    expected = plain(*make_values())
    assert len(expected) == 2 * 4
    for out, inert, unused in run_ranks(tp_size, _project, tp_size):
        torch.testing.assert_close(out[:, 0], expected, rtol=0, atol=6e-6)  # measured 6e-7
        assert inert.shape == (1, 1, 48) and inert.isfinite().all()
        assert unused == []
