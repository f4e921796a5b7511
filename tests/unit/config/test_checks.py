"""Rules between sections: each broken one is named, and all at once."""

import dataclasses
from pathlib import Path

import pytest

from mmlm.config.checks import check_model, check_run
from mmlm.config.presets import tiny
from mmlm.config.schema import CheckpointConfig, DataConfig, RunConfig, TrainConfig
from mmlm.errors import ConfigError


@pytest.fixture
def good(tmp_path: Path) -> RunConfig:
    """A config that breaks no rule."""
    meta = tmp_path / "meta.json"
    meta.write_text("{}")
    return RunConfig(
        model=tiny(), data=DataConfig(meta=str(meta), tokenizer="tokenizer", seq_length=64)
    )


def test_good_config_passes(good: RunConfig) -> None:
    check_run(good)
    loaded = dataclasses.replace(
        good,
        model=None,
        data=dataclasses.replace(good.data, tokenizer=""),
        checkpoint=CheckpointConfig(load="somewhere"),
    )
    check_run(loaded)


def test_missing_files_are_named(good: RunConfig) -> None:
    config = dataclasses.replace(
        good, data=dataclasses.replace(good.data, meta="no.json"), eval_meta="none.json"
    )
    with pytest.raises(ConfigError) as caught:
        check_run(config)
    assert str(caught.value) == (
        "data.meta: the file 'no.json' does not exist; "
        "eval_meta: the file 'none.json' does not exist"
    )


def test_everything_that_is_missing_is_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        check_run(RunConfig(train=TrainConfig(eval_interval=5)))
    message = str(caught.value)
    for part in (
        "data.meta is empty: give the meta json",
        "model is not given and checkpoint.load and load_hf are empty",
        "data.tokenizer is empty and no checkpoint.load or load_hf is given",
        "train.eval_interval is set but eval_meta is empty",
    ):
        assert part in message


def test_model_that_fits_passes(good: RunConfig) -> None:
    check_model(good, tiny(), vocab_size=300)


@pytest.mark.parametrize(
    ("seq_length", "vocab_size", "message"),
    [
        (4097, 300, "data.seq_length 4097 is more than max_position_embeddings 4096"),
        (8, 301, "the tokenizer has 301 tokens, the model 300 rows: convert the weights again"),
    ],
)
def test_sizes_that_do_not_fit(
    good: RunConfig, seq_length: int, vocab_size: int, message: str
) -> None:
    config = dataclasses.replace(good, data=dataclasses.replace(good.data, seq_length=seq_length))
    with pytest.raises(ConfigError) as caught:
        check_model(config, tiny(), vocab_size)
    assert message in str(caught.value)


def test_pack_must_have_room_for_an_image(good: RunConfig) -> None:
    vision = dataclasses.replace(tiny().vision, image_size=448)
    model = dataclasses.replace(tiny(), vision=vision)
    for seq_length, fits in ((258, False), (259, True)):
        data = dataclasses.replace(good.data, seq_length=seq_length)
        config = dataclasses.replace(good, data=data)
        if fits:
            check_model(config, model, 300)
            continue
        with pytest.raises(ConfigError, match="258 has no room for one image of 256 tokens"):
            check_model(config, model, 300)
