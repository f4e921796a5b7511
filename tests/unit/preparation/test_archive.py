"""Archives: the three forms, malicious ones, damaged ones, and a kill in the middle."""

import io
import multiprocessing
import os
import signal
import stat
import tarfile
import zipfile
from collections import namedtuple
from pathlib import Path, PurePosixPath

import pytest

from mmlm.errors import DataError
from mmlm.preparation import archive as archive_module
from mmlm.preparation.archive import is_archive, unpack
from tests.preparation_helpers import files_below, write_tar, write_zip

FILES = {"a/1.jpg": b"one" * 500, "a/2.jpg": b"two", "notes.txt": b"n", "b/3.jpg": b"", "b/4": b"4"}


def everything(member: PurePosixPath) -> PurePosixPath:
    return member


def pack(path: Path, form: str) -> Path:
    return write_zip(path, FILES) if form == "zip" else write_tar(path, FILES, mode=form)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "outer" / "target"
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize("form", ["zip", "w", "w:gz", "w:bz2", "w:xz"])
def test_unpacks_what_is_chosen_whatever_the_form(tmp_path: Path, target: Path, form: str) -> None:
    packed = pack(tmp_path / "no_suffix", form)
    assert is_archive(packed)
    report = unpack(packed, target, lambda member: None if member.suffix == ".txt" else member)
    assert files_below(target) == ["a/1.jpg", "a/2.jpg", "b/3.jpg", "b/4"]
    assert (target / "a/1.jpg").read_bytes() == FILES["a/1.jpg"]
    assert (report.num_written, report.num_kept, report.left_out) == (4, 0, ("notes.txt",))


@pytest.mark.parametrize("form", ["zip", "w", "w:gz"])
def test_second_run_writes_only_what_is_missing_or_short(
    tmp_path: Path, target: Path, form: str
) -> None:
    packed = pack(tmp_path / "packed", form)
    unpack(packed, target, everything)
    untouched = (target / "a/2.jpg").stat().st_mtime_ns
    (target / "a/1.jpg").write_bytes(b"short")
    (target / "b/4").unlink()
    report = unpack(packed, target, everything)
    assert (report.num_written, report.num_kept) == (2, 3)
    assert (target / "a/1.jpg").read_bytes() == FILES["a/1.jpg"]
    assert (target / "a/2.jpg").stat().st_mtime_ns == untouched


@pytest.mark.parametrize("form", ["zip", "w", "w:gz"])
@pytest.mark.parametrize(
    "name", ["../escaped.jpg", "/escaped.jpg", "a/../../escaped.jpg", "C:/x.jpg", "..\\x.jpg"]
)
def test_names_that_leave_the_folder_are_refused(
    tmp_path: Path, target: Path, form: str, name: str
) -> None:
    files = {"fine.jpg": b"1", name: b"2"}
    packed = tmp_path / "packed"
    packed = write_zip(packed, files) if form == "zip" else write_tar(packed, files, mode=form)
    before = files_below(tmp_path)
    with pytest.raises(DataError, match=r"leads out of the folder; this archive is not what it"):
        unpack(packed, target, everything)
    allowed = [] if form == "zip" else ["fine.jpg"]  # a tar is read from front to back
    assert files_below(target) == allowed
    assert len(files_below(tmp_path)) == len(before) + len(allowed)


