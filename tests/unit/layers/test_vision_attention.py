"""Attention with 5 heads at TP 1, 2 and 4 against plain torch, through steps of AdamW."""

import pytest
import torch
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor, nn

from mmlm.config.presets import tiny
from mmlm.config.schema import BackendConfig, ParallelConfig
from mmlm.layers.packed_sequence import PackedSequence
from mmlm.layers.vision_attention import PaddedHeadsSelfAttention
from mmlm.models.layer_specs import vision_layer_spec
from mmlm.models.transformer_config import make_transformer_configs
from mmlm.parallel import topology
from mmlm.parallel.backend import resolve_backend
from mmlm.parallel.stage_plan import make_stage_plan
from tests.distributed.launch import run_ranks

HEADS, SIZE, WIDTH, EPS = 5, 8, 40, 1e-6
SEGMENTS = (6, 6, 5)
STEPS = 4
ADAM = {"lr": 0.02, "eps": 1e-2, "weight_decay": 0.1}

Values = dict[str, Tensor]


class PlainAttention(nn.Module):
    """The layer as InternViT has it: q, then k, then v; one norm over all heads."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(8)

        def parameter(mean: float, scale: float, *shape: int) -> nn.Parameter:
            return nn.Parameter(mean + scale * torch.randn(*shape, generator=generator))

        self.qkv = parameter(0, 0.3, 3, HEADS, SIZE, WIDTH)
        self.q_norm = parameter(1, 0.2, HEADS, SIZE)
        self.k_norm = parameter(1, 0.2, HEADS, SIZE)
        self.proj = parameter(0, 0.3, WIDTH, HEADS, SIZE)
        self.bias = parameter(0, 0.3, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """[t, h] of one segment -> [t, h]."""
        q, k, v = torch.einsum("chdw,tw->cthd", self.qkv, x)
        normed = []
        for each, weight in ((q, self.q_norm), (k, self.k_norm)):
            mean_square = each.square().flatten(1).sum(dim=1) / WIDTH
            normed.append(each / torch.sqrt(mean_square + EPS).view(-1, 1, 1) * weight)
        scores = torch.einsum("thd,shd->hts", *normed) / SIZE**0.5
        out = torch.einsum("hts,shd->thd", scores.softmax(dim=-1), v)
        return torch.einsum("thd,whd->tw", out, self.proj) + self.bias


def make_inputs() -> tuple[Tensor, Tensor]:
    """The stream and what the loss multiplies its output by."""
    generator = torch.Generator().manual_seed(9)
    return tuple(torch.randn(sum(SEGMENTS), WIDTH, generator=generator) for _ in range(2))


def plain_training() -> tuple[Values, Values]:
    """First outputs and gradients, and weights after the last step."""
    layer = PlainAttention()
    optimizer = torch.optim.AdamW(layer.parameters(), **ADAM)
    x, upstream = make_inputs()
    first: Values = {}
    for step in range(STEPS):
        leaf = x.clone().requires_grad_()
        out = torch.cat([layer(segment) for segment in leaf.split(SEGMENTS)])
        optimizer.zero_grad()
        (out * upstream).sum().backward()
        if step == 0:
            first = {"out": out.detach(), "input": leaf.grad}
            first |= {name: p.grad.clone() for name, p in layer.named_parameters()}
        optimizer.step()
    return first, {name: p.detach() for name, p in layer.named_parameters()}


def _build(tp_size: int) -> tuple[PaddedHeadsSelfAttention, topology.Topology]:
    place = topology.initialize(ParallelConfig(tensor_model_parallel_size=tp_size))
    model = tiny()
    configs = make_transformer_configs(
        model, make_stage_plan(model, 1), tp_size=tp_size, pp_size=1, dtype=torch.float32
    )
    layer_spec = vision_layer_spec(resolve_backend(BackendConfig()), model.vision)
    spec = layer_spec.submodules.self_attention
    layer = build_module(spec, config=configs.vision, layer_number=1, pg_collection=place.groups)
    return layer, place


def _views(layer: PaddedHeadsSelfAttention, grad: bool) -> Values:
    """This rank's parameters (or gradients), head by head, under the plain names."""
    slots = layer.partition.slots_per_rank

    def take(parameter: Tensor, *shape: int) -> Tensor:
        return (parameter.grad if grad else parameter.data).view(*shape)

    return {
        "qkv": take(layer.linear_qkv.weight, slots, 3, SIZE, WIDTH).transpose(0, 1),
        "q_norm": take(layer.qk_norm.q_weight, slots, SIZE),
        "k_norm": take(layer.qk_norm.k_weight, slots, SIZE),
        "proj": take(layer.linear_proj.weight, WIDTH, slots, SIZE),
        "bias": take(layer.linear_proj.bias, WIDTH),
    }


