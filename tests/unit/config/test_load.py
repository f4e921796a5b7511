"""Recipes, overrides of every type, and each way in which they can be wrong."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from mmlm.config.load import apply_overrides, from_json, load_recipe, to_json, write_resolved
from mmlm.config.model import ModelConfig
from mmlm.config.presets import tiny
from mmlm.config.schema import (
    CheckpointConfig,
    DataConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
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
    ("overrides", "changed"),
    [
        # min_lr above the lr of the start; nothing left to train; heads that do not divide
        (("optimizer.min_lr=2e-5", "optimizer.lr=3e-5"), {"min_lr": 2e-5, "lr": 3e-5}),
        (
            (
                "train.freeze_vision_model=false",
                "train.freeze_vision_projection=true",
                "train.freeze_language_model=true",
            ),
            {"freeze_vision_projection": True, "freeze_language_model": True},
        ),
        (
            ("model.vision.hidden_size=42", "model.vision.num_attention_heads=6"),
            {"hidden_size": 42, "num_attention_heads": 6},
        ),
    ],
)
def test_overrides_of_a_section_are_made_at_once(
    overrides: tuple[str, ...], changed: dict[str, Any]
) -> None:
    """One by one they break a rule in some order; together they keep it in every order."""
    start = RunConfig(model=tiny(), train=TrainConfig(freeze_vision_model=True))
    for order in itertools.permutations(overrides):
        config = apply_overrides(start, order)
        assert config.model is not None
        sections = vars(config.train) | vars(config.optimizer) | vars(config.model.vision)
        assert {name: sections[name] for name in changed} == changed

    def one_by_one(order: tuple[str, ...]) -> bool:
        config = start
        try:
            for override in order:
                config = apply_overrides(config, [override])
        except ConfigError:
            return False
        return True

    assert not all(one_by_one(order) for order in itertools.permutations(overrides))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model=none", "model.vision.num_layers=2"],
            "--set model.vision.num_layers: 'model' was set as a whole before",
        ),
        (
            ["model.vision.num_layers=2", "model=none"],
            "--set model: fields inside 'model' were set before",
        ),
    ],
)
def test_a_section_is_set_as_a_whole_or_by_field(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        apply_overrides(RunConfig(model=tiny()), overrides)
    assert str(caught.value) == message


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
    with pytest.raises(
        ConfigError,
        match=r"\(all: load, load_hf, resume, save_interval, async_save, save_total_limit, verify, "
        r"export_hf_interval\)",
    ):
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


@pytest.mark.parametrize("model", [None, dataclasses.replace(tiny(), ps_version="v2")])
def test_resolved_config_reads_back(tmp_path: Path, model: ModelConfig | None) -> None:
    """Every section with another value than its default, through the text of a file."""
    config = RunConfig(
        output_dir="ausgabe/ä",
        model=model,
        parallel=ParallelConfig(tensor_model_parallel_size=2, pipeline_layout="vv|vpEt|ttL"),
        data=DataConfig(meta="a.json", policy="skip"),
        eval_meta="held_out.json",
        train=TrainConfig(train_iters=7, dtype="fp32", freeze_vision_model=True),
        optimizer=OptimizerConfig(lr=1e-5, min_lr=3e-7),
        checkpoint=CheckpointConfig(load="there", save_total_limit=0),
    )
    file = tmp_path / "config.json"
    write_resolved(config, file)
    back = from_json(RunConfig, json.loads(file.read_text("utf-8")))
    assert back == config and type(back) is RunConfig and type(back.train) is TrainConfig
    assert back.model is None if model is None else type(back.model) is ModelConfig


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        (RunConfig, 3, "RunConfig must be an object of its fields, found 3"),
        (RunConfig, {"train": None}, "TrainConfig must be an object of its fields, found None"),
        (RunConfig, {"train": {"sed": 1, "bed": 2}}, "TrainConfig has no field 'bed', 'sed'"),
        (RunConfig, {"train": {"epochs": 0}}, "train: epochs 0 must be at least 1"),
        (ModelConfig, {"ps_version": "v1"}, "ModelConfig: "),  # python names what is missing
    ],
)
def test_what_is_no_config_is_refused(kind: type, content: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_json(kind, content)
    assert str(caught.value).startswith(message)
    if message == "ModelConfig: ":
        assert "'vision' and 'language'" in str(caught.value)
