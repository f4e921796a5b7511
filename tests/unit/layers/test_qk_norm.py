"""The q/k norm over all heads of all TP ranks, 5 heads, against plain torch on one process.

Planted and seen to fail here: a statistic without the backward sum (gradients off by 0.4), a mean
over the padded width (outputs off by 0.3 at TP 2, 0.9 at TP 4), q's weight for k.
"""

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mmlm.config.schema import ParallelConfig
from mmlm.layers.head_partition import HeadPartition
from mmlm.layers.qk_norm import FullWidthQKNorm
from mmlm.parallel import topology
from tests.distributed.launch import run_ranks

HEADS, SIZE, TOKENS, EPS = 5, 8, 7, 1e-2

Values = dict[str, Tensor]


def settings(tp_size: int) -> TransformerConfig:
    """Sizes of a layer with padded heads."""
    slots = HeadPartition(num_heads=HEADS, tp_size=tp_size).num_slots
    return TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * SIZE,
        num_attention_heads=slots,
        kv_channels=SIZE,
        layernorm_epsilon=EPS,
        tensor_model_parallel_size=tp_size,
    )


def make_values() -> Values:
    """q, k, weights and the gradients that come back, all heads."""
    generator = torch.Generator().manual_seed(4)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    # heads of very different size: a statistic of one rank alone would be far off
    sizes = torch.tensor([0.1, 3.0, 1.0, 0.3, 2.0]).view(-1, 1)
    return {
        "q": random(TOKENS, 1, HEADS, SIZE) * sizes,
        "k": random(TOKENS, 1, HEADS, SIZE) * sizes.flip(0),
        "q_weight": 1 + 0.3 * random(HEADS * SIZE),
        "k_weight": 1 + 0.3 * random(HEADS * SIZE),
        "q_upstream": random(TOKENS, 1, HEADS, SIZE),
        "k_upstream": random(TOKENS, 1, HEADS, SIZE),
    }


def plain(values: Values) -> Values:
    """Outputs and gradients with nothing parallel."""
    leaves = {name: values[name].clone().requires_grad_() for name in ("q", "k")}
    weights = {name: values[f"{name}_weight"].clone().requires_grad_() for name in ("q", "k")}
    result, loss = {}, torch.zeros(())
    for name in ("q", "k"):
        flat = leaves[name].flatten(-2)
        mean_square = (flat * flat).sum(dim=-1, keepdim=True) / (HEADS * SIZE)
        out = flat / torch.sqrt(mean_square + EPS) * weights[name]
        result[f"{name}_out"] = out.detach().view_as(values["q"])
        loss = loss + (out.view_as(values["q"]) * values[f"{name}_upstream"]).sum()
    loss.backward()
    for name in ("q", "k"):
        result[f"{name}_grad"] = leaves[name].grad
        result[f"{name}_weight_grad"] = weights[name].grad
    return result


def _parallel(tp_size: int, values: Values) -> Values:
    """This rank's heads of what `plain` returns; padding is checked here."""
    place = topology.initialize(ParallelConfig(tensor_model_parallel_size=tp_size))
    partition = HeadPartition(num_heads=HEADS, tp_size=tp_size)
    heads = partition.heads(place.tp_rank)
    real, padded = len(heads), partition.slots_per_rank
    norm = FullWidthQKNorm(settings(tp_size), partition, place.groups)

    def local(whole: Tensor) -> Tensor:
        mine = torch.zeros(TOKENS, 1, padded, SIZE)
        mine[:, :, :real] = whole[:, :, heads.start : heads.stop]
        return mine

    leaves = {name: local(values[name]).requires_grad_() for name in ("q", "k")}
    parameters = {"q": norm.q_weight, "k": norm.k_weight}
    for name, parameter in parameters.items():
        assert not parameter[real * SIZE :].any(), "padding starts at zero"
        whole = values[f"{name}_weight"]
        parameter.data[: real * SIZE] = whole[heads.start * SIZE : heads.stop * SIZE]
    outputs = dict(zip(("q", "k"), norm(leaves["q"], leaves["k"]), strict=True))
    # what flows into a padding head must not matter: its weight is 0
    loss = sum((outputs[name] * local(values[f"{name}_upstream"])).sum() for name in ("q", "k"))
    loss.backward()
    result = {}
    for name in ("q", "k"):
        assert not outputs[name][:, :, real:].any()
        assert not leaves[name].grad[:, :, real:].any()
        assert not parameters[name].grad[real * SIZE :].any()
        result[f"{name}_out"] = outputs[name].detach()[:, :, :real]
        result[f"{name}_grad"] = leaves[name].grad[:, :, :real]
        result[f"{name}_weight_grad"] = parameters[name].grad[: real * SIZE]
    return result


@pytest.mark.distributed
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_outputs_and_gradients_are_those_of_one_process(tp_size: int) -> None:
    values = make_values()
    expected = plain(values)
    found = run_ranks(tp_size, _parallel, tp_size, values)
    for name, whole in expected.items():
        dim = 0 if name.endswith("weight_grad") else 2
        together = torch.cat([rank[name] for rank in found], dim=dim)
        # measured 1.4e-6
        torch.testing.assert_close(together, whole, rtol=0, atol=1e-5)


def _true_block(tp_size: int) -> list[tuple[str, tuple[int, ...], tuple[int, ...], int]]:
    place = topology.initialize(ParallelConfig(tensor_model_parallel_size=tp_size))
    partition = HeadPartition(num_heads=HEADS, tp_size=tp_size)
    norm = FullWidthQKNorm(settings(tp_size), partition, place.groups)
    state = norm.sharded_state_dict("norm.", metadata={"dp_cp_group": place.groups.dp_cp})
    return [
        (block.key, block.global_shape, block.global_offset, block.data.numel())
        for factory in state.values()
        for block in factory.build()
    ]


@pytest.mark.distributed
def test_checkpoint_holds_the_true_heads() -> None:
    for blocks, start, length in zip(run_ranks(2, _true_block, 2), (0, 24), (24, 16), strict=True):
        assert blocks == [
            (f"norm.{name}", (40,), (start,), length) for name in ("q_weight", "k_weight")
        ]
