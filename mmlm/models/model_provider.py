"""Build the stage's model for a run, give it weights, describe it."""

import hashlib
from collections.abc import Callable, Sequence

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, apply_factories
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)

from mmlm.config.model import ModelConfig
from mmlm.config.schema import ParallelConfig, TrainConfig
from mmlm.errors import CheckpointError, ConfigError
from mmlm.models.internvl_model import InternVLModel
from mmlm.models.transformer_config import make_transformer_configs
from mmlm.parallel.backend import Backend
from mmlm.parallel.stage_plan import StagePlan
from mmlm.parallel.topology import Topology

PARTS = ("vision_model", "vision_projection", "language_model")


def build_model(
    model: ModelConfig,
    plan: StagePlan,
    topology: Topology,
    backend: Backend,
    train: TrainConfig,
    parallel: ParallelConfig | None = None,
) -> list[InternVLModel]:
    """Build this rank's chunks with all parameters zero and frozen parts marked.

    Args:
        model: sizes.
        plan: where the layers are cut.
        topology: this rank's place.
        backend: which implementations.
        train: precision, recompute and what is frozen.
        parallel: virtual stages and sequence parallelism; neither when None.

    Returns:
        The chunks on the topology's device, one without virtual stages; `initialize_weights` or a
        checkpoint fills them.

    Raises:
        ConfigError: if TP does not divide the decoder's heads or groups or a width.
    """
    _check_divides(model, topology.tp_size)
    vpp_size = parallel.virtual_pipeline_model_parallel_size if parallel is not None else None
    configs = make_transformer_configs(
        model,
        plan,
        tp_size=topology.tp_size,
        pp_size=topology.pp_size,
        vpp_size=vpp_size,
        dtype=torch.bfloat16 if train.dtype == "bf16" else torch.float32,
        sequence_parallel=parallel is not None and parallel.uses_sequence_parallel,
        recompute_vision=train.recompute_vision_model,
        recompute_language=train.recompute_language_model,
        deterministic=train.deterministic,
    )
    chunks = []
    for index, layers in enumerate(plan.chunks[topology.pp_rank :: topology.pp_size]):
        vp_stage = None if vpp_size is None else index
        chunk = InternVLModel(configs, model, layers, backend, topology.groups, vp_stage)
        with torch.no_grad():
            for parameter in chunk.parameters():
                parameter.zero_()
        _mark_sharded_weights(chunk)
        for part in PARTS:
            module = getattr(chunk, part)
            if module is not None and getattr(train, f"freeze_{part}"):
                module.requires_grad_(False)
        chunks.append(chunk.to(topology.device))
    return chunks


def _mark_sharded_weights(chunk: InternVLModel) -> None:
    """Tell the global gradient norm which weights are shards.

    megatron-core marks them only when it also initializes them (``perform_initialization``), which
    we switch off; unmarked, the weights of every TP rank but the first would be left out of the
    norm and clipping would be silently wrong.
    """
    for module in chunk.modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear | VocabParallelEmbedding):
            module.weight.tensor_model_parallel = True


def _check_divides(model: ModelConfig, tp_size: int) -> None:
    language, vision = model.language, model.vision
    sizes = {
        "language.num_attention_heads": language.num_attention_heads,
        "language.num_query_groups": language.num_query_groups,
        "language.ffn_hidden_size": language.ffn_hidden_size,
        "language.hidden_size (projection)": language.hidden_size,
        "vision.ffn_hidden_size": vision.ffn_hidden_size,
    }
    broken = [f"{name} {size}" for name, size in sizes.items() if size % tp_size]
    if broken:
        raise ConfigError(
            f"tensor_model_parallel_size {tp_size} does not divide {', '.join(broken)}; choose a "
            "TP size that does (vision heads need not divide: they are padded)"
        )


