"""Sets as one list: ids, repeats, policies and ranks that only read."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from mmlm.data.dataset import Dataset, open_dataset
from mmlm.data.sample import SampleSettings
from mmlm.data.tokenizer import Tokenizer
from mmlm.errors import DataError
from tests.tiny_data import conversation, write_jsonl

SOUND = conversation("q", "a")
BROKEN = conversation("q")


def write_sets(folder: Path, **sets: tuple[float, list[dict[str, Any]]]) -> Path:
    """Write a meta json; ``sets`` gives repeat_time and the records of each."""
    meta = {}
    for name, (repeat_time, entries) in sets.items():
        path = folder / f"{name}.jsonl"
        write_jsonl(path, entries)
        meta[name] = {"root": str(folder), "annotation": str(path), "repeat_time": repeat_time}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder / "meta.json"


def talks(*numbers: int) -> list[dict[str, Any]]:
    return [{"id": n, "conversations": conversation("q" * n, "a" * n)} for n in numbers]


def test_ids_run_through_sets_and_repeats(
    tmp_path: Path, tokenizer: Tokenizer, settings: SampleSettings
) -> None:
    meta = write_sets(tmp_path, b=(2, talks(1, 2)), a=(0.5, talks(3, 4, 5)), c=(1, talks(6)))
    dataset = open_dataset(meta, tokenizer, settings, cache_dir=tmp_path / "cache")
    places = [
        (dataset.annotation_set(sample_id).name, dataset.record(sample_id).identity)
        for sample_id in range(len(dataset.table.num_tokens))
    ]
    assert places == [("b", "1"), ("b", "2"), ("b", "1"), ("b", "2"), ("a", "3"), ("c", "6")]
    assert dataset.table.usable.tolist() == list(range(6))
    for sample_id in range(6):
        sample = dataset.sample(sample_id, seed=0, epoch=0, with_pixels=True)
        assert sample.sample_id == sample_id
        assert len(sample.input_ids) == dataset.table.num_tokens[sample_id]


def test_strict_refuses_and_skip_leaves_out(
    tmp_path: Path,
    tokenizer: Tokenizer,
    settings: SampleSettings,
    caplog: pytest.LogCaptureFixture,
) -> None:
    entries = [{"id": 1, "conversations": BROKEN}, {"id": 2, "conversations": SOUND}]
    meta = write_sets(tmp_path, a=(2, entries), b=(1, talks(3)))
    ledger = tmp_path / "cache" / "data_ledger.jsonl"
    message = r"1 of 3 records cannot be used \(odd_turns 1\).*\n.*a\.jsonl:1 \(set 'a', id '1'\)"
    for build in (True, False):
        with pytest.raises(DataError, match=message):
            open_dataset(meta, tokenizer, settings, cache_dir=tmp_path / "cache", build=build)
        assert '"line": 1' in ledger.read_text()
    with caplog.at_level(logging.WARNING, logger="mmlm"):
        dataset = open_dataset(
            meta, tokenizer, settings, cache_dir=tmp_path / "cache", policy="skip"
        )
    assert "1 records are left out (data.policy=skip)" in caplog.text
    assert dataset.table.usable.tolist() == [1, 3, 4]
    assert [exclusion.line for exclusion in dataset.exclusions] == [1]


def test_skip_refuses_data_with_nothing_left(
    tmp_path: Path, tokenizer: Tokenizer, settings: SampleSettings
) -> None:
    meta = write_sets(tmp_path, a=(1, [{"id": 1, "conversations": BROKEN}]))
    with pytest.raises(DataError, match="1 of 1 records cannot be used"):
        open_dataset(meta, tokenizer, settings, cache_dir=tmp_path / "cache", policy="skip")


def test_ranks_that_do_not_build_need_the_builder_first(
    tmp_path: Path, tokenizer: Tokenizer, settings: SampleSettings
) -> None:
    meta = write_sets(tmp_path, a=(1, talks(1)))
    cache = tmp_path / "cache"
    with pytest.raises(DataError, match="length index of set 'a' is missing; data"):
        open_dataset(meta, tokenizer, settings, cache_dir=cache, build=False)
    built = open_dataset(meta, tokenizer, settings, cache_dir=cache)
    read = open_dataset(meta, tokenizer, settings, cache_dir=cache, build=False)
    assert read.table.num_tokens.tolist() == built.table.num_tokens.tolist()


def test_an_annotation_that_changes_during_the_run_is_noticed(
    tmp_path: Path, tokenizer: Tokenizer, settings: SampleSettings
) -> None:
    meta = write_sets(tmp_path, a=(1, talks(1)))
    dataset = open_dataset(meta, tokenizer, settings, cache_dir=tmp_path / "cache")
    write_jsonl(tmp_path / "a.jsonl", talks(30))
    with pytest.raises(DataError, match=r"a\.jsonl:1: .* the annotation file changed during"):
        dataset.sample(0, seed=0, epoch=0, with_pixels=False)


def test_the_playground_has_every_kind_of_sample(dataset: Dataset) -> None:
    table = dataset.table
    assert len(table.usable) == len(table.num_tokens) == 23 and not dataset.exclusions
    assert set(table.num_images.tolist()) == {0, 1, 2}
    assert len(set(table.num_tokens.tolist())) > 5
    assert max(table.num_tokens) <= dataset.settings.seq_length
