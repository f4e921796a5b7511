"""One InternViT layer against the plain reference layer: LayerScale, drop path per image."""

import pytest
import torch
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor

from mmlm.config.presets import tiny
from mmlm.config.schema import BackendConfig, ParallelConfig
from mmlm.layers.drop_path import drop_path_scales
from mmlm.layers.vision_layer import PackedImages
from mmlm.models.layer_specs import vision_layer_spec
from mmlm.models.transformer_config import make_transformer_configs
from mmlm.parallel import topology
from mmlm.parallel.backend import resolve_backend
from mmlm.parallel.stage_plan import make_stage_plan
from tests.distributed.launch import run_ranks
from tests.parity.reference_vision import VisionLayer
from tests.tiny_weights import random_tensors, tiny_vision_config, vision_shapes

SEED, ITERATION, RATE = 3, 5, 0.6
IDS = tuple(range(64, 76))
TOKENS = 17  # 4 x 4 patches and the class token
PADDING = 3


def reference() -> VisionLayer:
    """The plain layer with random weights, LayerScale included."""
    prefix = "encoder.layers.0."
    tensors = random_tensors(vision_shapes(tiny_vision_config()), 2, torch.float32)
    layer = VisionLayer(tiny_vision_config())
    layer.load_state_dict(
        {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    )
    return layer


def make_stream() -> Tensor:
    """Twelve images and some padding behind them, [t, h]."""
    generator = torch.Generator().manual_seed(6)
    return torch.randn(len(IDS) * TOKENS + PADDING, 40, generator=generator)


def all_scales() -> Tensor:
    """Multipliers of the three layers of the tower."""
    found = drop_path_scales(
        seed=SEED, iteration=ITERATION, image_ids=IDS, num_layers=3, max_rate=RATE
    )
    return torch.from_numpy(found)


def packed(*, drop: bool) -> PackedImages:
    """The images of the stream, with or without drop path."""
    images = PackedImages.from_lengths(
        (*[TOKENS] * len(IDS), PADDING),
        torch.device("cpu"),
        image_ids=IDS,
        tokens_per_image=TOKENS,
        drop_path_scales=all_scales() if drop else None,
    )
    assert isinstance(images, PackedImages)
    return images


def _outputs(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    place = topology.initialize(ParallelConfig())
    model = tiny()
    configs = make_transformer_configs(
        model, make_stage_plan(model, 1), tp_size=1, pp_size=1, dtype=torch.float32
    )
    spec = vision_layer_spec(resolve_backend(BackendConfig()), model.vision)
    found: dict[str, Tensor] = {}
    for number in (1, 2, 3):
        layer = build_module(
            spec, config=configs.vision, layer_number=number, pg_collection=place.groups
        )
        missing, unexpected = layer.load_state_dict(weights, strict=False)
        assert not unexpected and all(name.endswith("_extra_state") for name in missing)
        for name, drop in (("train", True), ("evaluate", False)):
            out, context = layer(make_stream().unsqueeze(1), packed_seq_params=packed(drop=drop))
            assert context is None
            found[f"{name} {number}"] = out.detach()[:, 0]
    return found


def as_megatron(layer: VisionLayer) -> dict[str, Tensor]:
    """The reference's weights under the names of the layer under test."""
    tensors = dict(layer.named_parameters())
    q, k, v = tensors["attn.qkv.weight"].detach().view(3, 5, 8, 40)
    return {
        "input_layernorm.weight": tensors["norm1.weight"],
        "self_attention.linear_qkv.weight": torch.stack([q, k, v], dim=1).reshape(120, 40),
        "self_attention.qk_norm.q_weight": tensors["attn.q_norm.weight"],
        "self_attention.qk_norm.k_weight": tensors["attn.k_norm.weight"],
        "self_attention.linear_proj.weight": tensors["attn.proj.weight"],
        "self_attention.linear_proj.bias": tensors["attn.proj.bias"],
        "attention_scale": tensors["ls1"],
        "pre_mlp_layernorm.weight": tensors["norm2.weight"],
        "mlp.linear_fc1.weight": tensors["mlp.fc1.weight"],
        "mlp.linear_fc1.bias": tensors["mlp.fc1.bias"],
        "mlp.linear_fc2.weight": tensors["mlp.fc2.weight"],
        "mlp.linear_fc2.bias": tensors["mlp.fc2.bias"],
        "mlp_scale": tensors["ls2"],
    }


@pytest.mark.distributed
def test_layer_is_the_reference_layer_image_by_image() -> None:
    plain = reference()
    weights = {name: tensor.detach() for name, tensor in as_megatron(plain).items()}
    (found,) = run_ranks(1, _outputs, weights)
    images = make_stream().split([*[TOKENS] * len(IDS), PADDING])
    for number in (1, 2, 3):
        attention, mlp = all_scales()[number - 1]
        if number == 3:  # all four combinations occur
            assert len({(bool(a), bool(m)) for a, m in zip(attention, mlp, strict=True)}) == 4
        for name, multipliers in (
            ("train", [*zip(attention.tolist(), mlp.tolist(), strict=True), (1.0, 1.0)]),
            ("evaluate", [(1.0, 1.0)] * (len(IDS) + 1)),
        ):
            expected = torch.cat(
                [plain(x, *pair).detach() for x, pair in zip(images, multipliers, strict=True)]
            )
            # measured 1.7e-6
            torch.testing.assert_close(found[f"{name} {number}"], expected, rtol=0, atol=2e-5)
