"""What one layer of each kind is made of: masks, parameters, no bias where there is none."""

import pytest
import torch
from megatron.core.transformer.spec_utils import build_module

from mmlm.config.presets import tiny
from mmlm.config.schema import BackendConfig, ParallelConfig
from mmlm.models.layer_specs import decoder_layer_spec, vision_layer_spec
from mmlm.models.transformer_config import make_transformer_configs
from mmlm.parallel import topology
from mmlm.parallel.backend import resolve_backend
from mmlm.parallel.stage_plan import make_stage_plan
from tests.distributed.launch import run_ranks

Layer = tuple[dict[str, tuple[int, ...]], bool]


def _layers() -> tuple[Layer, Layer]:
    place = topology.initialize(ParallelConfig())
    model, backend = tiny(), resolve_backend(BackendConfig())
    configs = make_transformer_configs(
        model, make_stage_plan(model, 1), tp_size=1, pp_size=1, dtype=torch.float32
    )
    found = []
    for spec, config in (
        (vision_layer_spec(backend, model.vision), configs.vision),
        (decoder_layer_spec(backend, model.language), configs.language),
    ):
        layer = build_module(spec, config=config, layer_number=1, pg_collection=place.groups)
        shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
        found.append((shapes, layer.self_attention.core_attention.causal))
    return found[0], found[1]


@pytest.mark.distributed
def test_parameters_and_masks_of_both_kinds() -> None:
    ((vision, decoder),) = run_ranks(1, _layers)
    assert vision == (
        {
            "attention_scale": (40,),
            "mlp_scale": (40,),
            "input_layernorm.weight": (40,),
            "self_attention.linear_qkv.weight": (120, 40),
            "self_attention.qk_norm.q_weight": (40,),
            "self_attention.qk_norm.k_weight": (40,),
            "self_attention.linear_proj.weight": (40, 40),
            "self_attention.linear_proj.bias": (40,),
            "pre_mlp_layernorm.weight": (40,),
            "mlp.linear_fc1.weight": (80, 40),
            "mlp.linear_fc1.bias": (80,),
            "mlp.linear_fc2.weight": (40, 80),
            "mlp.linear_fc2.bias": (40,),
        },
        False,
    )
    assert decoder == (
        {
            "input_layernorm.weight": (48,),
            "self_attention.linear_qkv.weight": (48 + 2 * 24, 48),
            "self_attention.linear_proj.weight": (48, 48),
            "pre_mlp_layernorm.weight": (48,),
            "mlp.linear_fc1.weight": (144, 48),
            "mlp.linear_fc2.weight": (48, 72),
        },
        True,
    )
