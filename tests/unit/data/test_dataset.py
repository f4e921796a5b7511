"""Sets as one list: ids, repeats, policies and ranks that only read."""

import json
import logging
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmlm.data.dataset import Dataset, keep_ledger, open_dataset
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


@pytest.mark.parametrize("numbers", [(30,), (4,)])
def test_an_annotation_that_changes_during_the_run_is_noticed(
    numbers: tuple[int, ...], tmp_path: Path, tokenizer: Tokenizer, settings: SampleSettings
) -> None:
    meta = write_sets(tmp_path, a=(1, talks(3)))
    dataset = open_dataset(meta, tokenizer, settings, cache_dir=tmp_path / "cache")
    before = (tmp_path / "a.jsonl").stat()
    write_jsonl(tmp_path / "a.jsonl", talks(*numbers))  # 4: one letter more, so another size
    os.utime(tmp_path / "a.jsonl", ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(DataError, match=r"a\.jsonl: the annotation file changed during the run"):
        dataset.sample(0, seed=0, epoch=0, with_pixels=False)


def test_an_edit_of_the_same_size_is_noticed(
    tmp_path: Path, tokenizer: Tokenizer, settings: SampleSettings
) -> None:
    meta = write_sets(tmp_path, a=(1, talks(3)))
    dataset = open_dataset(meta, tokenizer, settings, cache_dir=tmp_path / "cache")
    file = tmp_path / "a.jsonl"
    size = file.stat().st_size
    file.write_text(file.read_text().replace("aaa", "bbb"))
    os.utime(file, (1, 1))
    assert file.stat().st_size == size
    with pytest.raises(DataError, match=r"a\.jsonl: the annotation file changed during the run"):
        dataset.record(0)


def test_an_edit_that_keeps_size_and_time_is_noticed_by_the_number_of_tokens(
    tmp_path: Path, tokenizer: Tokenizer, settings: SampleSettings
) -> None:
    file = tmp_path / "a.jsonl"
    meta = write_sets(tmp_path, a=(1, talks(3)))
    dataset = open_dataset(meta, tokenizer, settings, cache_dir=tmp_path / "cache")
    before = file.stat()
    file.write_text(file.read_text().replace("aaa", "the"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    num_tokens = dataset.table.num_tokens[0]
    message = rf"a\.jsonl:1: \d+ tokens where the length index has {num_tokens}; .*start again"
    with pytest.raises(DataError, match=message):
        dataset.sample(0, seed=0, epoch=0, with_pixels=False)


def test_everything_that_is_not_used_as_it_stands_is_in_the_ledger_once(
    tmp_path: Path, tokenizer: Tokenizer, settings: SampleSettings
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    entries = [
        {"id": "sound", "conversations": SOUND},
        {"id": "late", "conversations": [{"from": "gpt", "value": "hello"}, *SOUND]},
        {"id": "bare", "image": "a.png", "conversations": SOUND},
        {"id": "long", "conversations": conversation("q", "a b " * 300)},
        {"id": "extra", "conversations": conversation("<image>q", "a")},
        {"id": "broken", "conversations": BROKEN},
    ]
    meta = write_sets(tmp_path, a=(3, entries), b=(1, talks(1)))
    cache = tmp_path / "cache"
    dataset = open_dataset(meta, tokenizer, settings, cache_dir=cache, policy="skip")
    lines = [json.loads(line) for line in (cache / "data_ledger.jsonl").read_text().splitlines()]
    assert [(line["line"], line["id"], line["action"], line["reason"]) for line in lines] == [
        (2, "late", "repaired", "first_turn_dropped"),
        (3, "bare", "repaired", "placeholder_inserted"),
        (4, "long", "truncated", "longer_than_seq_length"),
        (5, "extra", "noted", "literal_placeholder"),
        (6, "broken", "excluded", "odd_turns"),
    ]
    assert {line["set"] for line in lines} == {"a"}
    assert dataset.ledger_file == cache / "data_ledger.jsonl"
    assert len(dataset.table.usable) == 3 * 5 + 1
    # what is cut or repaired does not stop a strict run
    write_jsonl(tmp_path / "a.jsonl", entries[:5])
    strict = open_dataset(meta, tokenizer, settings, cache_dir=cache)
    assert not strict.exclusions and len(strict.ledger()) == 4


def test_the_table_is_narrow_and_the_indexes_stay_on_the_disk(dataset: Dataset) -> None:
    table = dataset.table
    assert table.num_tokens.dtype == table.num_images.dtype == np.int32
    assert table.num_supervised_tokens.dtype == np.int32 and table.usable.dtype == np.int64
    assert all(isinstance(index.rows, np.memmap) for index in dataset.indexes)


def test_a_pickled_dataset_is_small_and_opens_the_same_files(
    tmp_path: Path, tokenizer: Tokenizer, settings: SampleSettings
) -> None:
    meta = write_sets(tmp_path, a=(10_000, talks(3, 4, 5)))
    dataset = open_dataset(meta, tokenizer, settings, cache_dir=tmp_path / "cache")
    sent = pickle.dumps(dataset)
    assert len(sent) < 20_000 < dataset.table.num_tokens.nbytes
    other = pickle.loads(sent)
    np.testing.assert_array_equal(other.table.num_tokens, dataset.table.num_tokens)
    ours, theirs = (each.sample(7, seed=0, epoch=0, with_pixels=False) for each in (dataset, other))
    np.testing.assert_array_equal(ours.input_ids, theirs.input_ids)


def test_a_ledger_that_cannot_be_written_is_named(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone/data_ledger\.jsonl: cannot write the ledger \(No"):
        keep_ledger(dataset, tmp_path / "gone" / "data_ledger.jsonl")


def test_the_playground_has_every_kind_of_sample(dataset: Dataset) -> None:
    table = dataset.table
    assert len(table.usable) == len(table.num_tokens) == 23 and not dataset.exclusions
    assert set(table.num_images.tolist()) == {0, 1, 2}
    assert len(set(table.num_tokens.tolist())) > 5
    assert max(table.num_tokens) <= dataset.settings.seq_length
