"""Every rule of a section has a case that breaks it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from mmlm.config.schema import (
    CheckpointConfig,
    DataConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from mmlm.errors import ConfigError


def test_fields_cannot_be_overwritten() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunConfig().train.seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        (
            ParallelConfig,
            {"tensor_model_parallel_size": 0},
            "parallel: tensor_model_parallel_size 0 must be at least 1",
        ),
        (
            ParallelConfig,
            {"pipeline_model_parallel_size": -1},
            "parallel: pipeline_model_parallel_size -1 must be at least 1",
        ),
        (
            ParallelConfig,
            {"overlap_param_gather": True},
            "parallel: overlap_param_gather needs overlap_grad_reduce",
        ),
        (
            ParallelConfig,
            {"ddp_bucket_size": 1000},
            "parallel: ddp_bucket_size 1000 must be at least 1, and needs overlap_grad_reduce",
        ),
        (
            TrainConfig,
            {"vision_drop_path_mode": "keep"},
            "train: vision_drop_path_mode 'keep' must be skip or mask",
        ),
        (DataConfig, {"seq_length": 7}, "data: seq_length 7 must be at least 8"),
        (DataConfig, {"policy": "zero"}, "data: policy 'zero' must be strict or skip"),
        (
            DataConfig,
            {"special_literals": "text"},
            "data: special_literals 'text' must be exclude or tokens",
        ),
        (DataConfig, {"num_workers": -1}, "data: num_workers -1 must be at least 0"),
        (DataConfig, {"prefetch_iterations": 0}, "data: prefetch_iterations 0 must be at least 1"),
        (
            DataConfig,
            {"packing": "padded"},
            "data: packing 'padded' must be pack, none, group_by_length or published",
        ),
        (TrainConfig, {"global_batch_size": 0}, "train: global_batch_size 0 must be at least 1"),
        (TrainConfig, {"micro_batch_size": 0}, "train: micro_batch_size 0 must be at least 1"),
        (TrainConfig, {"dtype": "fp16"}, "train: dtype 'fp16' must be bf16 or fp32"),
        (
            TrainConfig,
            {"loss_weight": "mean"},
            "train: loss_weight 'mean' must be token, sample, square or micro_batch_mean",
        ),
        (
            TrainConfig,
            {"vision_drop_path_rate": 1.0},
            "train: vision_drop_path_rate 1.0 must be in [0, 1)",
        ),
        (
            TrainConfig,
            {
                "freeze_vision_model": True,
                "freeze_vision_projection": True,
                "freeze_language_model": True,
            },
            "train: all three parts are frozen: nothing would be trained",
        ),
        (TrainConfig, {"train_iters": 0}, "train: train_iters 0 must be at least 1"),
        (TrainConfig, {"epochs": 0}, "train: epochs 0 must be at least 1"),
        (TrainConfig, {"seed": -1}, "train: seed -1 must be at least 0"),
        (
            TrainConfig,
            {"max_nonfinite_iterations": 0},
            "train: max_nonfinite_iterations 0 must be at least 1",
        ),
        (TrainConfig, {"loss_spike_factor": -1.0}, "loss_spike_factor -1.0 must be at least 0"),
        (TrainConfig, {"loss_spike_window": 19}, "loss_spike_window 19 must be at least 20"),
        (ParallelConfig, {"timeout_minutes": 0.0}, "timeout_minutes 0.0 must be positive"),
        (OptimizerConfig, {"lr": 0.0}, "optimizer: lr 0.0 must be positive"),
        (OptimizerConfig, {"lr": float("nan")}, "optimizer: lr nan must be positive"),
        (
            OptimizerConfig,
            {"lr": 1e-5, "min_lr": 2e-5},
            "optimizer: min_lr 2e-05 must be from 0 to lr 1e-05",
        ),
        (OptimizerConfig, {"min_lr": -1.0}, "optimizer: min_lr -1.0 must be from 0 to lr"),
        (
            OptimizerConfig,
            {"lr_warmup_fraction": 1.0},
            "optimizer: lr_warmup_fraction 1.0 must be in [0, 1)",
        ),
        (OptimizerConfig, {"weight_decay": -0.1}, "weight_decay -0.1 must be at least 0"),
        (OptimizerConfig, {"adam_beta1": 1.0}, "adam_beta1 1.0 must be in [0, 1)"),
        (OptimizerConfig, {"adam_beta2": -0.1}, "adam_beta2 -0.1 must be in [0, 1)"),
        (OptimizerConfig, {"clip_grad": -1.0}, "clip_grad -1.0 must be at least 0"),
        (
            OptimizerConfig,
            {"decay": "some"},
            "optimizer: decay 'some' must be all, matrices_only or huggingface",
        ),
        (
            TrainConfig,
            {"recompute_vision_model": "some"},
            "train: recompute_vision_model 'some' must be none, selective or full",
        ),
        (
            ParallelConfig,
            {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 1},
            "parallel: virtual_pipeline_model_parallel_size 1 must be at least 2",
        ),
        (
            ParallelConfig,
            {"virtual_pipeline_model_parallel_size": 2},
            "needs pipeline_model_parallel_size of at least 2",
        ),
        (CheckpointConfig, {"save_total_limit": -1}, "save_total_limit -1 must be at least 0"),
        (CheckpointConfig, {"save_interval": -1}, "save_interval -1 must be at least 0"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_broken_rule_is_named(
    section: Callable[..., object], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        section(**changes)
    assert message in str(caught.value)


def test_all_broken_rules_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig(global_batch_size=0, epochs=0, dtype="fp16")  # type: ignore[arg-type]
    assert str(caught.value) == (
        "train: global_batch_size 0 must be at least 1; dtype 'fp16' must be bf16 or fp32; "
        "epochs 0 must be at least 1"
    )


def test_what_virtual_stages_and_sequence_parallelism_ask_of_the_batch() -> None:
    plain = ParallelConfig(pipeline_model_parallel_size=4, sequence_parallel=True)
    assert (plain.num_stages, plain.microbatch_multiple, plain.token_multiple) == (4, 1, 1)
    assert not plain.uses_sequence_parallel, "there is nobody to share with at TP 1"
    both = ParallelConfig(
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=4,
        virtual_pipeline_model_parallel_size=3,
        sequence_parallel=True,
    )
    assert (both.num_stages, both.microbatch_multiple, both.token_multiple) == (12, 4, 2)
