"""Where pictures of the known archives go."""

from pathlib import PurePosixPath

import pytest

from mmlm.errors import DataError
from mmlm.preparation.placement import is_picture, picture_destination
from mmlm.preparation.sources import IMAGE_FOLDERS, SOURCES, image_folders

FOLDERS = {source.name: source.folders for source in SOURCES}


@pytest.mark.parametrize(
    ("source", "member", "place"),
    [
        ("coco", "train2017/000000000009.jpg", "coco/train2017/000000000009.jpg"),
        ("chartqa", "ChartQA Dataset/train/png/1.png", "chartqa/train/png/1.png"),
        ("chartqa", "ChartQA Dataset/val/png/train/1.png", "chartqa/val/png/train/1.png"),
        ("docvqa-train", "./train/documents/a_1.png", "docvqa/train/documents/a_1.png"),
        ("ai2d", "ai2d/abc_images/1.png", "ai2d/abc_images/1.png"),
        ("ai2d", "ai2d/images/1.png", "ai2d/images/1.png"),
        ("gqa", "images/1.jpg", "gqa/images/1.jpg"),
        ("llava", "00000/000000010.jpg", "llava/llava_pretrain/images/00000/000000010.jpg"),
        ("textvqa", "train_images/a.jpg", "textvqa/train_images/a.jpg"),
        ("vg-1", "VG_100K/1.jpg", "vg/VG_100K/1.jpg"),
        ("vg-2", "VG_100K_2/1.jpg", "vg/VG_100K_2/1.jpg"),
        ("webdata", "data/wikiart/images/1.jpg", "wikiart/images/1.jpg"),
        ("webdata", "data/web-landmark/images/1.jpg", "web-landmark/images/1.jpg"),
        ("geoqa+", "0.png", "geoqa+/images/0.png"),
        ("synthdog-en-images", "synthdog/deep/00000001.jpg", "synthdog-en/images/00000001.jpg"),
        # the dataset repository's own archives
        ("llava", "llava/llava_pretrain/images/0/1.jpg", "llava/llava_pretrain/images/0/1.jpg"),
    ],
)
def test_place(source: str, member: str, place: str) -> None:
    found = picture_destination(PurePosixPath(member), FOLDERS[source])
    assert found == PurePosixPath(place)


@pytest.mark.parametrize(
    "member",
    ["train2017/readme.txt", "__MACOSX/train2017/._1.jpg", "train2017/._1.jpg", "train2017"],
)
def test_what_is_no_picture_is_left_out(member: str) -> None:
    assert not is_picture(PurePosixPath(member))
    assert picture_destination(PurePosixPath(member), image_folders("coco")) is None


def test_pictures_that_belong_nowhere_are_left_out() -> None:
    member = PurePosixPath("test_images/1.jpg")
    assert picture_destination(member, image_folders("vg")) is None


def test_ambiguous_is_refused() -> None:
    with pytest.raises(DataError, match=r"'images/1.jpg' could belong to ai2d/images, dvqa/images"):
        picture_destination(PurePosixPath("images/1.jpg"), IMAGE_FOLDERS)


def test_a_longer_run_of_parts_wins() -> None:
    member = PurePosixPath("images/gqa/images/1.jpg")
    assert picture_destination(member, IMAGE_FOLDERS) == PurePosixPath("gqa/images/1.jpg")
