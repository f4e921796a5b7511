"""Recipes of InternVL-Chat-V1-2: the published fine-tune, the second one, and the tiny demo.

A recipe is a function that returns a whole `RunConfig`; ``mmlm train --recipe FILE:FUNCTION`` calls
it and ``--set section.field=value`` changes single fields. ``pretrain.sh`` hands over what it read
from its environment that way; nothing here reads the environment.
"""

import dataclasses

from mmlm.config.schema import (
    CheckpointConfig,
    DataConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)


def finetune() -> RunConfig:
    """The published fine-tune on the nine sets: 40 B parameters trained on 32 or 64 GPUs.

    TP 4 and PP 2 leave DP 4 on 32 GPUs and DP 8 on 64; the global batch is 512 samples on both.
    Sequence parallelism and the overlap of communication with computation change no number.
    """
    return RunConfig(
        output_dir="work_dirs/internvl_chat_v1_2",
        parallel=ParallelConfig(
            tensor_model_parallel_size=4,
            pipeline_model_parallel_size=2,
            sequence_parallel=True,
            overlap_grad_reduce=True,
            overlap_param_gather=True,
        ),
        data=DataConfig(
            meta="examples/internvl_v1_2/data/internvl_1_2_finetune.json",
            seq_length=2048,
            num_workers=8,
            # a text that spells <img> or <|im_start|> is tokenized as published
            special_literals="tokens",
        ),
        train=TrainConfig(
            global_batch_size=512,
            micro_batch_size=1,
            epochs=1,
            dtype="bf16",
            vision_drop_path_rate=0.4,
        ),
        optimizer=OptimizerConfig(
            lr=1e-5,
            min_lr=0.0,
            lr_warmup_fraction=0.03,
            weight_decay=0.05,
            decay="all",
            adam_beta1=0.9,
            adam_beta2=0.999,
            adam_eps=1e-8,
            clip_grad=1.0,
        ),
        checkpoint=CheckpointConfig(save_interval=200, save_total_limit=3),
    )


def second_finetune() -> RunConfig:
    """The published fine-tune on top of V1-2: global batch 128, ViT frozen, no drop path.

    ``checkpoint.load`` names a converted V1-2 checkpoint, ``data.meta`` the data of your own.
    """
    first = finetune()
    return dataclasses.replace(
        first,
        output_dir="work_dirs/internvl_chat_v1_2_second_finetune",
        train=dataclasses.replace(
            first.train,
            global_batch_size=128,
            freeze_vision_model=True,
            vision_drop_path_rate=0.0,
        ),
    )


def tiny() -> RunConfig:
    """The demo on a CPU: 0.7 M parameters from random weights, TP 2 and PP 2 in four processes.

    The learning rate, the second moment's decay and the long warm-up are for training from
    scratch; sizes come from the demo's weights through the checkpoint.
    """
    return RunConfig(
        output_dir="work_dirs/internvl_chat_v1_2_tiny",
        parallel=ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2),
        data=DataConfig(
            meta="work_dirs/demo_cache/internvl_1_2_finetune.json", seq_length=1536, num_workers=0
        ),
        eval_meta="work_dirs/demo_cache/held_out.json",
        train=TrainConfig(
            global_batch_size=64,
            micro_batch_size=1,
            train_iters=600,
            dtype="fp32",
            vision_drop_path_rate=0.0,
        ),
        optimizer=OptimizerConfig(lr=1.5e-3, lr_warmup_fraction=0.1, adam_beta2=0.95),
        checkpoint=CheckpointConfig(
            load="work_dirs/demo_cache/converted", save_interval=300, save_total_limit=2
        ),
    )
