"""Measuring, looking again at pictures, and the processes that share the work."""

import errno
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmlm.data import index_build, measuring
from mmlm.data.annotation import AnnotationSet, parse_record, read_line, read_meta
from mmlm.data.index_build import build_index, build_indexes, run_build
from mmlm.data.length_index import SetIndex, load_index
from mmlm.data.rejection import Reason
from mmlm.data.sample import SampleSettings, measure
from mmlm.data.tokenizer import Tokenizer
from mmlm.errors import DataError
from tests.tiny_data import conversation, write_set

ROOT = Path(__file__).resolve().parents[3]


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
        (exclusion.line, exclusion.identity): exclusion.reason for exclusion in index.exclusions()
    }
    assert found_reasons == {
        (3, "3"): Reason.IMAGE_UNREADABLE,
        (4, "4"): Reason.IMAGE_COUNT,
        (6, "6"): Reason.IMAGE_UNREADABLE,
        (7, "7"): Reason.ODD_TURNS,
        (8, ""): Reason.MALFORMED_RECORD,
    }
    assert "gone.png: the image does not exist" in index.exclusions()[0].detail
    assert index.exclusions()[-1].detail.startswith("not valid JSON")


def test_a_sound_index_is_not_measured_again(
    tokenizer: Tokenizer,
    settings: SampleSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    meta = write_set(tmp_path, [{"conversations": conversation("q", "a")}])
    entry = read_meta(meta)[0]
    build(entry, tokenizer, settings, tmp_path / "cache")
    monkeypatch.setattr(measuring, "measure", never)
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

    monkeypatch.setattr(measuring, "measure", spy)
    index = build(tiny, tokenizer, settings, tmp_path / "cache")
    assert seen == [3, 6]
    assert index.column("usable").tolist() == [1, 1, 1, 0, 1, 0, 0, 0]
    assert [exclusion.line for exclusion in index.exclusions()] == [4, 6, 7, 8]


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
    monkeypatch.setattr(index_build, "_MIN_RECORDS_PER_PROCESS", 2)
    monkeypatch.setattr(index_build, "_CHUNK", 3)
    shared = build(tiny, tokenizer, settings, tmp_path / "shared", num_workers=2)
    np.testing.assert_array_equal(shared.rows, alone.rows)
    assert shared.exclusions() == alone.exclusions()


def test_a_process_that_was_killed_is_an_error_and_no_hang(
    tiny: AnnotationSet,
    tokenizer: Tokenizer,
    settings: SampleSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(index_build, "_MIN_RECORDS_PER_PROCESS", 2)
    monkeypatch.setattr(index_build, "measure_chunk", die)
    message = r"a process that measured set 'tiny' was killed .*; lower data\.num_workers from 2"
    with pytest.raises(DataError, match=message):
        build(tiny, tokenizer, settings, tmp_path / "cache", num_workers=2)
    assert load_index(tiny, tokenizer, settings, tmp_path / "cache") is None


BUILD = """
import sys
from pathlib import Path
from mmlm.data import index_build
from mmlm.data.annotation import read_meta
from mmlm.data.sample import SampleSettings
from mmlm.data.tokenizer import Tokenizer

meta, tokenizer, cache, num_workers = sys.argv[1:]
index_build._CHUNK, index_build._MIN_RECORDS_PER_PROCESS = 8, 2
settings = SampleSettings(seq_length=256, image_size=56, embeddings_per_image=4)
if __name__ == "__main__":
    index_build.build_indexes(
        read_meta(meta), Tokenizer(tokenizer), settings, Path(cache), num_workers=int(num_workers)
    )
"""


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def children(process: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{process}/task").iterdir():
        found += [int(number) for number in (task / "children").read_text().split()]
    return found


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_killed_build_goes_on_where_it_was(
    num_workers: int,
    tokenizer: Tokenizer,
    settings: SampleSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # opening a pipe that nobody writes to waits for ever: the build stops there and can be killed
    pipe, cache = tmp_path / "pipe.png", tmp_path / "cache"
    os.mkfifo(pipe)
    entries: list[dict[str, Any]] = [
        {"id": n, "conversations": conversation("q", "a" * (1 + n % 7))} for n in range(60)
    ]
    entries[41]["image"] = "pipe.png"
    for entry in entries[3::10]:
        entry["conversations"].insert(0, {"from": "gpt", "value": "hello"})
    meta = write_set(tmp_path, entries)
    words = [sys.executable, "-c", BUILD, str(meta), str(tokenizer.folder), str(cache)]
    process = subprocess.Popen([*words, str(num_workers)], cwd=ROOT, stderr=subprocess.DEVNULL)
    # alone: chunks 0 to 4 and no more; with a second process all but the one that waits
    num_done = 5 if num_workers == 1 else 7
    wait_for(lambda: _num_lines(cache) >= num_done)
    workers = children(process.pid)
    assert len(workers) >= (num_workers if num_workers > 1 else 0)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    wait_for(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers))
    with next(cache.glob("*.partial")).open("ab") as file:
        file.write(b'\n{"rows": [[1, 2')  # as a kill in the middle of a write leaves it
    pipe.unlink()
    Image.new("RGB", (8, 8)).save(pipe)

    seen = []

    def spy(record: Any, *arguments: Any) -> Any:
        seen.append(record.line)
        return measure(record, *arguments)

    monkeypatch.setattr(measuring, "measure", spy)
    entry = read_meta(meta)[0]
    index = build(entry, tokenizer, settings, cache)
    assert seen == (list(range(41, 61)) if num_workers == 1 else list(range(41, 49)))
    assert not list(cache.glob("*.partial"))
    whole = build(entry, tokenizer, settings, tmp_path / "other")
    np.testing.assert_array_equal(index.rows, whole.rows)
    assert index.ledger() == whole.ledger() and len(index.ledger()) == 7


def _num_lines(cache: Path) -> int:
    return sum(file.read_bytes().count(b"\n") for file in cache.glob("*.partial"))


def stop(
    entry: AnnotationSet,
    tokenizer: Tokenizer,
    settings: SampleSettings,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """Measure everything, keep no index, and return the file of what was measured."""
    with monkeypatch.context() as patch:
        patch.setattr(index_build, "write_index", never)
        with pytest.raises(AssertionError):
            build(entry, tokenizer, settings, cache, again=True)
    (partial,) = cache.glob("*.partial")
    return partial


def test_pictures_that_were_broken_before_a_kill_are_looked_at_after_it(
    tiny: AnnotationSet,
    tokenizer: Tokenizer,
    settings: SampleSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = tmp_path / "cache"
    stop(tiny, tokenizer, settings, cache, monkeypatch)
    Image.new("RGB", (20, 20)).save(tmp_path / "gone.png")
    result = run_build([tiny], tokenizer, settings, cache, num_workers=1, again=True)
    assert [entry.line for entry in result.indexes[0].exclusions()] == [4, 6, 7, 8]
    assert result.num_resumed == 8 - 2


def test_a_build_that_only_lacked_its_end_is_ended(
    tokenizer: Tokenizer,
    settings: SampleSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entry = read_meta(write_set(tmp_path, [{"conversations": conversation("q", "a")}]))[0]
    cache = tmp_path / "cache"
    stop(entry, tokenizer, settings, cache, monkeypatch)
    monkeypatch.setattr(measuring, "measure", never)
    assert build(entry, tokenizer, settings, cache).num_usable == 1
    assert not list(cache.glob("*.partial"))


def test_what_two_builders_measured_counts_once(
    tiny: AnnotationSet,
    tokenizer: Tokenizer,
    settings: SampleSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    partial = stop(tiny, tokenizer, settings, tmp_path / "cache", monkeypatch)
    partial.write_bytes(partial.read_bytes() * 2)
    index = build(tiny, tokenizer, settings, tmp_path / "cache")
    alone = build(tiny, tokenizer, settings, tmp_path / "alone")
    assert index.ledger() == alone.ledger() and len(index.ledger()) == 6
    np.testing.assert_array_equal(index.rows, alone.rows)


@pytest.mark.parametrize("hours", [1, 7])
def test_a_check_says_what_it_takes_from_one_that_was_stopped_and_takes_nothing_old(
    hours: int,
    tokenizer: Tokenizer,
    settings: SampleSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache, picture = tmp_path / "cache", tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(picture)
    talk = conversation("q", "a")
    entries = [{"image": "a.png", "conversations": talk}, {"conversations": talk}]
    entry = read_meta(write_set(tmp_path, entries))[0]
    build(entry, tokenizer, settings, cache)
    partial = stop(entry, tokenizer, settings, cache, monkeypatch)
    stopped_at = round(time.time()) - hours * 3600
    os.utime(partial, (stopped_at, stopped_at))
    build(entry, tokenizer, settings, cache)  # a training in between
    picture.unlink()
    result = run_build([entry], tokenizer, settings, cache, num_workers=1, again=True)
    taken = (2, stopped_at) if hours == 1 else (0, None)
    assert (result.num_resumed, result.stopped_at) == taken
    assert result.indexes[0].column("usable").tolist() == [hours == 1, 1]
    assert not partial.exists()


def test_again_measures_what_there_is_already(
    tiny: AnnotationSet, tokenizer: Tokenizer, settings: SampleSettings, tmp_path: Path
) -> None:
    first = build(tiny, tokenizer, settings, tmp_path / "cache")
    assert first.column("usable")[0] == 1
    (tmp_path / "a.png").write_bytes(b"no picture any more")
    kept = build(tiny, tokenizer, settings, tmp_path / "cache")
    assert kept.column("usable")[0] == 1
    new = build(tiny, tokenizer, settings, tmp_path / "cache", again=True)
    assert new.column("usable").tolist() == [0, 1, 0, 0, 0, 0, 0, 0]


def test_several_sets_share_the_processes_and_keep_their_order(
    tokenizer: Tokenizer,
    settings: SampleSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(index_build, "_MIN_RECORDS_PER_PROCESS", 2)
    monkeypatch.setattr(index_build, "_CHUNK", 3)
    sets = []
    for size in (4, 1, 9):
        entries = [{"conversations": conversation("q", "a" * n)} for n in range(1, size + 1)]
        sets += read_meta(write_set(tmp_path / str(size), entries))
    cache = tmp_path / "cache"
    indexes = build_indexes(sets, tokenizer, settings, cache, num_workers=2)
    assert [index.num_records for index in indexes] == [4, 1, 9]
    for index, entry in zip(indexes, sets, strict=True):
        alone = build(entry, tokenizer, settings, tmp_path / "alone")
        np.testing.assert_array_equal(index.rows, alone.rows)


def test_a_cache_that_cannot_be_written_is_named(
    tiny: AnnotationSet, tokenizer: Tokenizer, settings: SampleSettings, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file/cache: cannot keep the length index .* another"):
        build(tiny, tokenizer, settings, tmp_path / "file" / "cache")


def test_a_disk_that_fills_is_named(
    tiny: AnnotationSet,
    tokenizer: Tokenizer,
    settings: SampleSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(path: Path, *_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(index_build, "write_index", full)
    with pytest.raises(DataError, match=r"cache: cannot keep the length index \(No space left"):
        build(tiny, tokenizer, settings, tmp_path / "cache")
