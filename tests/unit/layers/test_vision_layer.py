"""One InternViT layer against the plain reference layer: LayerScale, drop path per image."""

import pytest
import torch
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor

from mmlm.config.presets import tiny
from mmlm.config.schema import BackendConfig, ParallelConfig
from mmlm.layers.drop_path import drop_path_scales
from mmlm.layers.vision_layer import DropPathMode, PackedImages
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


def packed(*, drop: bool, mode: DropPathMode = "skip", padding: int = PADDING) -> PackedImages:
    """The images of the stream, with or without drop path."""
    images = PackedImages.from_lengths(
        (*[TOKENS] * len(IDS), padding),
        torch.device("cpu"),
        image_ids=IDS,
        tokens_per_image=TOKENS,
        drop_path_scales=all_scales() if drop else None,
        drop_path_mode=mode,
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
        for name, images in (
            ("skip", packed(drop=True)),
            ("mask", packed(drop=True, mode="mask")),
            ("evaluate", packed(drop=False)),
        ):
            out, context = layer(make_stream().unsqueeze(1), packed_seq_params=images)
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
        dropping = [*zip(attention.tolist(), mlp.tolist(), strict=True)]
        for name, multipliers in (
            ("skip", dropping),
            ("mask", dropping),
            ("evaluate", [(1.0, 1.0)] * len(IDS)),
        ):
            expected = torch.cat(
                [plain(x, *pair).detach() for x, pair in zip(images, multipliers, strict=False)]
            )
            out = found[f"{name} {number}"][: len(expected)]
            # measured 1.7e-6
            torch.testing.assert_close(out, expected, rtol=0, atol=2e-5)


def _modes(tp_size: int, sequence_parallel: bool, scales: Tensor) -> dict[str, dict[str, Tensor]]:
    """Output, gradients and computed MLP rows of layer 3 in both modes, whole on every rank."""
    place = topology.initialize(
        ParallelConfig(tensor_model_parallel_size=tp_size, sequence_parallel=sequence_parallel)
    )
    model, group = tiny(), place.groups.tp
    configs = make_transformer_configs(
        model,
        make_stage_plan(model, 1),
        tp_size=tp_size,
        pp_size=1,
        dtype=torch.float32,
        sequence_parallel=sequence_parallel,
    )
    spec = vision_layer_spec(resolve_backend(BackendConfig()), model.vision)
    layer = build_module(spec, config=configs.vision, layer_number=3, pg_collection=place.groups)
    generator = torch.Generator().manual_seed(0)  # what the ranks share must be the same
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    layer.self_attention.zero_padding_()
    stream = make_stream()  # 12 images and padding; a multiple of 4
    stream = torch.cat([stream, stream.new_zeros(-len(stream) % 4, stream.shape[1])])[:, None]
    rows: list[int] = []
    layer.mlp.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    results = {}
    for mode in ("skip", "mask"):
        images = packed(drop=True, mode=mode, padding=len(stream) - len(IDS) * TOKENS)
        images.drop_path_scales = scales
        share = stream.chunk(group.size())[group.rank()] if sequence_parallel else stream
        x = share.clone().requires_grad_()
        out, _ = layer(x, packed_seq_params=images)
        # the padding is not looked at by anyone
        is_image = torch.arange(len(stream)) < len(IDS) * TOKENS
        weights = torch.linspace(-1, 1, out.numel()).view_as(out)
        shown = is_image.chunk(group.size())[group.rank()] if sequence_parallel else is_image
        layer.zero_grad()
        ((out * weights)[shown]).sum().backward()
        for parameter in layer.parameters():  # as megatron-core does after the backward pass
            if getattr(parameter, "sequence_parallel", False):
                torch.distributed.all_reduce(parameter.grad, group=group)
        results[mode] = {
            "out": out.detach()[shown],
            "input": x.grad[shown],
            "rows": torch.tensor(rows.pop() * (group.size() if sequence_parallel else 1)),
            **{name: p.grad.clone() for name, p in layer.named_parameters()},
        }
    return results


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("tp_size", "sequence_parallel"), [(1, False), (2, False), (2, True), (4, True)]
)
@pytest.mark.parametrize("case", ["some", "none of the mlp"])
def test_a_skipped_branch_equals_a_masked_one(
    tp_size: int, sequence_parallel: bool, case: str
) -> None:
    """And it is not computed: the MLP sees the rows of the images that keep it."""
    scales = all_scales()
    if case == "none of the mlp":
        scales[2, 1] = 0.0
    num_kept = int((scales[2, 1] > 0).sum())
    assert num_kept < len(IDS)
    for found in run_ranks(tp_size, _modes, tp_size, sequence_parallel, scales):
        skip, mask = found["skip"], found["mask"]
        computed, everything = int(skip.pop("rows")), int(mask.pop("rows"))
        shares = tp_size if sequence_parallel else 1
        stands_in = shares  # one row of each rank, where every image is dropped
        assert everything >= len(IDS) * TOKENS
        assert computed == -(-(num_kept * TOKENS or stands_in) // shares) * shares
        for name, truth in mask.items():
            difference = (skip[name] - truth).norm() / truth.norm().clamp_min(1e-30)
            # measured 5e-7
            assert difference < 1e-5, (name, difference)
