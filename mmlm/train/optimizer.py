"""DDP, AdamW over its shards, and the schedule of the learning rate: all megatron-core's."""

import math
from collections.abc import Sequence

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from mmlm.config.schema import OptimizerConfig, ParallelConfig
from mmlm.models.internvl_model import InternVLModel
from mmlm.parallel.topology import Topology


def wrap_ddp(
    chunks: Sequence[InternVLModel], topology: Topology, parallel: ParallelConfig | None = None
) -> list[DistributedDataParallel]:
    """Give each chunk fp32 gradient buffers that are summed (never averaged) over the DP ranks.

    Every token carries its final weight, so gradients are plain sums over microbatches and ranks:
    megatron-core is told not to divide by a token count.

    Args:
        chunks: this rank's model.
        topology: its place.
        parallel: whether reduction and gathering overlap with computation; neither when None.

    Returns:
        The wrapped chunks. With ``overlap_param_gather`` a rank holds only its own part of the
        updated weights until the next forward pass: call `gather_parameters` before reading them.
    """
    parallel = parallel or ParallelConfig()
    model = [
        DistributedDataParallel(
            config=chunk.config,
            ddp_config=DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                use_distributed_optimizer=True,
                overlap_grad_reduce=parallel.overlap_grad_reduce,
                overlap_param_gather=parallel.overlap_param_gather,
                bucket_size=parallel.ddp_bucket_size,
            ),
            module=chunk,
            disable_bucketing=index > 0,
            pg_collection=topology.groups,
        )
        for index, chunk in enumerate(chunks)
    ]
    for chunk in chunks:
        chunk.config.finalize_model_grads_func = _sum_gradients
        if parallel.overlap_grad_reduce:
            # gradients of all but the last microbatch are only accumulated
            no_sync = [wrapped.no_sync for wrapped in model]
            chunk.config.no_sync_func = no_sync if len(model) > 1 else no_sync[0]
    return model


def gather_parameters(model: Sequence[DistributedDataParallel]) -> None:
    """Make the weights of all DP ranks whole after an optimizer step; collective.

    Without ``overlap_param_gather`` they already are, and nothing is sent.
    """
    for chunk in model:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def _sum_gradients(
    model: list[torch.nn.Module], num_tokens: torch.Tensor | None, **kwargs: object
) -> None:
    finalize_model_grads(model, None, **kwargs)


def make_optimizer(
    model: Sequence[DistributedDataParallel], optimizer: OptimizerConfig, dtype: torch.dtype
) -> MegatronOptimizer:
    """Build megatron-core's distributed optimizer; collective.

    Args:
        model: the wrapped chunks.
        optimizer: settings.
        dtype: of the weights; main weights and Adam moments are fp32.

    Returns:
        The optimizer; on a rank whose parts are all frozen it holds no parameters.
    """
    config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.adam_beta1,
        adam_beta2=optimizer.adam_beta2,
        adam_eps=optimizer.adam_eps,
        clip_grad=optimizer.clip_grad,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=True,
        overlap_param_gather=any(chunk.ddp_config.overlap_param_gather for chunk in model),
    )
    no_decay = ParamKey(
        with_name_predicate=ParamWithNamePredicate(
            name=f"no_decay_{optimizer.decay}",
            fn=lambda parameter, name: (
                not decays(optimizer.decay, name.removeprefix("module."), parameter.dim())
            ),
        )
    )
    return get_megatron_optimizer(
        config,
        list(model),
        config_overrides={no_decay: {"wd_mult": 0.0}},
        use_gloo_process_groups=False,
    )


@torch.no_grad()
def step_if_finite(optimizer: MegatronOptimizer) -> float:
    """Clip and update, unless the gradient norm is not finite: then nothing changes; collective.

    The parts of megatron-core's ``step()``, which would clip with a norm of NaN and go on.

    Args:
        optimizer: from `make_optimizer`.

    Returns:
        The global norm before clipping, the same on every rank. If it is not finite, weights, Adam
        moments and step counts are as they were.
    """
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    if not math.isfinite(norm):
        return norm
    for part in optimizer.chained_optimizers:
        parameters = [] if part.is_stub_optimizer else part.get_parameters()
        if parameters and part.config.clip_grad > 0.0:
            clip_grad_by_total_norm_fp32(
                parameters, max_norm=part.config.clip_grad, total_norm=norm
            )
    optimizer.step_with_ready_grads()
    return norm


def decays(rule: str, name: str, num_dims: int) -> bool:
    """Whether weight decay applies to a parameter.

    ``all`` is what the published run did (DeepSpeed built one group). ``matrices_only`` is the
    usual rule. ``huggingface`` is what ``transformers.Trainer.get_decay_parameter_names`` would
    have chosen: it excludes biases, the projection's LayerNorm and the decoder's RMSNorms, but not
    the tower's norms, whose class it does not know.

    Args:
        rule: "all", "matrices_only" or "huggingface".
        name: name of the parameter in `InternVLModel`.
        num_dims: of the parameter.

    Returns:
        True if it decays.
    """
    if rule == "all":
        return True
    if rule == "matrices_only":
        return num_dims >= 2
    norm = "layernorm" in name and not name.startswith("vision_model.")
    return not (norm or name.endswith("bias"))


def warmup_iterations(fraction: float, train_iters: int) -> int:
    """``ceil(fraction * train_iters)``, as HuggingFace's ``warmup_ratio``."""
    return math.ceil(fraction * train_iters)


def make_scheduler(
    optimizer: MegatronOptimizer, config: OptimizerConfig, train_iters: int, iteration: int = 0
) -> OptimizerParamScheduler:
    """Linear warm-up from exactly 0, then a cosine to ``min_lr``; one step an iteration.

    The rate of iteration k (from 0) is ``lr * k / warmup`` and later
    ``lr * (1 + cos(pi * (k - warmup) / (train_iters - warmup))) / 2``.

    Args:
        optimizer: whose groups are set.
        config: settings.
        train_iters: iterations of the whole run.
        iteration: iterations already done.

    Returns:
        The scheduler, with the rates of ``iteration`` set.
    """
    warmup = warmup_iterations(config.lr_warmup_fraction, train_iters)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=warmup,
        # megatron-core wants a decay after the warm-up even where the run ends with it
        lr_decay_steps=max(train_iters, warmup + 1),
        lr_decay_style="cosine",
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=train_iters,
        wd_incr_style="constant",
    )
    if iteration:
        scheduler.step(increment=iteration)
    return scheduler
