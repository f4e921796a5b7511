"""What the check counts: by hand on small sets, and against the records themselves."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmlm.data import index_build
from mmlm.data.annotation import AnnotationSet
from mmlm.data.dataset import Dataset
from mmlm.data.preflight import CheckReport, check_data, length_edges
from mmlm.data.rejection import Action, Reason
from mmlm.data.sample import SampleSettings
from mmlm.data.tokenizer import Tokenizer
from tests.tiny_data import conversation, make_playground, write_jsonl


def write_sets(folder: Path, **sets: list[dict[str, Any]]) -> Path:
    meta = {}
    for name, entries in sets.items():
        write_jsonl(folder / f"{name}.jsonl", entries)
        meta[name] = {"root": str(folder), "annotation": str(folder / f"{name}.jsonl")}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder / "meta.json"


def talk(identity: Any, answer: str = "a", **more: Any) -> dict[str, Any]:
    return {"id": identity, "conversations": conversation("q", answer), **more}


@pytest.fixture
def check(tmp_path: Path, tokenizer: Tokenizer, settings: SampleSettings) -> Any:
    def run(meta: Path, **more: Any) -> CheckReport:
        return check_data(meta, tokenizer, settings, cache_dir=tmp_path / "cache", **more)

    return run


def test_the_numbers_are_those_of_the_samples(dataset: Dataset, tmp_path: Path, check: Any) -> None:
    meta = make_playground(tmp_path, num_samples=23, seed=3)
    report = check(meta)
    samples = [
        dataset.sample(sample_id, seed=0, epoch=0, with_pixels=False) for sample_id in range(23)
    ]
    total = report.total
    lengths = [len(sample.input_ids) for sample in samples]
    assert total.num_records == total.num_usable == total.num_samples == 23
    assert total.num_tokens == sum(lengths)
    assert (total.shortest_tokens, total.longest_tokens) == (min(lengths), max(lengths))
    assert total.mean_tokens == pytest.approx(sum(lengths) / 23)
    assert total.num_images == sum(len(sample.image_ids) for sample in samples)
    assert total.num_text_only == sum(not len(sample.image_ids) for sample in samples)
    supervised = sum((sample.labels != -100).sum() for sample in samples)
    assert total.num_supervised_tokens == supervised
    edges = (0, *report.length_edges)
    for low, high, count in zip(edges, edges[1:], total.lengths, strict=False):
        assert count == sum(low < length <= high for length in lengths)
    assert sum(total.lengths) == 23 and not report.exclusions
    assert [summary.name for summary in report.sets] == ["pictured", "text_only"]
    assert sum(summary.num_tokens for summary in report.sets) == total.num_tokens


def test_every_fault_is_counted_under_its_rule(tiny: AnnotationSet, check: Any) -> None:
    report = check(tiny.annotation.with_name("meta.json"))
    found = report.total.found
    assert found[Action.EXCLUDED] == {
        Reason.IMAGE_UNREADABLE: 2,
        Reason.IMAGE_COUNT: 1,
        Reason.ODD_TURNS: 1,
        Reason.MALFORMED_RECORD: 1,
    }
    assert found[Action.REPAIRED] == {Reason.PLACEHOLDER_INSERTED: 1}
    assert len(report.exclusions) == 5 and report.total.num_usable == 3
    assert [entry.line for entry in report.ledger] == [1, 3, 4, 6, 7, 8]
    # the line that is no JSON has no id, but that is not its fault
    assert report.total.num_without_id == 0


def test_long_samples_have_a_bin_of_their_own(tmp_path: Path, check: Any) -> None:
    report = check(write_sets(tmp_path, a=[talk(1), talk(2, "a b " * 300)]))
    assert report.length_edges[-1] == 256 and len(report.length_edges) == 16
    assert report.total.lengths[-1] == 1 and sum(report.total.lengths) == 2
    assert report.total.count(Action.TRUNCATED) == 1 and not report.exclusions
    assert report.total.longest_tokens == 256


def test_a_sample_that_just_fits_is_not_too_long(
    tmp_path: Path, tokenizer: Tokenizer, settings: SampleSettings
) -> None:
    meta = write_sets(tmp_path, a=[talk(1, "a b " * 20), talk(2)])
    whole = check_data(meta, tokenizer, settings, cache_dir=tmp_path / "cache").total.longest_tokens
    for seq_length, too_long in ((whole, 0), (whole - 1, 1)):
        tight = replace(settings, seq_length=seq_length)
        report = check_data(meta, tokenizer, tight, cache_dir=tmp_path / "cache")
        assert report.length_edges[-1] == seq_length
        assert report.total.lengths[-1] == report.total.count(Action.TRUNCATED) == too_long


def test_doubles_in_a_set_and_across_sets(tmp_path: Path, check: Any) -> None:
    meta = write_sets(
        tmp_path,
        a=[talk("x"), talk("y"), talk("x"), talk("x"), talk(7), talk("7"), talk(""), talk("")],
        b=[talk("y"), talk("z"), talk("y"), talk("x")],
    )
    report = check(meta)
    a, b = (summary.doubles for summary in report.sets)
    assert (a.num_ids, a.num_records) == (2, 5)
    file = tmp_path / "a.jsonl"
    assert [(double.identity, double.places) for double in a.examples] == [
        ("x", (f"{file}:1", f"{file}:3", f"{file}:4")),
        ("7", (f"{file}:5", f"{file}:6")),
    ]
    assert (b.num_ids, b.num_records) == (1, 2)
    across = report.total.doubles
    assert (across.num_ids, across.num_records) == (2, 4)
    assert [double.identity for double in across.examples] == ["x", "y"]
    assert across.examples[1].places == (f"{file}:2", f"{tmp_path / 'b.jsonl'}:1")
    assert report.sets[0].num_without_id == 2 and not report.exclusions


def test_repeats_and_shares(tmp_path: Path, check: Any) -> None:
    path = write_sets(tmp_path, a=[talk(n) for n in range(4)], b=[talk(n) for n in range(3)])
    meta = json.loads(path.read_text())
    meta["a"] |= {"repeat_time": 0.5, "length": 4}
    meta["b"] |= {"repeat_time": 3, "length": 5}
    path.write_text(json.dumps(meta))
    report = check(path)
    a, b = report.sets
    assert (a.num_records, a.num_unused, a.num_samples, a.keeps_promise) == (2, 2, 2, True)
    assert (b.num_records, b.repeats, b.num_samples, b.keeps_promise) == (3, 3, 9, False)
    assert (report.total.num_records, report.total.num_samples) == (5, 11)


def test_a_set_of_which_nothing_is_left(tmp_path: Path, check: Any) -> None:
    broken = [{"id": 1, "conversations": conversation("q")}]
    report = check(write_sets(tmp_path, a=broken, b=[talk(1)]))
    a = report.sets[0]
    assert (a.num_usable, a.shortest_tokens, a.longest_tokens, a.mean_tokens) == (0, 0, 0, 0)
    assert report.total.shortest_tokens == report.sets[1].shortest_tokens > 0


def test_pictures_are_judged_again_unless_asked_not_to(tmp_path: Path, check: Any) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    meta = write_sets(tmp_path, a=[talk(1, image="a.png")])
    assert not check(meta).exclusions
    (tmp_path / "a.png").write_bytes(b"")
    assert not check(meta, again=False).exclusions
    assert len(check(meta).exclusions) == 1


def test_what_a_stopped_check_has_judged_is_told_apart(
    tmp_path: Path, check: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    meta = write_sets(tmp_path, a=[talk(1), talk(2)], b=[talk(3)])
    with monkeypatch.context() as patch:
        patch.setattr(index_build, "write_index", stop)
        with pytest.raises(KeyboardInterrupt):  # when all of set a is judged
            check(meta)
    report = check(meta)
    assert (report.num_resumed, report.total.num_records) == (2, 3)
    assert report.stopped_at is not None and abs(report.stopped_at - time.time()) < 600
    assert check(meta).num_resumed == 0


@pytest.mark.parametrize(
    ("seq_length", "longest", "last", "count"),
    [
        (2048, 3000, 2048, 16),
        (2048, 1025, 2048, 16),
        (2048, 1024, 1024, 16),
        (2048, 77, 128, 16),
        (2048, 0, 16, 16),
        (8, 5, 8, 8),
        (100, 100, 100, 16),
    ],
)
def test_the_bins_end_at_the_cut_or_where_nothing_is(
    seq_length: int, longest: int, last: int, count: int
) -> None:
    edges = length_edges(seq_length, longest)
    assert edges[-1] == last and len(edges) == count
    assert list(edges) == sorted(set(edges)) and edges[-1] >= min(longest, seq_length)
