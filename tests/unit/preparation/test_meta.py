"""The meta json: true lengths, order, boxes, own sets."""

import json
import logging
from pathlib import Path

import pytest

from mmlm.data.annotation import read_meta
from mmlm.errors import ConfigError, DataError
from mmlm.preparation.layout import Playground
from mmlm.preparation.meta import MetaEntry, published_entries, write_meta
from mmlm.preparation.sources import PUBLISHED_SETS, SETS_WITH_BOXES, PublishedSet
from tests.preparation_helpers import record, write_annotation


@pytest.fixture
def annotated(playground: Playground) -> Playground:
    for number, one in enumerate(PUBLISHED_SETS):
        box = "[0.1, 0.2, 0.3, 0.4]"
        lines = [record(k, "coco/train2017/1.jpg", "Where?", box) for k in range(number + 1)]
        write_annotation(playground, one.name, [*lines, "", "  "])
    return playground


def test_lengths_are_those_of_the_files(
    annotated: Playground, caplog: pytest.LogCaptureFixture
) -> None:
    path = annotated.root / "meta.json"
    with caplog.at_level(logging.WARNING, "mmlm"):
        assert write_meta(path, published_entries(annotated, plus_boxes=False)) == 45
    meta = json.loads(path.read_text())
    assert list(meta) == [one.name for one in PUBLISHED_SETS]
    assert [entry["length"] for entry in meta.values()] == list(range(1, 10))
    assert meta["llava_instruct_150k_zh"] == {
        "root": f"{annotated.root}/data/coco/",
        "annotation": f"{annotated.root}/opensource/llava_instruct_150k_zh.jsonl",
        "data_augment": False,
        "repeat_time": 1,
        "length": 2,
    }
    assert [one.length for one in read_meta(path)] == list(range(1, 10))
    warnings = [entry.getMessage() for entry in caplog.records]
    assert len(warnings) == 9
    assert (
        "2 lines, but the published file of set 'llava_instruct_150k_zh' has 157712"
        in (warnings[1])
    )


def test_published_count_is_no_warning(
    annotated: Playground, caplog: pytest.LogCaptureFixture
) -> None:
    sets = [PublishedSet(name=PUBLISHED_SETS[1].name, root="coco/", num_samples=2)]
    with caplog.at_level(logging.WARNING, "mmlm"):
        write_meta(annotated.root / "m.json", published_entries(annotated, sets, plus_boxes=False))
    assert caplog.records == []


def test_boxes_are_converted_in_copies(annotated: Playground) -> None:
    path = annotated.root / "plus.json"
    write_meta(path, published_entries(annotated, plus_boxes=True))
    for one in read_meta(path):
        text = one.annotation.read_text()
        converted = one.name in SETS_WITH_BOXES
        assert ("<box>[[100, 200, 300, 400]]</box>" in text) == converted
        assert ("[0.1, 0.2, 0.3, 0.4]" in text) != converted
        assert "[0.1, 0.2, 0.3, 0.4]" in annotated.annotation(one.name).read_text()


def test_broken_lines_of_a_copy_are_told(
    annotated: Playground, caplog: pytest.LogCaptureFixture
) -> None:
    write_annotation(annotated, SETS_WITH_BOXES[0], ["{"])
    with caplog.at_level(logging.WARNING, "mmlm"):
        published_entries(annotated, plus_boxes=True)
    assert "1 lines cannot be read and are copied as they are, the first: " in caplog.text


def test_missing_annotations_are_named(annotated: Playground) -> None:
    annotated.annotation("geoqa+").unlink()
    with pytest.raises(DataError, match=r"opensource: there is no geoqa\+.jsonl; fetch"):
        published_entries(annotated, plus_boxes=False)


def test_own_sets(tmp_path: Path) -> None:
    (tmp_path / "charts.jsonl").write_text(record(0, "7.png") + "\n")
    own = MetaEntry(name="charts", annotation=tmp_path / "charts.jsonl", root="my_data/")
    assert write_meta(tmp_path / "meta.json", [own]) == 1
    with pytest.raises(ConfigError, match="two sets are called 'charts'"):
        write_meta(tmp_path / "meta.json", [own, own])
    with pytest.raises(ConfigError, match="there is no set to write"):
        write_meta(tmp_path / "meta.json", [])


def test_annotation_without_lines_is_refused(tmp_path: Path) -> None:
    empty = MetaEntry(name="charts", annotation=tmp_path / "charts.jsonl", root="my_data/")
    with pytest.raises(DataError, match=r"charts.jsonl: cannot read .* set 'charts' .No such file"):
        write_meta(tmp_path / "meta.json", [empty])
    (tmp_path / "charts.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match=r"charts.jsonl: the annotation file .* has no line"):
        write_meta(tmp_path / "meta.json", [empty])