SPECIAL = {
    "symlink": (tarfile.SYMTYPE, stat.S_IFLNK),
    "hard link": (tarfile.LNKTYPE, None),
    "device": (tarfile.CHRTYPE, stat.S_IFCHR),
    "pipe": (tarfile.FIFOTYPE, stat.S_IFIFO),
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_links_and_devices_in_a_tar_are_refused(tmp_path: Path, target: Path, kind: str) -> None:
    packed = tmp_path / "packed.tar"
    with tarfile.open(packed, "w") as opened:
        member = tarfile.TarInfo("link")
        member.type, member.linkname = SPECIAL[kind][0], "../../outside"
        opened.addfile(member)
        inner = tarfile.TarInfo("link/passwd")
        inner.size = 1
        opened.addfile(inner, io.BytesIO(b"x"))
    with pytest.raises(DataError, match=r"'link' is a link, a device or a pipe; only regular"):
        unpack(packed, target, everything)
    assert files_below(target) == []


@pytest.mark.parametrize("kind", ["symlink", "device", "pipe"])
def test_links_and_devices_in_a_zip_are_refused(tmp_path: Path, target: Path, kind: str) -> None:
    packed = tmp_path / "packed.zip"
    with zipfile.ZipFile(packed, "w") as opened:
        opened.writestr("fine.jpg", b"1")
        member = zipfile.ZipInfo("link")
        member.create_system = 3
        member.external_attr = (int(SPECIAL[kind][1] or 0) | 0o777) << 16
        opened.writestr(member, "../../outside")
    with pytest.raises(DataError, match=r"'link' is a link or a device; only regular"):
        unpack(packed, target, everything)
    assert files_below(target) == []


def test_encrypted_zip_is_refused(tmp_path: Path, target: Path) -> None:
    packed = write_zip(tmp_path / "packed.zip", {"a.jpg": b"1"})
    data = bytearray(packed.read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1  # general purpose flag of the central directory
    packed.write_bytes(data)
    with pytest.raises(DataError, match=r"'a.jpg' is encrypted"):
        unpack(packed, target, everything)


@pytest.mark.parametrize("form", ["zip", "w", "w:gz", "w:xz"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.85])
def test_truncated_archive_is_named_and_can_be_fetched_again(
    tmp_path: Path, target: Path, form: str, share: float
) -> None:
    packed = tmp_path / "packed"
    files = {f"{number}.jpg": os.urandom(3000) for number in range(8)}
    packed = write_zip(packed, files) if form == "zip" else write_tar(packed, files, mode=form)
    whole = packed.read_bytes()
    packed.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(DataError, match=r"packed: the archive is damaged or incomplete after \d"):
        unpack(packed, target, everything)
    assert all((target / name).read_bytes() == files[name] for name in files_below(target))
    packed.write_bytes(whole)
    unpack(packed, target, everything)
    assert files_below(target) == sorted(files)


def test_tar_that_ends_between_two_files_is_damaged(tmp_path: Path, target: Path) -> None:
    packed = write_tar(tmp_path / "packed.tar", {"1.jpg": b"1" * 512, "2.jpg": b"2" * 512})
    packed.write_bytes(packed.read_bytes()[:1024])
    with pytest.raises(DataError, match=r"after 1 files \(the end of the archive is missing\)"):
        unpack(packed, target, everything)


@pytest.mark.parametrize("form", ["zip", "w:gz"])
def test_changed_byte_is_noticed(tmp_path: Path, target: Path, form: str) -> None:
    files = {"1.jpg": os.urandom(4000)}
    packed = tmp_path / "packed"
    packed = write_zip(packed, files) if form == "zip" else write_tar(packed, files, mode=form)
    data = bytearray(packed.read_bytes())
    data[2000] ^= 1
    packed.write_bytes(data)
    with pytest.raises(DataError, match="damaged or incomplete"):
        unpack(packed, target, everything)
    assert [name for name in files_below(target) if name.endswith(".part")] == []


def test_page_in_place_of_an_archive_is_shown(tmp_path: Path, target: Path) -> None:
    packed = tmp_path / "packed.zip"
    packed.write_text("<!DOCTYPE html><title>Too many downloads</title>")
    assert not is_archive(packed)
    assert not is_archive(tmp_path)
    with pytest.raises(DataError, match=r"neither zip nor tar \(it begins with '<!DOCTYPE html>"):
        unpack(packed, target, everything)


def test_two_members_of_one_place_are_refused(tmp_path: Path, target: Path) -> None:
    packed = write_zip(tmp_path / "packed.zip", {"a/1.jpg": b"1", "b/1.jpg": b"2"})
    with pytest.raises(DataError, match=r"'b/1.jpg' and a member before it would both be"):
        unpack(packed, target, lambda member: PurePosixPath(member.name))


def test_too_small_a_disk_is_said_before_writing(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = write_tar(tmp_path / "packed.tar", FILES)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(2000, 1000, 1000))
    with pytest.raises(DataError, match=r"'a/1.jpg' of .* takes 0.000 GB, but the disk of"):
        unpack(packed, target, everything)
    assert files_below(target) == []


def _unpack_and_die(packed: Path, target: Path) -> None:
    """Be killed (SIGKILL) halfway through writing the fourth file."""
    original = archive_module.shutil.copyfileobj
    count = 0

    def copy(source: io.BufferedReader, file: io.BufferedWriter, length: int) -> None:
        nonlocal count
        count += 1
        if count == 4:
            file.write(source.read(100))
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        original(source, file, length)

    archive_module.shutil.copyfileobj = copy  # type: ignore[assignment]
    unpack(packed, target, everything)


@pytest.mark.parametrize("form", ["zip", "w:gz"])
def test_run_after_a_kill_completes(tmp_path: Path, target: Path, form: str) -> None:
    files = {f"{number}.jpg": os.urandom(3000) for number in range(8)}
    packed = tmp_path / "packed"
    packed = write_zip(packed, files) if form == "zip" else write_tar(packed, files, mode=form)
    process = multiprocessing.get_context("fork").Process(
        target=_unpack_and_die, args=(packed, target)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert files_below(target) == [".3.jpg.part", "0.jpg", "1.jpg", "2.jpg"]
    report = unpack(packed, target, everything)
    assert (report.num_written, report.num_kept) == (5, 3)
    assert files_below(target) == sorted(files)
    assert all((target / name).read_bytes() == data for name, data in files.items())
