"""A stage's model for a run: what TP must divide, what is frozen, fresh weights, shard marks."""

import dataclasses
from math import prod
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories, is_main_replica
from torch import Tensor

from mmlm.config.model import ModelConfig
from mmlm.config.presets import tiny
from mmlm.config.schema import BackendConfig, ParallelConfig, TrainConfig
from mmlm.errors import CheckpointError, ConfigError
from mmlm.models.internvl_model import InternVLModel
from mmlm.models.model_provider import (
    build_model,
    initialize_weights,
    load_weights,
    model_state,
)
from mmlm.parallel import topology
from mmlm.parallel.backend import resolve_backend
from mmlm.parallel.stage_plan import make_stage_plan
from mmlm.train.gradients import gather_tensors
from mmlm.train.summary import parameter_counts
from tests.distributed.launch import run_ranks
from tests.tiny_weights import (
    llm_shapes,
    projector_shapes,
    tiny_llm_config,
    tiny_vision_config,
    vision_shapes,
)

FP32 = TrainConfig(dtype="fp32")


def _build(
    tp_size: int, pp_size: int, train: TrainConfig = FP32, model: ModelConfig | None = None
) -> tuple[InternVLModel, topology.Topology]:
    place = topology.initialize(
        ParallelConfig(tensor_model_parallel_size=tp_size, pipeline_model_parallel_size=pp_size)
    )
    model = model or tiny()
    plan = make_stage_plan(model, pp_size, "vvv|pEtttL" if pp_size == 2 else "auto")
    (chunk,) = build_model(model, plan, place, resolve_backend(BackendConfig()), train)
    return chunk, place


def _divide(tp_size: int) -> str:
    model = dataclasses.replace(
        tiny(), vision=dataclasses.replace(tiny().vision, ffn_hidden_size=81)
    )
    with pytest.raises(ConfigError) as caught:
        _build(tp_size, 1, model=model)
    return str(caught.value)


@pytest.mark.distributed
def test_sizes_that_tp_does_not_divide_are_named() -> None:
    assert (
        run_ranks(4, _divide, 4)
        == [
            "tensor_model_parallel_size 4 does not divide language.num_query_groups 2, "
            "vision.ffn_hidden_size 81; choose a TP size that does (vision heads need not divide: "
            "they are padded)"
        ]
        * 4
    )


def _frozen() -> dict[str, dict[str, bool]]:
    found = {}
    for part in ("vision_model", "vision_projection", "language_model"):
        chunk, _ = _build(1, 1, dataclasses.replace(FP32, **{f"freeze_{part}": True}))
        found[part] = {name: p.requires_grad for name, p in chunk.named_parameters()}
        topology.destroy()
    return found


@pytest.mark.distributed
def test_frozen_is_the_part_that_is_named() -> None:
    (found,) = run_ranks(1, _frozen)
    for part, trained in found.items():
        assert any(trained.values()) and not all(trained.values())
        for name, is_trained in trained.items():
            assert is_trained is (not name.startswith(part + ".")), name


def _fresh(tp_size: int, pp_size: int) -> tuple[dict[str, Tensor], list[dict[str, int]]]:
    chunk, place = _build(tp_size, pp_size)
    initialize_weights([chunk], place.groups, seed=1)
    counts = parameter_counts([chunk], place)
    state = model_state([chunk], place.groups, prefix="")
    apply_factories(state)
    whole = gather_tensors(
        [
            shard
            for shard in nested_values(state)
            if isinstance(shard, ShardedTensor) and is_main_replica(shard.replica_id)
        ]
    )
    return whole, counts


def kind(name: str, shape: tuple[int, ...]) -> str:
    """How a parameter of this name is to be initialised."""
    if name.endswith(("attention_scale", "mlp_scale")):
        return "scale"
    if name.endswith("bias"):
        return "bias"
    return "norm" if len(shape) == 1 else "matrix"


