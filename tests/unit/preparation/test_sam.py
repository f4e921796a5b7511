"""The named pictures of SA-1B, and nothing else."""

import pytest

from mmlm.errors import DataError
from mmlm.preparation.layout import Playground
from mmlm.preparation.sam import unpack_sam
from mmlm.preparation.sources import PUBLISHED_SETS
from tests.preparation_helpers import files_below, record, write_annotation, write_tar, write_zip

NAMED = ["sam/images/sa_3.jpg", "sam/images/sa_12.jpg", "sam/images/sa_40.jpg"]


@pytest.fixture
def annotated(playground: Playground) -> Playground:
    lines = [record(number, image) for number, image in enumerate([*NAMED, "coco/train2017/1.jpg"])]
    write_annotation(playground, PUBLISHED_SETS[0].name, lines)
    return playground


def test_chooses_what_is_named(annotated: Playground) -> None:
    source = annotated.downloads / "sam"
    for number in range(3):
        files = {f"./sa_{10 * number + k}.jpg": b"%d" % (10 * number + k) for k in range(10)}
        files |= {f"./sa_{10 * number}.json": b"{}"}
        write_tar(source / f"sa_{number:06d}.tar", files)
    assert unpack_sam(annotated, source) == 1
    assert files_below(annotated.data) == ["sam/images/sa_12.jpg", "sam/images/sa_3.jpg"]
    assert (annotated.data / "sam/images/sa_12.jpg").read_bytes() == b"12"


def test_stops_when_all_are_there(annotated: Playground) -> None:
    source = annotated.downloads / "sam"
    write_zip(source / "a.zip", {f"sam_images/sa_{number}.jpg": b"1" for number in range(50)})
    (source / "b.zip").write_bytes(b"PK\x03\x04 would not unpack")
    assert unpack_sam(annotated, source) == 0
    assert files_below(annotated.data) == sorted(NAMED)


def test_without_an_archive_there_is_nothing_to_do(playground: Playground) -> None:
    assert unpack_sam(playground, playground.downloads / "sam") == 0


def test_without_annotations_there_is_nothing_to_choose(playground: Playground) -> None:
    source = playground.downloads / "sam"
    write_zip(source / "a.zip", {"sa_1.jpg": b"1"})
    with pytest.raises(DataError, match="opensource: no annotation names a picture in sam/images/"):
        unpack_sam(playground, source)
