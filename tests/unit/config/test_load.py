"""Recipes, overrides of every type, and each way in which they can be wrong."""

import dataclasses
import json
from pathlib import Path

import pytest

from mmlm.config.load import apply_overrides, load_recipe, to_json, write_resolved
from mmlm.config.presets import tiny
from mmlm.config.schema import OptimizerConfig, RunConfig, TrainConfig
from mmlm.errors import ConfigError

RECIPE = """
from mmlm.config.presets import tiny
from mmlm.config.schema import RunConfig

def small():
    return RunConfig(output_dir="here", model=tiny())

def _private():
    return RunConfig()

def number():
    return 7
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe file with a good function, a private one and one that returns something else."""
    file = tmp_path / "some_recipe.py"
    file.write_text(RECIPE)
    return file


def test_recipe_is_called(recipe: Path) -> None:
    assert load_recipe(f"{recipe}:small") == RunConfig(output_dir="here", model=tiny())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{file}", "must read FILE:FUNCTION, e.g. recipe.py:finetune"),
        ("{file}:", "must read FILE:FUNCTION"),
        ("gone.py:small", "--recipe: the file 'gone.py' does not exist"),
        ("{file}:big", "has no function 'big'; it has ['number', 'small', 'tiny']"),
        ("{file}:_private", "has no function '_private'"),
        ("{file}:number", "some_recipe.py:number must return a mmlm RunConfig"),
    ],
)
def test_recipe_that_cannot_be_used(recipe: Path, spec: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(spec.format(file=recipe))
    assert message in str(caught.value)


def test_override_of_each_type() -> None:
    start = RunConfig(model=tiny(), train=TrainConfig(train_iters=3))
    config = apply_overrides(
        start,
        [
            "optimizer.lr=2e-5",
            "train.global_batch_size = 64",
            "train.train_iters=none",
            "train.freeze_vision_model=True",
            "train.dtype=fp32",
            "parallel.pipeline_layout=vv|vpEt|ttL",
            "data.meta=a=b.json",
            "model.vision.num_layers=2",
            "train.global_batch_size=32",  # the last one counts
        ],
    )
    assert config == RunConfig(
        model=dataclasses.replace(tiny(), vision=dataclasses.replace(tiny().vision, num_layers=2)),
        optimizer=OptimizerConfig(lr=2e-5),
        train=TrainConfig(global_batch_size=32, freeze_vision_model=True, dtype="fp32"),
        parallel=dataclasses.replace(start.parallel, pipeline_layout="vv|vpEt|ttL"),
        data=dataclasses.replace(start.data, meta="a=b.json"),
    )
    assert type(config.train.global_batch_size) is int
    assert apply_overrides(start, ["model=none"]).model is None
    assert apply_overrides(start, ["train.train_iters=9"]).train.train_iters == 9
    assert apply_overrides(start, ["train.freeze_vision_model=false"]) == start


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.seed", "--set 'train.seed' must read section.field=value"),
        (
            "optimizer.learning_rate=1",
            "--set optimizer.learning_rate: there is no field 'learning_rate'; the nearest is",
        ),
        ("trian.seed=1", "there is no field 'trian'; the nearest is 'train'"),
        ("train.global_batchsize=1", "the nearest is 'global_batch_size'"),
        ("train.seed=many", "--set train.seed=many: must be of type int"),
        ("train.seed=1.5", "--set train.seed=1.5: must be of type int"),
        ("train.seed=none", "--set train.seed=none: must be of type int"),
        ("train.train_iters=all", "--set train.train_iters=all: must be of type int"),
        ("optimizer.lr=fast", "--set optimizer.lr=fast: must be of type float"),
        ("train.freeze_vision_model=1", "train.freeze_vision_model=1: must be true or false"),
        ("train.dtype=fp16", "--set train.dtype=fp16: choose one of bf16, fp32"),
        ("train=none", "--set train: name a field inside 'train', not the whole section"),
        ("train.seed.low=1", "--set train.seed.low: 'seed' has no fields of its own here"),
        ("model.vision.num_layers=2", "'model' has no fields of its own here"),
        ("train.epochs=0", "train: epochs 0 must be at least 1"),
    ],
)
def test_override_that_cannot_be_used(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        apply_overrides(RunConfig(), [override])
    assert message in str(caught.value)


def test_unknown_field_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"\(all: load, save_interval, keep\)"):
        apply_overrides(RunConfig(), ["checkpoint.save=1"])


def test_resolved_config_is_json_that_keeps_everything(tmp_path: Path) -> None:
    config = RunConfig(output_dir="ausgabe/ä", model=tiny(), optimizer=OptimizerConfig(lr=1e-5))
    file = tmp_path / "config.json"
    write_resolved(config, file)
    text = file.read_text("utf-8")
    assert json.loads(text) == to_json(config)
    assert "ausgabe/ä" in text and text.endswith("}\n")
    assert to_json(config)["model"]["vision"]["num_attention_heads"] == 5
    assert to_json(config)["optimizer"]["lr"] == 1e-5
