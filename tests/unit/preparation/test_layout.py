"""Notes on what is done, and the lock."""

import pytest

from mmlm.errors import DataError
from mmlm.preparation.layout import Playground


def test_notes_hold_for_their_fingerprint(playground: Playground) -> None:
    assert not playground.is_done("unpack", "data/coco.zip", [10, 20])
    playground.mark_done("unpack", "data/coco.zip", [10, 20], num_files=3)
    assert playground.is_done("unpack", "data/coco.zip", [10, 20])
    assert not playground.is_done("unpack", "data/coco.zip", [10, 21])
    assert not playground.is_done("unpack", "data/vg.zip", [10, 20])


def test_spoilt_note_counts_as_none(playground: Playground) -> None:
    playground.mark_done("download", "coco")
    assert playground.is_done("download", "coco")
    playground.record("download", "coco").write_text("{")
    assert not playground.is_done("download", "coco")


def test_two_preparations_do_not_meet(playground: Playground) -> None:
    other = Playground(root=playground.root)
    with (
        playground.locked(),
        pytest.raises(DataError, match="another `mmlm data prepare` is at work there"),
        other.locked(),
    ):
        pytest.fail("two preparations at once")
    with other.locked():
        assert other.records.is_dir()