def model_state(
    chunks: Sequence[InternVLModel], groups: ProcessGroupCollection, prefix: str = "model."
) -> ShardedStateDict:
    """Describe every parameter of this rank under its global name and true shape.

    Args:
        chunks: this rank's model, not wrapped.
        groups: its process groups.
        prefix: put before every name.

    Returns:
        Global name -> ``ShardedTensor`` or factory whose data is the parameter itself.
    """
    return {
        entry.key: entry
        for chunk in chunks
        for entry in _local_state(chunk, groups, prefix).values()
    }


def _local_state(
    chunk: InternVLModel, groups: ProcessGroupCollection, prefix: str
) -> ShardedStateDict:
    """The same for one chunk, keyed by the names that its ``load_state_dict`` wants."""
    state = chunk.sharded_state_dict(prefix=prefix, metadata=sharding_metadata(groups))
    # transformer-engine adds (empty) fp8 state, which other backends do not have
    return {
        name.removeprefix(prefix): entry
        for name, entry in state.items()
        if not name.endswith("_extra_state")
    }


def load_weights(
    chunks: Sequence[InternVLModel],
    groups: ProcessGroupCollection,
    tensors: dict[str, torch.Tensor],
) -> None:
    """Put what was loaded for `model_state` into the chunks.

    Args:
        chunks: this rank's model.
        groups: its process groups.
        tensors: global name with the prefix ``model.`` -> tensor.

    Raises:
        CheckpointError: if a parameter is left without a value, or one too many was read.
    """
    left = dict(tensors)
    for chunk in chunks:
        local = {
            name: left.pop(entry.key)
            for name, entry in _local_state(chunk, groups, "model.").items()
            if entry.key in left
        }
        # strict loading would ask for transformer-engine's fp8 state, which is never written
        missing, _ = chunk.load_state_dict(local, strict=False)
        missing = [name for name in missing if not name.endswith("_extra_state")]
        if missing:
            raise CheckpointError(f"weights do not fit the model: missing {missing}")
    if left:
        raise CheckpointError(f"weights do not fit the model: nobody asked for {sorted(left)}")


def sharding_metadata(groups: ProcessGroupCollection) -> dict:
    """What megatron-core's ``sharded_state_dict`` methods want to be told."""
    return {"dp_cp_group": groups.dp_cp, "non_homogeneous_layers": True}


@torch.no_grad()
def fill_weights(
    chunks: Sequence[InternVLModel],
    groups: ProcessGroupCollection,
    tensor: Callable[[str, tuple[int, ...]], torch.Tensor],
) -> None:
    """Copy into every parameter its block of a global tensor.

    Args:
        chunks: this rank's model.
        groups: its process groups.
        tensor: from a global name and the true global shape to the whole tensor (any device).
    """
    for shard in parameter_blocks(chunks, groups):
        whole = tensor(shard.key, shard.global_shape)
        shard.data.copy_(whole[shard.global_slice()])


def parameter_blocks(
    chunks: Sequence[InternVLModel], groups: ProcessGroupCollection
) -> list[ShardedTensor]:
    """This rank's blocks of the global tensors; their data are the parameters themselves.

    Args:
        chunks: this rank's model.
        groups: its process groups.

    Returns:
        Blocks under global names without a prefix; padding belongs to none of them.
    """
    state = model_state(chunks, groups, prefix="")
    apply_factories(state)
    return [shard for shard in nested_values(state) if isinstance(shard, ShardedTensor)]


def initialize_weights(
    chunks: Sequence[InternVLModel], groups: ProcessGroupCollection, seed: int, std: float = 0.02
) -> None:
    """Give the model fresh weights that depend on names and seed only, so not on the layout.

    Matrices and embeddings are N(0, std), norms 1, biases 0, LayerScale 0.1 (the initial value of
    the published tower).

    Args:
        chunks: this rank's model.
        groups: its process groups.
        seed: of the run.
        std: standard deviation of matrices.
    """

    def fresh(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        leaf = name.rsplit(".", 1)[-1]
        if leaf in ("attention_scale", "mlp_scale"):
            return torch.full(shape, 0.1)
        if leaf == "bias":
            return torch.zeros(shape)
        if len(shape) == 1:
            return torch.ones(shape)
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        return torch.randn(shape, generator=generator) * std

    fill_weights(chunks, groups, fresh)
