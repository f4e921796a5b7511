"""Book covers of any format as .jpg."""

import logging
import os
from pathlib import Path

import pytest
from PIL import Image

from mmlm.errors import DataError
from mmlm.preparation import ocr_vqa
from mmlm.preparation.layout import Playground
from mmlm.preparation.ocr_vqa import convert_ocr_vqa
from tests.preparation_helpers import files_below, picture


@pytest.fixture
def covers(playground: Playground) -> Path:
    folder = playground.downloads / "ocr_vqa" / "images"
    folder.mkdir(parents=True)
    (folder / "1.jpg").write_bytes(picture())
    (folder / "2.gif").write_bytes(picture("GIF"))
    (folder / "3.png").write_bytes(picture("PNG"))
    (folder / "4.jpg").write_bytes(picture("GIF"))  # the suffix is wrong
    (folder / "5.GIF").write_bytes(picture("JPEG"))  # so is this one
    (folder / "dataset.json").write_text("{}")
    return folder


def target(playground: Playground) -> Path:
    return playground.data / "ocr_vqa/images"


def test_every_cover_becomes_a_jpeg(playground: Playground, covers: Path) -> None:
    assert convert_ocr_vqa(playground, covers, workers=1) == 5
    names = [f"{number}.jpg" for number in range(1, 6)]
    assert files_below(target(playground)) == names
    for name in names:
        with Image.open(target(playground) / name) as image:
            assert (image.format, image.mode) == ("JPEG", "RGB")
    assert os.path.samefile(covers / "1.jpg", target(playground) / "1.jpg")
    assert (target(playground) / "5.jpg").read_bytes() == (covers / "5.GIF").read_bytes()


def test_second_run_makes_only_what_is_missing(playground: Playground, covers: Path) -> None:
    convert_ocr_vqa(playground, covers, workers=1)
    kept = (target(playground) / "2.jpg").stat().st_mtime_ns
    (target(playground) / "3.jpg").unlink()
    assert convert_ocr_vqa(playground, covers, workers=1) == 1
    assert (target(playground) / "2.jpg").stat().st_mtime_ns == kept


def test_pictures_in_the_target_folder_are_converted_too(playground: Playground) -> None:
    target(playground).mkdir(parents=True)
    (target(playground) / "7.png").write_bytes(picture("PNG"))
    (target(playground) / "8.gif").write_bytes(picture("GIF"))
    (target(playground) / "8.jpg").write_bytes(picture())
    assert convert_ocr_vqa(playground, playground.downloads / "nothing", workers=1) == 1
    assert files_below(target(playground)) == ["7.jpg", "7.png", "8.gif", "8.jpg"]


def test_jpeg_wins_over_another_file_of_its_name(playground: Playground, covers: Path) -> None:
    (covers / "3.jpeg").write_bytes(picture())
    convert_ocr_vqa(playground, covers, workers=1)
    assert os.path.samefile(covers / "3.jpeg", target(playground) / "3.jpg")


def test_covers_that_do_not_decode_are_named(
    playground: Playground, covers: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (covers / "2.gif").write_bytes(b"<html>404 Not Found</html>")
    with caplog.at_level(logging.WARNING, "mmlm"):
        assert convert_ocr_vqa(playground, covers, workers=1) == 4
    assert "1 pictures of OCR-VQA do not decode and are left out" in caplog.text
    listing = (playground.records / "ocr_vqa_broken.txt").read_text()
    assert listing.startswith(f"{covers / '2.gif'}: the picture does not decode")


def test_several_processes_make_the_same_files(
    playground: Playground, covers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ocr_vqa, "_CHUNK", 2)
    assert convert_ocr_vqa(playground, covers, workers=2) == 5
    several = {path.name: path.read_bytes() for path in target(playground).iterdir()}
    other = Playground(root=playground.root.with_name("other"))
    convert_ocr_vqa(other, covers, workers=1)
    assert several == {path.name: path.read_bytes() for path in target(other).iterdir()}


def test_copies_where_a_file_cannot_have_two_names(
    playground: Playground, covers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Path, link: Path) -> None:
        raise OSError("another disk")

    monkeypatch.setattr("os.link", refuse)
    convert_ocr_vqa(playground, covers, workers=1)
    assert (target(playground) / "1.jpg").read_bytes() == picture()


def test_folder_in_the_way_is_named(playground: Playground, covers: Path) -> None:
    playground.data.mkdir()
    (playground.data / "ocr_vqa").write_text("")
    with pytest.raises(DataError, match="ocr_vqa/images: cannot be made"):
        convert_ocr_vqa(playground, covers, workers=1)
