"""The tower of one stage against the reference tower, and a microbatch without images."""

import dataclasses

import pytest
import torch
from torch import Tensor

from mmlm.config.model import ModelConfig
from mmlm.config.presets import tiny
from mmlm.config.schema import BackendConfig, ParallelConfig, TrainConfig
from mmlm.models.model_provider import build_model, fill_weights
from mmlm.models.vision_model import INERT_TOKENS, pack_images
from mmlm.parallel import topology
from mmlm.parallel.backend import resolve_backend
from mmlm.parallel.stage_plan import make_stage_plan
from tests.distributed.launch import run_ranks
from tests.parity.parallel_run import megatron_weights
from tests.parity.tiny_reference import VOCAB, tiny_input, tiny_model

CPU = torch.device("cpu")


def model() -> ModelConfig:
    """The tiny model with the reference's vocabulary."""
    return dataclasses.replace(
        tiny(), language=dataclasses.replace(tiny().language, vocab_size=VOCAB)
    )


def test_images_become_segments() -> None:
    scales = torch.rand(3, 2, 2)
    images = pack_images(tiny().vision, (64, 65), CPU, scales)
    assert images.segment_lengths == (17, 17) and images.image_ids == (64, 65)
    assert images.tokens_per_image == 17 and torch.equal(images.drop_path_scales, scales)
    assert pack_images(tiny().vision, (64, 65), CPU).drop_path_scales is None
    none = pack_images(tiny().vision, (), CPU, torch.empty(3, 2, 0))
    assert none.segment_lengths == (INERT_TOKENS,) and none.image_ids == ()
    assert none.drop_path_scales.shape == (3, 2, 0)


def _tower(tp_size: int, weights: dict[str, Tensor]) -> tuple[Tensor, Tensor, list[str]]:
    place = topology.initialize(ParallelConfig(tensor_model_parallel_size=tp_size))
    sizes = model()
    (chunk,) = build_model(
        sizes,
        make_stage_plan(sizes, 1),
        place,
        resolve_backend(BackendConfig()),
        TrainConfig(dtype="fp32"),
    )
    source = megatron_weights(sizes, weights)
    fill_weights([chunk], place.groups, lambda name, shape: source[name])
    tower = chunk.vision_model
    _, pixels, ids = tiny_input()
    images = pack_images(sizes.vision, tuple(ids.tolist()), CPU)
    out = tower(None, pixels, images).detach()
    inert = pack_images(sizes.vision, (), CPU, torch.empty(3, 2, 0))
    blank = tower(None, torch.empty(0, 3, 56, 56), inert)
    blank.mul(0.0).sum().backward()
    # a parameter without a gradient would break the hooks of the gradient buffers
    unused = [
        name
        for name, parameter in tower.named_parameters()
        if parameter.grad is None or parameter.grad.any()
    ]
    return out, blank.detach(), unused


@pytest.mark.distributed
@pytest.mark.parametrize("tp_size", [1, 2])
def test_tower_is_the_reference_tower(tp_size: int) -> None:
    reference = tiny_model()
    weights = {name: tensor.detach() for name, tensor in reference.state_dict().items()}
    _, pixels, ids = tiny_input()
    expected = torch.cat(
        [
            reference.vision_model(image, int(image_id)).detach()
            for image, image_id in zip(pixels, ids, strict=True)
        ]
    )
    for out, blank, unused in run_ranks(tp_size, _tower, tp_size, weights):
        torch.testing.assert_close(out[:, 0], expected, rtol=0, atol=1e-5)  # measured 1e-6
        assert blank.shape == (INERT_TOKENS, 1, 40) and blank.isfinite().all()
        assert unused == []
