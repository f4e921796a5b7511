"""The table of what is there."""

from pathlib import Path

import pytest

from mmlm.preparation.layout import Playground
from mmlm.preparation.sources import PublishedSet
from mmlm.preparation.status import look
from tests.preparation_helpers import record, write_annotation

SETS = (
    PublishedSet(name="captions", root="", num_samples=3),
    PublishedSet(name="chinese", root="coco/", num_samples=1),
)
IMAGES = ["coco/train2017/1.jpg", "vg/VG_100K/5.jpg", "llava/llava_pretrain/images/0/1.jpg"]


@pytest.fixture
def filled(playground: Playground) -> Playground:
    write_annotation(playground, "captions", [record(k, name) for k, name in enumerate(IMAGES)])
    write_annotation(playground, "chinese", [record(0, "train2017/1.jpg")])
    for name in IMAGES:
        path = playground.data / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"1")
    return playground


def lines(playground: Playground) -> list[list[str]]:
    return [line.split() for line in look(playground, SETS).text.splitlines()]


def test_complete(filled: Playground) -> None:
    status = look(filled, SETS)
    assert status.complete
    assert status.text.endswith("complete: every line and every picture is there")
    assert ["captions", "3", "3", "3", "0", "complete"] in lines(filled)
    assert ["coco/train2017", "1", "0"] in lines(filled)
    assert ["llava/llava_pretrain/images", "1", "0"] in lines(filled)


def test_missing_pictures_are_counted_where_they_belong(filled: Playground) -> None:
    (filled.data / IMAGES[0]).unlink()
    assert not look(filled, SETS).complete
    assert ["captions", "3", "3", "3", "1", "pictures", "missing"] in lines(filled)
    assert ["chinese", "1", "1", "1", "1", "pictures", "missing"] in lines(filled)
    assert ["coco/train2017", "1", "1", IMAGES[0]] in lines(filled)
    assert ["vg/VG_100K", "1", "0"] in lines(filled)


def test_missing_annotations_and_other_counts(filled: Playground) -> None:
    filled.annotation("chinese").unlink()
    write_annotation(filled, "captions", [record(0, IMAGES[1])])
    assert not look(filled, SETS).complete
    assert ["chinese", "-", "1", "-", "-", "no", "annotations"] in lines(filled)
    assert ["captions", "1", "3", "1", "0", "other", "count"] in lines(filled)


def test_broken_lines_are_named(filled: Playground) -> None:
    write_annotation(filled, "chinese", ["{"])
    status = look(filled, SETS)
    assert not status.complete
    assert "1 lines cannot be read" in status.text
    assert "chinese.jsonl:1: not valid JSON" in status.text


def test_pictures_elsewhere_have_a_line(filled: Playground, tmp_path: Path) -> None:
    write_annotation(filled, "chinese", [record(0, "../../charts/1.png")])
    assert ["(elsewhere)", "1", "1", "../charts/1.png"] in lines(filled)


def test_empty_playground(playground: Playground) -> None:
    status = look(playground)
    assert not status.complete
    assert status.text.count("no annotations") == 9
