"""Every setting is either fixed within a run or may change, and all changes are told at once."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mmlm.config.load import apply_overrides, to_json
from mmlm.config.resume import CHANGEABLE, FIXED, changed_settings, setting_names
from mmlm.config.schema import RunConfig

OTHER: dict[str, str] = {
    "train.global_batch_size": "8",
    "train.train_iters": "7",
    "train.epochs": "2",
    "train.seed": "7",
    "data.seed": "7",
    "train.drop_path_seed": "7",
    "train.dtype": "fp32",
    "train.loss_weight": "square",
    "train.loss_group_size": "4",
    "train.vision_drop_path_rate": "0.1",
    "train.freeze_vision_model": "true",
    "train.freeze_vision_projection": "true",
    "train.freeze_language_model": "true",
    "data.seq_length": "1024",
    "data.packing": "none",
    "data.special_literals": "tokens",
    "optimizer.lr": "2e-5",
    "optimizer.min_lr": "1e-6",
    "optimizer.lr_warmup_fraction": "0.1",
    "optimizer.weight_decay": "0.1",
    "optimizer.decay": "matrices_only",
    "optimizer.adam_beta1": "0.8",
    "optimizer.adam_beta2": "0.95",
    "optimizer.adam_eps": "1e-6",
    "optimizer.clip_grad": "0.5",
}


def test_every_setting_is_in_one_table() -> None:
    assert FIXED.keys() & CHANGEABLE.keys() == set()
    assert sorted(FIXED.keys() | CHANGEABLE.keys()) == sorted(setting_names())


@pytest.mark.parametrize("key", FIXED)
def test_each_fixed_setting_is_noticed(key: str) -> None:
    before = RunConfig()
    now = apply_overrides(before, [f"{key}={OTHER[key]}"])
    (change,) = {text.split(" ")[0] for text in changed_settings(to_json(before), now)}
    assert change == key


def test_all_changes_are_told() -> None:
    now = apply_overrides(RunConfig(), ["optimizer.lr=2e-5", "data.packing=none", "data.seed=3"])
    assert changed_settings(to_json(RunConfig()), now) == [
        "data.packing was pack and is none",
        "optimizer.lr was 1e-05 and is 2e-05",
        "data.seed was 42 and is 3",
    ]


@pytest.mark.parametrize(
    "settings",
    [
        ["parallel.tensor_model_parallel_size=2", "train.micro_batch_size=4"],
        ["data.meta=elsewhere.json", "output_dir=moved", "data.num_workers=9"],
        ["train.init_seed=5", "checkpoint.save_interval=1", "train.deterministic=true"],
        # the same seeds, said in another way
        ["data.seed=42", "train.drop_path_seed=42"],
        ["train.seed=7", "data.seed=42", "train.drop_path_seed=42"],
    ],
)
def test_what_may_change_is_let_through(settings: list[str]) -> None:
    assert changed_settings(to_json(RunConfig()), apply_overrides(RunConfig(), settings)) == []


def test_a_field_that_an_old_checkpoint_does_not_know_had_its_default() -> None:
    before: dict[str, Any] = to_json(RunConfig())
    for name in ("drop_path_seed", "init_seed", "vision_drop_path_mode"):
        del before["train"][name]
    del before["data"]["seed"], before["data"]["special_literals"]
    assert changed_settings(before, RunConfig()) == []
    now = replace(RunConfig(), data=replace(RunConfig().data, special_literals="tokens"))
    assert changed_settings(before, now) == ["data.special_literals was exclude and is tokens"]


def test_the_document_names_every_fixed_setting() -> None:
    text = (Path(__file__).resolve().parents[3] / "docs/running.md").read_text(encoding="utf-8")
    table = text[text.index("| cannot change |") : text.index("| may change |")]
    for key in FIXED:
        group = re.sub(r"^optimizer\..*", "optimizer.*", key)
        group = re.sub(r"^train\.freeze_.*", "train.freeze_*", group)
        assert f"`{group}`" in table, key
