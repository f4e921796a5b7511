"""The index file: its name, its map, what travels to other processes, and a damaged one."""

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmlm.data.annotation import AnnotationSet
from mmlm.data.index_build import build_index
from mmlm.data.ledger import LedgerEntry
from mmlm.data.length_index import (
    INDEX_DTYPE,
    SetIndex,
    identity_hash,
    index_path,
    load_index,
    write_index,
)
from mmlm.data.rejection import Reason
from mmlm.data.sample import SampleSettings
from mmlm.data.tokenizer import Tokenizer
from mmlm.errors import DataError

REMARK = LedgerEntry(
    set_name="tiny",
    file="a.jsonl",
    line=2,
    identity="2",
    reason=Reason.PLACEHOLDER_INSERTED,
    detail="one is put before it",
)


def write(folder: Path, *entries: LedgerEntry, num_records: int = 3) -> SetIndex:
    rows = np.zeros(num_records, dtype=INDEX_DTYPE)
    rows["line"] = np.arange(1, num_records + 1)
    rows["usable"] = 1
    path = folder / "tiny-0.npy"
    write_index(path, rows, entries)
    entry = AnnotationSet(name="tiny", root=folder, annotation=folder / "a.jsonl")
    return SetIndex(annotation_set=entry, path=path, stamp=(0, 0))


def test_the_index_is_kept_and_mapped(
    tiny: AnnotationSet, tokenizer: Tokenizer, settings: SampleSettings, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    assert load_index(tiny, tokenizer, settings, cache) is None
    built = build_index(tiny, tokenizer, settings, cache)
    loaded = load_index(tiny, tokenizer, settings, cache)
    assert loaded is not None and isinstance(loaded.rows, np.memmap)
    np.testing.assert_array_equal(loaded.rows, built.rows)
    assert loaded.ledger() == built.ledger()
    path = index_path(tiny, tokenizer, settings, cache)
    assert sorted(cache.iterdir()) == [path.with_suffix(".jsonl"), path]


def test_the_name_changes_with_whatever_could_change_a_length(
    tiny: AnnotationSet, tokenizer: Tokenizer, settings: SampleSettings, tmp_path: Path
) -> None:
    def name(entry: AnnotationSet = tiny, **changes: Any) -> str:
        fields = {**vars(settings), **changes}
        return index_path(entry, tokenizer, SampleSettings(**fields), tmp_path).name

    half = AnnotationSet(**{**vars(tiny), "repeat_time": 0.5})
    twice = AnnotationSet(**{**vars(tiny), "repeat_time": 2})
    elsewhere = AnnotationSet(**{**vars(tiny), "root": tmp_path / "elsewhere"})
    augmented = AnnotationSet(**{**vars(tiny), "data_augment": True})
    names = [name(), name(seq_length=8), name(image_size=28), name(system_message="S"), name(half)]
    names += [name(elsewhere), name(augmented)]
    os.utime(tiny.annotation, (1, 1))
    names.append(name())
    tiny.annotation.write_text("{}\n")
    names.append(name())
    assert len(set(names)) == len(names)
    assert name(twice) == name()


def test_a_pickled_index_is_a_path(tmp_path: Path) -> None:
    index = write(tmp_path, num_records=10_000)
    sent = pickle.dumps(index)
    assert len(sent) < 2_000
    other = pickle.loads(sent)
    assert isinstance(other.rows, np.memmap) and other.stamp == index.stamp
    np.testing.assert_array_equal(other.rows, index.rows)


def test_the_ledger_is_not_read_where_nothing_is_left_out(tmp_path: Path) -> None:
    index = write(tmp_path, REMARK)
    assert index.ledger() == (REMARK,)
    index.ledger_path.unlink()
    assert index.exclusions() == () and index.num_usable == index.num_records == 3


def test_a_record_takes_34_bytes() -> None:
    # 1.27 million of them: 43 MB on disk, shared by all processes of a machine
    assert INDEX_DTYPE.itemsize == 34


def test_a_damaged_index_is_named(tmp_path: Path) -> None:
    index = write(tmp_path)
    index.path.write_bytes(index.path.read_bytes()[:-10])
    with pytest.raises(DataError, match=r"tiny-0\.npy: the length index cannot be read .* remove"):
        SetIndex(annotation_set=index.annotation_set, path=index.path, stamp=(0, 0))


def test_identities_are_told_apart() -> None:
    assert identity_hash("") == 0
    hashes = {identity_hash(text) for text in ("1", "2", "红", "\ud800")}
    assert len(hashes) == 4 and all(0 < number < 2**64 for number in hashes)