HEAD_DIM = {"qkv": 1, "q_norm": 0, "k_norm": 0, "proj": 1}


def _train(tp_size: int, weights: Values) -> tuple[Values, Values]:
    layer, place = _build(tp_size)
    heads = layer.partition.heads(place.tp_rank)

    def mine(name: str, tensor: Tensor) -> Tensor:
        """The true heads of a local tensor."""
        return tensor.narrow(HEAD_DIM[name], 0, len(heads)) if name in HEAD_DIM else tensor

    # rubbish where the padding is, to see that zero_padding_ clears it
    layer.linear_qkv.weight.data.fill_(7.0)
    layer.linear_proj.weight.data.fill_(7.0)
    assert layer.padding_is_zero() is (len(heads) == layer.partition.slots_per_rank)
    for name, view in _views(layer, grad=False).items():
        whole = weights[name]
        if name in HEAD_DIM:
            whole = whole.narrow(HEAD_DIM[name], heads.start, len(heads))
        mine(name, view).copy_(whole)
    layer.zero_padding_()
    optimizer = torch.optim.AdamW(layer.parameters(), **ADAM)
    x, upstream = make_inputs()
    packed = PackedSequence.from_lengths(SEGMENTS, torch.device("cpu"))
    first: Values = {}
    for step in range(STEPS):
        leaf = x.view(-1, 1, WIDTH).clone().requires_grad_()
        out, bias = layer(leaf, attention_mask=None, packed_seq_params=packed)
        out = out + bias
        optimizer.zero_grad()
        (out[:, 0] * upstream).sum().backward()
        if step == 0:
            first = {"out": out.detach()[:, 0], "input": leaf.grad[:, 0]}
            first |= {n: mine(n, g).clone() for n, g in _views(layer, grad=True).items()}
        optimizer.step()
        assert layer.padding_is_zero(), f"padding moved in step {step}"
    return first, {n: mine(n, w).clone() for n, w in _views(layer, grad=False).items()}


def together(name: str, ranks: list[Values]) -> Tensor:
    """Join the heads of the ranks; what every rank has whole must be the same."""
    if name in HEAD_DIM:
        return torch.cat([rank[name] for rank in ranks], dim=HEAD_DIM[name])
    for rank in ranks[1:]:
        torch.testing.assert_close(rank[name], ranks[0][name], rtol=0, atol=1e-6)
    return ranks[0][name]


@pytest.mark.distributed
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_training_is_that_of_plain_torch(tp_size: int) -> None:
    weights = {name: p.detach() for name, p in PlainAttention().named_parameters()}
    found = run_ranks(tp_size, _train, tp_size, weights)
    first, last = plain_training()
    for name, whole in first.items():  # numbers up to 30; measured 9e-6
        mine = together(name, [rank[0] for rank in found])
        torch.testing.assert_close(mine, whole, rtol=0, atol=5e-5)
    for name, whole in last.items():  # measured 5e-6
        mine = together(name, [rank[1] for rank in found])
        torch.testing.assert_close(mine, whole, rtol=0, atol=3e-5)


def _shards(tp_size: int) -> dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]]:
    layer, place = _build(tp_size)
    state = layer.sharded_state_dict("a.", metadata={"dp_cp_group": place.groups.dp_cp})
    return {
        name: [
            (block.global_shape, block.global_offset)
            for block in (entry.build() if hasattr(entry, "build") else [entry])
        ]
        for name, entry in state.items()
        if not name.endswith("_extra_state")
    }


@pytest.mark.distributed
def test_checkpoint_has_five_heads() -> None:
    first, second = run_ranks(2, _shards, 2)
    assert first == {
        "a.linear_qkv.weight": [((120, 40), (0, 0))],
        "a.linear_proj.weight": [((40, 40), (0, 0))],
        "a.linear_proj.bias": [((40,), (0,))],
        "a.qk_norm.q_weight": [((40,), (0,))],
        "a.qk_norm.k_weight": [((40,), (0,))],
    }
    assert second["a.linear_qkv.weight"] == [((120, 40), (72, 0))]  # three heads before
    assert second["a.linear_proj.weight"] == [((40, 40), (0, 24))]
