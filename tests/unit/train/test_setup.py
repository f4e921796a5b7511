"""Where a run begins: its own checkpoint, a named one or fresh weights, and what is refused."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmlm.checkpoint.manifest import ASSETS_DIR, LATEST_FILE, Manifest, iteration_name
from mmlm.config.load import apply_overrides, to_json
from mmlm.config.presets import tiny
from mmlm.config.schema import CheckpointConfig, DataConfig, RunConfig, TrainConfig
from mmlm.data.dataset import Dataset, open_dataset
from mmlm.data.sample import SampleSettings
from mmlm.data.tokenizer import Tokenizer
from mmlm.errors import CheckpointError, ConfigError, DataError
from mmlm.train import setup
from mmlm.train.setup import (
    data_fingerprint,
    open_data,
    refuse_different_data,
    refuse_other_data,
)
from mmlm.train.start import Start, checkpoint_root, find_start, load_tokenizer
from tests.distributed.launch import run_ranks
from tests.tiny_data import make_playground, make_tokenizer


def write_checkpoint(
    root: Path, iteration: int, *, config: RunConfig | None = None, has_optimizer: bool = True
) -> Path:
    """A checkpoint without tensors, of a run with these settings."""
    folder = root / iteration_name(iteration)
    folder.mkdir(parents=True)
    Manifest(
        iteration=iteration,
        consumed_samples=8 * iteration,
        dtype="fp32",
        model=tiny(),
        run_config=None if config is None else to_json(config),
        has_optimizer=has_optimizer,
    ).write(folder)
    (root / LATEST_FILE).write_text(folder.name)
    return folder


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """A run with nothing to load yet."""
    return RunConfig(output_dir=str(tmp_path / "run"), train=TrainConfig(global_batch_size=8))


def test_fresh_weights_need_sizes(config: RunConfig) -> None:
    start = find_start(dataclasses.replace(config, model=tiny()))
    assert (start.checkpoint, start.iteration, start.resumes) == (None, 0, False)
    assert start.model == tiny() and start.assets_dir is None
    with pytest.raises(ConfigError, match="model is not given and there is no checkpoint"):
        find_start(config)


def test_named_checkpoint_gives_weights_and_sizes(config: RunConfig, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "source", 7, has_optimizer=False)
    named = dataclasses.replace(config, checkpoint=CheckpointConfig(load=str(tmp_path / "source")))
    start = find_start(named)
    assert (start.checkpoint, start.iteration, start.resumes) == (folder, 0, False)
    assert start.model == tiny() and start.assets_dir is None
    (folder / ASSETS_DIR).mkdir()
    assert find_start(named).assets_dir == folder / ASSETS_DIR


def test_own_checkpoint_goes_before_the_named_one(config: RunConfig, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", 7)
    own = write_checkpoint(checkpoint_root(config), 3, config=config)
    named = dataclasses.replace(config, checkpoint=CheckpointConfig(load=str(tmp_path / "source")))
    start = find_start(named)
    assert (start.checkpoint, start.iteration, start.resumes) == (own, 3, True)
    # killed after the first save was complete and before it was named
    (checkpoint_root(config) / LATEST_FILE).unlink()
    assert find_start(named) == start
    # killed while the iteration was being replaced: resolve knows where the old one is
    own.rename(aside := own.with_name(f".{own.name}.replaced"))
    (checkpoint_root(config) / LATEST_FILE).write_text(own.name)
    assert find_start(named) == dataclasses.replace(start, checkpoint=aside)


def test_a_named_checkpoint_that_is_gone_is_no_fresh_start(config: RunConfig) -> None:
    """What ``latest`` names was there: starting over silently would throw a run away."""
    folder = write_checkpoint(checkpoint_root(config), 3, config=config)
    folder.rename(folder.with_name("elsewhere"))
    with pytest.raises(CheckpointError, match="latest: names iter_0000003, but"):
        find_start(dataclasses.replace(config, model=tiny()))


def test_other_sizes_in_the_recipe_are_refused(config: RunConfig) -> None:
    write_checkpoint(checkpoint_root(config), 3, config=config)
    assert find_start(dataclasses.replace(config, model=tiny())).iteration == 3
    other = dataclasses.replace(tiny(), ps_version="v2")
    with pytest.raises(ConfigError, match=r"model in the recipe differs.*leave model out"):
        find_start(dataclasses.replace(config, model=other))


def test_weights_alone_cannot_be_resumed(config: RunConfig) -> None:
    write_checkpoint(checkpoint_root(config), 3, config=config, has_optimizer=False)
    with pytest.raises(CheckpointError, match=r"has no optimizer state.*use another output_dir"):
        find_start(config)


FIXED = {
    "train.global_batch_size=16": "train.global_batch_size was 8 and is 16",
    "train.seed=7": "train.seed was 42 and is 7",
    "train.loss_weight=square": "train.loss_weight was token and is square",
    "train.dtype=fp32": "train.dtype was bf16 and is fp32",
    "data.seq_length=1024": "data.seq_length was 2048 and is 1024",
}


@pytest.mark.parametrize("changed", [[override] for override in FIXED] + [list(FIXED)])
def test_a_resume_with_other_settings_is_refused(config: RunConfig, changed: list[str]) -> None:
    """All that changed are named, and nothing else; as a start for another run it is welcome."""
    folder = write_checkpoint(checkpoint_root(config), 3, config=config)
    other = apply_overrides(config, changed)
    with pytest.raises(ConfigError) as caught:
        find_start(other)
    message = str(caught.value)
    assert message.startswith(f"{folder} cannot be resumed with other settings: ")
    assert message.endswith(
        "start a new run in another output_dir with this one as checkpoint.load"
    )
    for override, text in FIXED.items():
        assert (text in message) is (override in changed)
    elsewhere = dataclasses.replace(
        other,
        output_dir=f"{config.output_dir}_2",
        checkpoint=CheckpointConfig(load=str(checkpoint_root(config))),
    )
    assert not find_start(elsewhere).resumes


@pytest.mark.parametrize(
    "free",
    [
        "parallel.tensor_model_parallel_size=2",
        "train.micro_batch_size=2",
        "data.num_workers=5",
        "checkpoint.save_total_limit=1",
        "train.eval_interval=10",
    ],
)
def test_a_resume_in_another_layout_is_welcome(config: RunConfig, free: str) -> None:
    write_checkpoint(checkpoint_root(config), 3, config=config)
    assert find_start(apply_overrides(config, [free])).resumes


@pytest.fixture(scope="module")
def playground(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tokenizer]:
    """A meta json of two sets, and a tokenizer."""
    folder = tmp_path_factory.mktemp("playground")
    return make_playground(folder, 12), Tokenizer(make_tokenizer(folder / "tokenizer"))


def test_samples_are_made_as_the_run_says(
    playground: tuple[Path, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    meta, tokenizer = playground
    seen = []
    monkeypatch.setattr(setup, "open_dataset", lambda *sources, **_: seen.append(sources[2]))
    monkeypatch.setattr(setup, "on_rank_zero", lambda work, group: work())
    monkeypatch.setattr(setup, "data_fingerprint", lambda dataset: {})
    monkeypatch.setattr(setup, "refuse_different_data", lambda *fingerprint: None)
    config = RunConfig(data=DataConfig(seq_length=77, special_literals="tokens"))
    topology: Any = SimpleNamespace(control_group=None)
    open_data(config, str(meta), tiny(), tokenizer, topology)
    wanted = SampleSettings(
        seq_length=77, image_size=56, embeddings_per_image=4, special_literals="tokens"
    )
    assert set(seen) == {wanted}


def open_changed(
    playground: tuple[Path, Tokenizer], folder: Path, change: Any = lambda meta: meta
) -> Dataset:
    """The sets of the playground, the entries of the meta json changed."""
    meta, tokenizer = playground
    file = folder / "meta.json"
    file.write_text(json.dumps(change(json.loads(meta.read_text()))))
    settings = SampleSettings(seq_length=128, image_size=56, embeddings_per_image=4)
    return open_dataset(file, tokenizer, settings, cache_dir=folder / "cache")


def resumed(data: dict[str, int] | None, *, resumes: bool = True) -> Start:
    """A start from iteration 3 of a run on such data, as it is read from a file."""
    manifest = Manifest(
        iteration=3,
        consumed_samples=24,
        dtype="fp32",
        model=tiny(),
        run_config={},
        data=json.loads(json.dumps(data)),
        has_optimizer=True,
    )
    return Start(checkpoint=Path("there"), manifest=manifest, resumes=resumes, model=tiny())


def test_the_fingerprint_is_of_what_is_trained_on(
    playground: tuple[Path, Tokenizer], tmp_path: Path
) -> None:
    dataset = open_changed(playground, tmp_path)
    tokens = int(dataset.table.num_tokens.sum())
    sets = [["pictured", 10], ["text_only", 2]]
    found = data_fingerprint(dataset)
    assert (found["samples_of_sets"], found["tokens"]) == (sets, tokens)
    assert found == data_fingerprint(open_changed(playground, tmp_path))


def test_the_fingerprint_knows_the_order_of_the_records(
    playground: tuple[Path, Tokenizer], tmp_path: Path
) -> None:
    before = data_fingerprint(open_changed(playground, tmp_path))
    (annotation,) = {
        index.annotation_set.annotation
        for index in open_changed(playground, tmp_path).indexes
        if index.annotation_set.name == "pictured"
    }
    lines = annotation.read_text().splitlines(keepends=True)
    annotation.write_text("".join(reversed(lines)))
    after = data_fingerprint(open_changed(playground, tmp_path))
    assert after["tokens"] == before["tokens"] and after["order"] != before["order"]
    # a checkpoint of before the order was kept goes by the rest
    del before["order"]
    refuse_other_data(resumed(before), open_changed(playground, tmp_path))


def _open_with_another_count(rank_of_another: int | None) -> str:
    rank = torch.distributed.get_rank()
    fingerprint = {"tokens": 8 if rank == rank_of_another else 7}
    try:
        refuse_different_data(fingerprint, Path("cache"), torch.distributed.group.WORLD)
    except DataError as error:
        return str(error)
    return ""


@pytest.mark.distributed
def test_ranks_that_opened_different_indexes_all_stop() -> None:
    assert run_ranks(2, _open_with_another_count, None) == ["", ""]
    for message in run_ranks(2, _open_with_another_count, 1):
        assert message.startswith("cache: the length indexes changed while the ranks opened them")


def without_last(meta: dict[str, Any]) -> dict[str, Any]:
    """One set less."""
    meta.popitem()
    return meta


def repeated(meta: dict[str, Any]) -> dict[str, Any]:
    """One set twice."""
    meta["text_only"]["repeat_time"] = 2
    return meta


def reordered(meta: dict[str, Any]) -> dict[str, Any]:
    """The same sets, so the same numbers, but other sample ids."""
    return dict(reversed(meta.items()))


@pytest.mark.parametrize(
    ("change", "now"),
    [
        (without_last, r"now \{'samples_of_sets': \[\['pictured', 10\]\]"),
        (repeated, r"now .*\['pictured', 10\], \['text_only', 4\]\]"),
        (reordered, r"now .*\['text_only', 2\], \['pictured', 10\]\]"),
    ],
)
def test_a_resume_on_other_data_is_refused(
    playground: tuple[Path, Tokenizer], tmp_path: Path, change: Any, now: str
) -> None:
    before = data_fingerprint(open_changed(playground, tmp_path))
    changed = open_changed(playground, tmp_path, change)
    with pytest.raises(ConfigError, match=rf"was trained on other data: .*'pictured', 10.*{now}"):
        refuse_other_data(resumed(before), changed)
    refuse_other_data(resumed(before, resumes=False), changed)  # weights alone go with any data


def test_a_resume_on_the_same_data_is_welcome(
    playground: tuple[Path, Tokenizer], tmp_path: Path
) -> None:
    dataset = open_changed(playground, tmp_path)
    refuse_other_data(resumed(data_fingerprint(dataset)), dataset)
    refuse_other_data(resumed(None), dataset)  # a checkpoint of before this was kept
    fresh = Start(checkpoint=None, manifest=None, resumes=False, model=tiny())
    refuse_other_data(fresh, dataset)


def test_as_many_samples_with_other_lengths_are_other_data(
    playground: tuple[Path, Tokenizer], tmp_path: Path
) -> None:
    dataset = open_changed(playground, tmp_path)
    before = data_fingerprint(dataset)
    before["tokens"] += 1
    with pytest.raises(ConfigError, match="resume with the same data, or start a new run"):
        refuse_other_data(resumed(before), dataset)


def test_tokenizer_must_come_from_somewhere(config: RunConfig) -> None:
    start = find_start(dataclasses.replace(config, model=tiny()))
    with pytest.raises(ConfigError, match=r"data\.tokenizer is empty and the checkpoint keeps no"):
        load_tokenizer(config, start)
