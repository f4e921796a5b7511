"""Where a run begins that reads HuggingFace weights directly."""

import dataclasses
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mmlm.checkpoint.manifest import ASSETS_DIR
from mmlm.config.load import apply_overrides
from mmlm.config.presets import tiny
from mmlm.config.schema import CheckpointConfig, DataConfig, RunConfig
from mmlm.conversion.convert import hf_to_megatron
from mmlm.data.tokenizer import Tokenizer
from mmlm.errors import CheckpointError, ConfigError
from mmlm.train.start import Start, checkpoint_root, find_start, load_assets, load_tokenizer
from tests.tiny_data import make_tokenizer
from tests.tiny_weights import tiny_llm_config, tiny_vision_config, write_parts
from tests.unit.train.test_setup import write_checkpoint


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """Parts whose vocabulary lacks the nine tokens."""
    make_tokenizer(tmp_path / "hf" / "llm")
    write_parts(tmp_path / "hf", tiny_vision_config(), tiny_llm_config(448))
    return tmp_path / "hf"


def run_config(tmp_path: Path, load_hf: Path) -> RunConfig:
    return RunConfig(
        output_dir=str(tmp_path / "run"), checkpoint=CheckpointConfig(load_hf=str(load_hf))
    )


def test_sizes_tokenizer_and_small_files_come_from_the_folder(parts: Path, tmp_path: Path) -> None:
    config = run_config(tmp_path, parts)
    start = find_start(config)
    assert (start.checkpoint, start.resumes, start.iteration) == (None, False, 0)
    assert start.model.language.vocab_size == 448 + 9
    assert load_tokenizer(config, start).folder == parts / "llm"
    converted = hf_to_megatron(
        vision=parts / "vision", llm=parts / "llm", output=tmp_path / "converted"
    )
    assets = load_assets(config, start)
    assert assets == {file.name: file.read_bytes() for file in (converted / ASSETS_DIR).iterdir()}
    (tmp_path / "kept").mkdir()
    for name, content in assets.items():
        (tmp_path / "kept" / name).write_bytes(content)
    kept, used = Tokenizer(tmp_path / "kept"), Tokenizer(parts / "llm")
    assert (kept.fingerprint, kept.added_tokens) == (used.fingerprint, used.added_tokens)


def test_a_named_tokenizer_takes_the_place_of_the_folders(parts: Path, tmp_path: Path) -> None:
    other = make_tokenizer(tmp_path / "other")
    (other / "special_tokens_map.json").write_text('{"eos_token": "<|im_end|>"}\n')
    config = dataclasses.replace(run_config(tmp_path, parts), data=DataConfig(tokenizer=str(other)))
    start = find_start(config)
    assert load_tokenizer(config, start).folder == other
    content = (other / "special_tokens_map.json").read_bytes()
    assert load_assets(config, start)["special_tokens_map.json"] == content


def test_sizes_of_the_recipe_choose_images_and_layers(parts: Path, tmp_path: Path) -> None:
    """Everything else must be as in the files."""
    config = run_config(tmp_path, parts)
    model = find_start(config).model
    smaller = dataclasses.replace(
        model, vision=dataclasses.replace(model.vision, image_size=28, num_layers=2)
    )
    start = find_start(dataclasses.replace(config, model=smaller))
    assert start.model == smaller
    weights = start.open_hf()
    positions = weights.blocks().read(
        "vision_model.position_embedding", (slice(0, 1), slice(0, 5), slice(0, 40))
    )
    assert positions.shape == (1, 5, 40)
    other = dataclasses.replace(model, ps_version="v2")
    with pytest.raises(ConfigError, match=r"differs from the model in .*hf: "):
        find_start(dataclasses.replace(config, model=other))


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="gone: does not exist"):
        find_start(run_config(tmp_path, tmp_path / "gone"))


def test_two_sources_are_refused() -> None:
    with pytest.raises(ConfigError, match="load and load_hf are both given"):
        CheckpointConfig(load="a", load_hf="b")


def test_negative_intervals_are_refused() -> None:
    with pytest.raises(ConfigError, match="export_hf_interval -1 must be at least 0"):
        CheckpointConfig(export_hf_interval=-1)


def saved_run(tmp_path: Path, **settings: Any) -> tuple[RunConfig, Path]:
    """A run and its checkpoint after three iterations."""
    config = RunConfig(output_dir=str(tmp_path / "run"), **settings)
    return config, write_checkpoint(checkpoint_root(config), 3, config=config)


def test_no_resume_refuses_and_deletes_nothing(tmp_path: Path) -> None:
    config, checkpoint = saved_run(tmp_path)
    refusing = replace(config, checkpoint=replace(config.checkpoint, resume=False))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=r"run/checkpoints has checkpoints, .*\(--no-resume\)"):
        find_start(refusing)
    assert sorted(tmp_path.rglob("*")) == before
    assert find_start(config).checkpoint == checkpoint
    fresh = replace(refusing, output_dir=str(tmp_path / "other"), model=tiny())
    assert find_start(fresh).checkpoint is None


def test_a_resume_is_told_all_that_changed(tmp_path: Path) -> None:
    config, _ = saved_run(tmp_path)
    settings = ["optimizer.lr=3e-5", "train.freeze_vision_model=true", "train.train_iters=9"]
    with pytest.raises(ConfigError) as refusal:
        find_start(apply_overrides(config, [*settings, "data.num_workers=7"]))
    assert (
        "cannot be resumed with other settings: train.train_iters was None and is 9; "
        "train.freeze_vision_model was False and is True; optimizer.lr was 1e-05 and is 3e-05. "
        "Set them back, or start a new run"
    ) in str(refusal.value)


def test_another_tokenizer_is_another_setting(tmp_path: Path) -> None:
    for name in ("one", "same", "other"):
        make_tokenizer(tmp_path / name)
    size = Tokenizer(tmp_path / "other").vocab_size
    (tmp_path / "other" / "added_tokens.json").write_text(json.dumps({"<more>": size}), "utf-8")
    config, checkpoint = saved_run(tmp_path, data=DataConfig(tokenizer=str(tmp_path / "one")))
    shutil.copytree(tmp_path / "one", checkpoint / ASSETS_DIR)

    def start(name: str) -> Start:
        return find_start(replace(config, data=DataConfig(tokenizer=str(tmp_path / name))))

    assert start("same").checkpoint == checkpoint
    with pytest.raises(ConfigError, match=r"data\.tokenizer .*other encodes otherwise than"):
        start("other")
