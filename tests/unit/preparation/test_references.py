"""What annotations name, and what is there."""

from mmlm.preparation.layout import Playground
from mmlm.preparation.references import missing_images, read_references
from mmlm.preparation.sources import PUBLISHED_SETS
from tests.preparation_helpers import record, write_annotation

CAPTIONS, CHINESE = PUBLISHED_SETS[0], PUBLISHED_SETS[1]


def test_pictures_are_named_below_data_and_once(playground: Playground) -> None:
    write_annotation(
        playground,
        CAPTIONS.name,
        [record(0, "sam/images/sa_1.jpg"), "", record(1, None), record(2, "sam/images/sa_1.jpg")],
    )
    write_annotation(playground, CHINESE.name, [record(0, "train2017/1.jpg"), "{", "[1]"])
    captions, chinese = read_references(playground)
    assert captions.num_records == 3
    assert captions.images == {"sam/images/sa_1.jpg"}
    assert captions.broken == ()
    assert chinese.images == {"coco/train2017/1.jpg"}
    assert chinese.num_records == 3
    assert [message.split(": ")[0][-2:] for message in chinese.broken] == [":2", ":3"]


def test_missing_pictures(playground: Playground) -> None:
    folder = playground.data / "coco/train2017"
    folder.mkdir(parents=True)
    (folder / "1.jpg").write_bytes(b"")
    named = ["coco/train2017/1.jpg", "coco/train2017/2.jpg", "vg/VG_100K/1.jpg"]
    assert missing_images(playground.data, named) == ("coco/train2017/2.jpg", "vg/VG_100K/1.jpg")
