"""What passes is waited for, what does not is told, and neither is taken for damage."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from mmlm.checkpoint import integrity, patient
from mmlm.checkpoint.fallback import find_intact
from mmlm.checkpoint.manifest import MANIFEST_FILE, iterations
from mmlm.checkpoint.patient import UnreachableFileError, read_patiently
from mmlm.checkpoint.safe_pickle import refuse_code
from tests.distributed.launch import group_of_one, run_ranks
from tests.unit.checkpoint.test_fallback import save

PASSING = [errno.ESTALE, errno.ETIMEDOUT, errno.EACCES, errno.EMFILE]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patient, "_WAITS_SECONDS", (0.0, 0.0, 0.0))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    with group_of_one():
        for iteration in (3, 6):
            save(tmp_path / "checkpoints", iteration)
    return tmp_path / "checkpoints"


def failing(number: int, times: int) -> Callable[[Path], bytes]:
    """A reader whose first calls fail."""
    left = [OSError(number, os.strerror(number)) for _ in range(times)]

    def read(file: Path) -> bytes:
        if left:
            raise left.pop()
        return file.read_bytes()

    return read


@pytest.mark.parametrize("number", PASSING)
def test_what_passes_is_waited_for(tmp_path: Path, number: int) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"content")
    assert read_patiently(failing(number, 3), file) == b"content"
    with pytest.raises(UnreachableFileError, match=r"file: cannot be read: .* 3 more attempts"):
        read_patiently(failing(number, 4), file)


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EIO])
def test_what_is_of_the_file_is_raised_at_once(tmp_path: Path, number: int) -> None:
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        read_patiently(failing(number, 1), tmp_path / "file")
    assert caught.value.errno == number


@pytest.mark.parametrize("number", PASSING)
def test_a_passing_error_of_a_checksum_is_no_damage(
    root: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(integrity, "sha256_of", failing(number, 1000))
    with (
        group_of_one(),
        pytest.raises(UnreachableFileError, match=r"iter_0000006/.*cannot be read"),
    ):
        find_intact(root, checksums=True)
    assert [each.name for each in iterations(root)] == ["iter_0000003", "iter_0000006"]


def test_a_disk_that_cannot_read_is_damage(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = integrity.sha256_of

    def read(file: Path) -> str:
        if file.parent.name == "iter_0000006":
            raise OSError(errno.EIO, "Input/output error")
        return real(file)

    monkeypatch.setattr(integrity, "sha256_of", read)
    with group_of_one():
        found = find_intact(root, checksums=True)
    assert found is not None and found.path.name == "iter_0000003"


@pytest.mark.parametrize("name", [MANIFEST_FILE, ".metadata", integrity.INTEGRITY_FILE])
def test_a_small_file_that_cannot_be_reached_is_no_damage(
    root: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.read_bytes

    def read(self: Path) -> bytes:
        if self.name == name:
            raise OSError(errno.ESTALE, "Stale file handle")
        return real(self)

    monkeypatch.setattr(Path, "read_bytes", read)
    with group_of_one(), pytest.raises(UnreachableFileError, match=f"{name}: .*Stale file handle"):
        find_intact(root, checksums=True)


def test_a_file_that_cannot_be_reached_holds_no_code(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr("torch.load", load)
    with pytest.raises(UnreachableFileError, match=r"common\.pt: cannot be read: Stale"):
        refuse_code(root / "iter_0000006" / "common.pt")


def _unreachable_on_one_rank(directory: Path) -> str:
    patient._WAITS_SECONDS = (0.0,)
    if dist.get_rank() == 1:
        integrity.sha256_of = failing(errno.ESTALE, 1000)  # type: ignore[assignment]
    try:
        integrity.find_damage(directory, checksums=True)
    except UnreachableFileError as error:
        return str(error)
    return "nothing"


@pytest.mark.distributed
def test_all_ranks_raise_what_one_cannot_reach(root: Path) -> None:
    found = run_ranks(2, _unreachable_on_one_rank, root / "iter_0000006", timeout_seconds=60)
    assert found[0] == found[1]
    assert "cannot be read: Stale file handle" in found[0]
