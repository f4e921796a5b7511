"""The recipes say what was published."""

from pathlib import Path

import pytest

from mmlm.config.load import apply_overrides, load_recipe
from mmlm.config.schema import RunConfig

ROOT = Path(__file__).resolve().parents[3]


def recipe(function: str) -> RunConfig:
    return load_recipe(f"{ROOT / 'examples/internvl_v1_2/recipe.py'}:{function}")


def test_finetune_is_the_published_run() -> None:
    config = recipe("finetune")
    assert config.train.global_batch_size == 512
    assert config.train.epochs == 1
    assert config.train.train_iters is None
    assert config.train.dtype == "bf16"
    assert config.train.vision_drop_path_rate == 0.4
    assert config.data.seq_length == 2048
    assert config.optimizer.lr == 1e-5
    assert config.optimizer.min_lr == 0.0
    assert config.optimizer.lr_warmup_fraction == 0.03
    assert config.optimizer.weight_decay == 0.05
    assert config.optimizer.decay == "all"
    assert (config.optimizer.adam_beta1, config.optimizer.adam_beta2) == (0.9, 0.999)
    assert config.optimizer.clip_grad == 1.0
    assert (config.checkpoint.save_interval, config.checkpoint.save_total_limit) == (200, 3)
    frozen = (
        config.train.freeze_vision_model,
        config.train.freeze_vision_projection,
        config.train.freeze_language_model,
    )
    assert frozen == (False, False, False)


@pytest.mark.parametrize("gpus", [32, 64])
def test_layout_fits_the_published_machines(gpus: int) -> None:
    parallel = recipe("finetune").parallel
    model = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    assert gpus % model == 0
    assert recipe("finetune").train.global_batch_size % (gpus // model) == 0


def test_second_finetune_differs_where_published() -> None:
    first, second = recipe("finetune"), recipe("second_finetune")
    assert second.train.global_batch_size == 128
    assert second.train.freeze_vision_model
    assert second.train.vision_drop_path_rate == 0.0
    assert second.optimizer == first.optimizer
    assert second.output_dir != first.output_dir


def test_tiny_runs_on_a_cpu() -> None:
    config = recipe("tiny")
    assert config.train.dtype == "fp32"
    assert config.parallel.tensor_model_parallel_size == 2
    assert config.parallel.pipeline_model_parallel_size == 2


def test_what_pretrain_sets_exists() -> None:
    words = Path(ROOT / "examples/internvl_v1_2/pretrain.sh").read_text("utf-8").split()
    fields = {word.strip('"').partition("=")[0] for word in words if word.startswith('"')}
    sections = ("parallel.", "train.", "data.", "checkpoint.", "backend.device", "output_dir")
    fields = {field for field in fields if field.startswith(sections)}
    assert len(fields) >= 9
    values = {"backend.device": "cpu", "data.policy": "skip"}
    apply_overrides(recipe("tiny"), [f"{field}={values.get(field, '8')}" for field in fields])