@pytest.mark.distributed
def test_fresh_weights_depend_on_names_and_seed_alone() -> None:
    """The same at TP 1 and at TP 2 x PP 2 to the bit, and of the stated distributions."""
    ((one, counts),) = run_ranks(1, _fresh, 1, 1)
    (many, counts_of_two), *_ = run_ranks(4, _fresh, 2, 2)
    assert one.keys() == many.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, many[name]), name
        what = kind(name, tuple(tensor.shape))
        if what == "matrix":
            # five standard errors
            error = 0.02 / tensor.numel() ** 0.5
            assert abs(tensor.mean()) < 5 * error
            assert abs(tensor.std() - 0.02) < 5 * error / 2**0.5
        else:
            assert (tensor == {"scale": 0.1, "bias": 0.0, "norm": 1.0}[what]).all(), name
    matrices = [t.flatten()[:40] for n, t in one.items() if kind(n, tuple(t.shape)) == "matrix"]
    assert len(torch.stack(matrices).unique(dim=0)) == len(matrices), "two weights are the same"

    vision, llm = tiny_vision_config(), tiny_llm_config(300)
    expected = {
        "vision_model": sum(map(prod, vision_shapes(vision).values())),
        "vision_projection": sum(map(prod, projector_shapes(vision, llm).values())),
        "language_model": sum(map(prod, llm_shapes(llm).values())),
    }
    assert counts == [expected]
    assert counts_of_two == [
        {**expected, "vision_projection": 0, "language_model": 0},
        {**expected, "vision_model": 0},
    ]


def _marks(tp_size: int) -> dict[str, tuple[tuple[int, ...], Any]]:
    chunk, _ = _build(tp_size, 1)
    return {
        name: (tuple(p.shape), getattr(p, "tensor_model_parallel", False))
        for name, p in chunk.named_parameters()
    }


@pytest.mark.distributed
def test_every_shard_is_marked_for_the_gradient_norm_and_nothing_else() -> None:
    """An unmarked shard would be counted on one rank only, a marked copy on both."""
    (whole,) = run_ranks(1, _marks, 1)
    for rank in run_ranks(2, _marks, 2):
        assert rank.keys() == whole.keys()
        for name, (shape, marked) in rank.items():
            assert marked is (shape != whole[name][0]), name


class WithExtraState(torch.nn.Linear):
    """A linear layer with state beside its weights, as transformer-engine's keep for fp8."""

    def get_extra_state(self) -> Tensor:
        """An empty tensor."""
        return torch.empty(0)

    def set_extra_state(self, state: Any) -> None:
        """There is nothing to take."""


class StandIn(torch.nn.ModuleDict):
    """A layer like transformer-engine's and an ordinary one, as a chunk describes itself."""

    def __init__(self) -> None:
        super().__init__({"te": WithExtraState(2, 3), "norm": torch.nn.LayerNorm(3)})

    def sharded_state_dict(self, prefix: str, metadata: dict[str, Any]) -> dict[str, Any]:
        """Every parameter whole, and the extra state."""
        state: dict[str, Any] = {
            prefix + name: ShardedTensor.from_rank_offsets(prefix + name, parameter)
            for name, parameter in self.named_parameters()
        }
        return state | {f"{prefix}te._extra_state": "never written"}


GROUPS: Any = SimpleNamespace(dp_cp=None)


def complete(chunk: Any) -> dict[str, Tensor]:
    """A value for each parameter under its name in a checkpoint."""
    return {
        f"model.{name}": torch.full_like(parameter, 1.0 + number)
        for number, (name, parameter) in enumerate(chunk.named_parameters())
    }


def test_extra_state_is_not_asked_for() -> None:
    chunk: Any = StandIn()
    assert "te._extra_state" in chunk.state_dict()
    assert list(model_state([chunk], GROUPS)) == list(complete(chunk))
    tensors = complete(chunk)
    load_weights([chunk], GROUPS, tensors)
    for name, parameter in chunk.named_parameters():
        assert torch.equal(parameter, tensors[f"model.{name}"]), name


def test_weights_that_are_missing_or_too_many_are_named() -> None:
    chunk: Any = StandIn()
    tensors = complete(chunk)
    del tensors["model.norm.bias"]
    with pytest.raises(CheckpointError, match=r"do not fit the model: missing \['norm\.bias'\]"):
        load_weights([chunk], GROUPS, tensors)
    tensors = complete(chunk) | {"model.head.weight": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"nobody asked for \['model\.head\.weight'\]"):
        load_weights([chunk], GROUPS, tensors)
