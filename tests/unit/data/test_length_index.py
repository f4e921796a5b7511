"""Measuring, caching, looking again at pictures, and the processes that share the work."""

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmlm.data import length_index
from mmlm.data.annotation import AnnotationSet, parse_record, read_line, read_meta
from mmlm.data.length_index import SetIndex, build_index, index_path, load_index
from mmlm.data.rejection import Reason
from mmlm.data.sample import SampleSettings, measure
from mmlm.data.tokenizer import Tokenizer
from mmlm.errors import DataError
from tests.tiny_data import conversation, write_set


@pytest.fixture
def tiny(tmp_path: Path) -> AnnotationSet:
    """A set with sound records at lines 1, 2 and 5, and broken ones at 3, 4, 6, 7 and 8."""
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    talk = conversation("What is this?", "A square.")
    entries: list[dict[str, Any]] = [
        {"id": 1, "image": "a.png", "conversations": talk},
        {"id": 2, "conversations": talk},
        {"id": 3, "image": "gone.png", "conversations": talk},
        {"id": 4, "image": ["a.png", "a.png"], "conversations": talk},
        {"id": 5, "image": ["a.png", "a.png"], "conversations": conversation("<image>" * 2, "x")},
        {"id": 6, "image": "broken.png", "conversations": talk},
        {"id": 7, "conversations": talk[:1]},
    ]
    meta = write_set(tmp_path, entries)
    with (tmp_path / "tiny.jsonl").open("a") as file:
        file.write('{"id": 8,\n')
    return read_meta(meta)[0]


def build(
    entry: AnnotationSet, tokenizer: Tokenizer, settings: SampleSettings, cache: Path, **more: Any
) -> SetIndex:
    return build_index(entry, tokenizer, settings, cache, **more)


def die(_: Any) -> None:
    os._exit(1)


def never(*_: Any) -> None:
    raise AssertionError("measured again")


def test_each_record_is_measured_or_excluded_with_its_place(
    tiny: AnnotationSet, tokenizer: Tokenizer, settings: SampleSettings, tmp_path: Path
) -> None:
    index = build(tiny, tokenizer, settings, tmp_path / "cache")
    assert index.num_records == 8
    assert index.column("usable").tolist() == [1, 1, 0, 0, 1, 0, 0, 0]
    assert index.column("line").tolist() == list(range(1, 9))
    assert index.column("num_images").tolist() == [1, 0, 0, 0, 2, 0, 0, 0]
    for place in (0, 1, 4):
        text = read_line(tiny.annotation, int(index.column("offset")[place]))
        record = parse_record(text, file=tiny.annotation, line=place + 1)
        found = measure(record, tokenizer, settings)
        assert found.num_tokens == index.column("num_tokens")[place]
        assert found.num_supervised_tokens == index.column("num_supervised_tokens")[place]
    found_reasons = {
        (exclusion.line, exclusion.identity): exclusion.rejection.reason
        for exclusion in index.exclusions
    }
    assert found_reasons == {
        (3, "3"): Reason.IMAGE_UNREADABLE,
        (4, "4"): Reason.IMAGE_COUNT,
        (6, "6"): Reason.IMAGE_UNREADABLE,
        (7, "7"): Reason.ODD_TURNS,
        (8, ""): Reason.MALFORMED_RECORD,
    }
    assert "gone.png: the image does not exist" in index.exclusions[0].rejection.detail
    assert index.exclusions[-1].rejection.detail.startswith("not valid JSON")


