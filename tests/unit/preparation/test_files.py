"""Files are complete or not there."""

import os
from pathlib import Path

import pytest

from mmlm.errors import DataError
from mmlm.preparation.files import make_folder, replacing, require_space
from tests.preparation_helpers import files_below


def test_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    with replacing(path) as file:
        file.write(b"data")
        assert not path.exists()
    assert path.read_bytes() == b"data"
    assert files_below(tmp_path) == ["new/file"]


def test_failure_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(TypeError), replacing(path) as file:
        file.write(b"new" + "text")  # type: ignore[operator]
    assert path.read_bytes() == b"old"
    assert files_below(tmp_path) == ["file"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has /dev/full")
def test_full_disk_is_named(tmp_path: Path) -> None:
    path = tmp_path / "file"
    (tmp_path / ".file.part").symlink_to("/dev/full")
    message = r"file: cannot be written \(No space left on device\)"
    with pytest.raises(DataError, match=message), replacing(path) as file:
        file.write(b"data")
    assert files_below(tmp_path) == []


def test_file_in_the_way_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder").write_text("")
    path = tmp_path / "folder" / "file"
    with pytest.raises(DataError, match="folder/file: cannot be written"), replacing(path) as file:
        file.write(b"data")
    with pytest.raises(DataError, match=r"folder: cannot be made \(File exists\); choose another"):
        make_folder(tmp_path / "folder")


def test_errors_of_the_reader_pass(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="truncated picture"), replacing(tmp_path / "file"):
        raise OSError("truncated picture")


def test_space(tmp_path: Path) -> None:
    require_space(tmp_path, 1, "a byte")
    with pytest.raises(DataError, match=r"the moon takes 1000000000.000 GB, but the disk of"):
        require_space(tmp_path, 10**18, "the moon")
