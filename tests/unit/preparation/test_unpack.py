"""All archives of a playground into the published folders."""

import logging

import pytest

from mmlm.errors import DataError
from mmlm.preparation.layout import Playground
from mmlm.preparation.sources import PUBLISHED_SETS
from mmlm.preparation.unpack import find_archives, unpack_all
from tests.preparation_helpers import files_below, picture, write_tar, write_zip


@pytest.fixture
def filled(playground: Playground) -> Playground:
    """Archives of the dataset repository, and of some individual sources."""
    data, downloads = playground.data, playground.downloads
    write_zip(data / "coco.zip", {"coco/train2017/1.jpg": b"1", "coco/readme.md": b"r"})
    write_zip(data / "geoqa+.zip", {"data/geoqa+/images/0.png": b"2"})
    annotation = f"{PUBLISHED_SETS[0].name}.jsonl"
    write_zip(
        downloads / "annotations" / "playground.zip",
        {f"playground/{annotation}": b"{}\n", "playground/other.jsonl": b"{}\n"},
    )
    write_tar(
        downloads / "docvqa-train" / "train.tar.gz",
        {"train/documents/a.png": b"3", "train/ocr_results/a.json": b"{}"},
        mode="w:gz",
    )
    write_zip(downloads / "webdata" / "WebData" / "a.zip", {"data/wikiart/images/1.jpg": b"4"})
    write_zip(downloads / "sam" / "sam_images.zip", {"sa_1.jpg": b"5"})
    (downloads / "vg-1").mkdir()
    (downloads / "vg-1" / "images.zip.part").write_bytes(b"PK\x03\x04 half of it")
    return playground


def test_everything_goes_where_it_belongs(filled: Playground) -> None:
    assert unpack_all(filled) == 5
    assert [name for name in files_below(filled.data) if not name.endswith(".zip")] == [
        "coco/train2017/1.jpg",
        "docvqa/train/documents/a.png",
        "geoqa+/images/0.png",
        "wikiart/images/1.jpg",
    ]
    assert files_below(filled.annotations) == [f"{PUBLISHED_SETS[0].name}.jsonl"]


def test_second_run_does_nothing_until_asked_or_changed(filled: Playground) -> None:
    unpack_all(filled)
    picture_file = filled.data / "coco/train2017/1.jpg"
    picture_file.unlink()
    assert unpack_all(filled) == 0
    assert not picture_file.exists()
    assert unpack_all(filled, again=True) == 5
    assert picture_file.exists()
    write_zip(filled.data / "coco.zip", {"train2017/2.jpg": b"12"})
    assert unpack_all(filled) == 1


def test_archives_are_removed_only_on_request(filled: Playground) -> None:
    unpack_all(filled)
    assert len(find_archives(filled)) == 5
    unpack_all(filled, again=True, remove=True)
    assert find_archives(filled) == ()


def test_wrong_archive_under_a_name_is_refused(playground: Playground) -> None:
    write_zip(playground.data / "vg.zip", {"VG_3/1.jpg": b"1", "VG_3/2.jpg": b"1"})
    with pytest.raises(DataError, match=r"vg.zip: none of its 2 files belongs .* 'VG_3/1.jpg'"):
        unpack_all(playground)


def test_page_in_place_of_an_archive_is_not_passed_over(playground: Playground) -> None:
    page = playground.downloads / "ai2d" / "ai2d_images.zip"
    page.parent.mkdir(parents=True)
    page.write_text("<!DOCTYPE html> too many users have downloaded this file")
    with pytest.raises(DataError, match=r"ai2d_images.zip: neither zip nor tar \(it begins with"):
        unpack_all(playground)


def test_pieces_of_an_archive_are_named(
    playground: Playground, caplog: pytest.LogCaptureFixture
) -> None:
    write_zip(playground.data / "coco.zip", {"train2017/1.jpg": picture()})
    (playground.data / "vg.zip.part-aa").write_bytes(b"a piece")
    assert unpack_all(playground) == 1
    assert "data: 1 files are no archives and are not touched: vg.zip.part-aa;" in caplog.text


def test_pictures_that_are_left_out_are_told(
    playground: Playground, caplog: pytest.LogCaptureFixture
) -> None:
    write_zip(playground.data / "vg.zip", {"VG_100K/1.jpg": picture(), "stray/2.jpg": picture()})
    with caplog.at_level(logging.INFO, "mmlm"):
        unpack_all(playground)
    assert "1 left out, 1 pictures among them, e.g. 'stray/2.jpg'" in caplog.text