def test_the_index_is_kept_and_mapped(
    tiny: AnnotationSet, tokenizer: Tokenizer, settings: SampleSettings, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    assert load_index(tiny, tokenizer, settings, cache) is None
    built = build(tiny, tokenizer, settings, cache)
    loaded = load_index(tiny, tokenizer, settings, cache)
    assert loaded is not None and isinstance(loaded.columns, np.memmap)
    np.testing.assert_array_equal(loaded.columns, built.columns)
    assert loaded.exclusions == built.exclusions
    path = index_path(tiny, tokenizer, settings, cache)
    assert sorted(cache.iterdir()) == [path.with_suffix(".jsonl"), path]


def test_a_sound_index_is_not_measured_again(
    tokenizer: Tokenizer,
    settings: SampleSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    meta = write_set(tmp_path, [{"conversations": conversation("q", "a")}])
    entry = read_meta(meta)[0]
    build(entry, tokenizer, settings, tmp_path / "cache")
    monkeypatch.setattr(length_index, "measure", never)
    assert build(entry, tokenizer, settings, tmp_path / "cache").num_records == 1


def test_mended_pictures_are_found_without_measuring_the_rest(
    tiny: AnnotationSet,
    tokenizer: Tokenizer,
    settings: SampleSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    build(tiny, tokenizer, settings, tmp_path / "cache")
    Image.new("RGB", (20, 20)).save(tmp_path / "gone.png")
    seen = []

    def spy(record: Any, *arguments: Any) -> Any:
        seen.append(record.line)
        return measure(record, *arguments)

    monkeypatch.setattr(length_index, "measure", spy)
    index = build(tiny, tokenizer, settings, tmp_path / "cache")
    assert seen == [3, 6]
    assert index.column("usable").tolist() == [1, 1, 1, 0, 1, 0, 0, 0]
    assert [exclusion.line for exclusion in index.exclusions] == [4, 6, 7, 8]


def test_the_name_changes_with_whatever_could_change_a_length(
    tiny: AnnotationSet, tokenizer: Tokenizer, settings: SampleSettings, tmp_path: Path
) -> None:
    def name(entry: AnnotationSet = tiny, **changes: Any) -> str:
        fields = {**vars(settings), **changes}
        return index_path(entry, tokenizer, SampleSettings(**fields), tmp_path).name

    half = AnnotationSet(**{**vars(tiny), "repeat_time": 0.5})
    twice = AnnotationSet(**{**vars(tiny), "repeat_time": 2})
    names = [name(), name(seq_length=8), name(image_size=28), name(system_message="S"), name(half)]
    os.utime(tiny.annotation, (1, 1))
    names.append(name())
    tiny.annotation.write_text("{}\n")
    names.append(name())
    assert len(set(names)) == len(names)
    assert name(twice) == name()


def test_repeat_time_below_one_measures_the_first_records_only(
    tokenizer: Tokenizer, settings: SampleSettings, tmp_path: Path
) -> None:
    entries = [{"conversations": conversation("q", "a" * n)} for n in range(1, 6)]
    entry = read_meta(write_set(tmp_path, entries, repeat_time=0.5))[0]
    assert build(entry, tokenizer, settings, tmp_path / "cache").num_records == 2


def test_a_set_without_records_is_refused(
    tokenizer: Tokenizer, settings: SampleSettings, tmp_path: Path
) -> None:
    entry = read_meta(write_set(tmp_path, []))[0]
    with pytest.raises(DataError, match=r"tiny\.jsonl: set 'tiny' gives no record \(0 in the file"):
        build(entry, tokenizer, settings, tmp_path / "cache")


def test_a_promised_length_that_is_not_there_is_said(
    tokenizer: Tokenizer,
    settings: SampleSettings,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    entries = [{"conversations": conversation("q", "a")}]
    entry = read_meta(write_set(tmp_path, entries, length=2))[0]
    with caplog.at_level(logging.WARNING, logger="mmlm"):
        build(entry, tokenizer, settings, tmp_path / "cache")
    assert "1 records, but the meta json promises 2 for set 'tiny'" in caplog.text


def test_several_processes_measure_the_same(
    tiny: AnnotationSet,
    tokenizer: Tokenizer,
    settings: SampleSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alone = build(tiny, tokenizer, settings, tmp_path / "alone")
    monkeypatch.setattr(length_index, "_MIN_RECORDS_PER_PROCESS", 2)
    monkeypatch.setattr(length_index, "_CHUNK", 3)
    shared = build(tiny, tokenizer, settings, tmp_path / "shared", num_workers=2)
    np.testing.assert_array_equal(shared.columns, alone.columns)
    assert shared.exclusions == alone.exclusions


def test_a_process_that_was_killed_is_an_error_and_no_hang(
    tiny: AnnotationSet,
    tokenizer: Tokenizer,
    settings: SampleSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(length_index, "_MIN_RECORDS_PER_PROCESS", 2)
    monkeypatch.setattr(length_index, "_measure_chunk", die)
    message = r"a process that measured set 'tiny' was killed .*; lower data\.num_workers from 2"
    with pytest.raises(DataError, match=message):
        build(tiny, tokenizer, settings, tmp_path / "cache", num_workers=2)
    assert load_index(tiny, tokenizer, settings, tmp_path / "cache") is None
