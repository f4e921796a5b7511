"""Unpacking zip, tar and tar.gz files that nobody here has packed.

Only regular files are made, only where the caller says, each complete or not at all. A name that
leaves the folder (absolute, ``..``, a drive), a link and a device are refused, whatever they are
for. A second run skips what is there in its full size, so a kill costs one file.
"""

import bz2
import gzip
import lzma
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from tqdm import tqdm

from mmlm.errors import DataError
from mmlm.preparation.files import replacing, require_space

Choice = Callable[[PurePosixPath], PurePosixPath | None]
"""From a member's path to its place below the folder, None to leave it out."""

_BLOCK = 512  # bytes of a tar header
_COMPRESSIONS: dict[bytes, Any] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
}
_DAMAGE = (EOFError, tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError)


@dataclass(frozen=True, kw_only=True)
class UnpackReport:
    """What became of an archive's members."""

    num_written: int
    """Files that are new."""
    num_kept: int
    """Files that were there already, in full size."""
    left_out: tuple[str, ...]
    """Members that belong nowhere."""


@dataclass(frozen=True, kw_only=True)
class _Member:
    name: str
    num_bytes: int
    open: Callable[[], IO[bytes]]


def is_archive(path: Path) -> bool:
    """Return whether a file is one that `unpack` can read, by its first bytes."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(_BLOCK)
    compressed = any(head.startswith(magic) for magic in _COMPRESSIONS)
    return head.startswith((b"PK\x03\x04", b"PK\x05\x06")) or compressed or _is_tar(head)


def unpack(archive: Path, folder: Path, choose: Choice) -> UnpackReport:
    """Unpack what is wanted of an archive.

    Args:
        archive: zip or tar, the latter plain or compressed; told apart by content.
        folder: where files go; exists.
        choose: a member's place below ``folder``.

    Returns:
        Counts, and the names that were left out.

    Raises:
        DataError: a dangerous or ambiguous member, a damaged archive, a full disk. Of a zip nothing
            has been written then if the names are at fault; of a tar, which can be read only from
            front to back, the files before it may have been.
    """
    num_written, num_kept = 0, 0
    left_out: list[str] = []
    places: set[PurePosixPath] = set()
    try:
        with (
            tqdm(desc=archive.name, total=1, unit="B", unit_scale=True) as bar,
            _members(archive, bar) as members,
        ):
            for member in members:
                place = choose(_safe_path(archive, member.name))
                if place is None:
                    left_out.append(member.name)
                    continue
                if place in places:
                    raise DataError(
                        f"{archive}: '{member.name}' and a member before it would both be "
                        f"{folder / place}; unpack this archive by hand"
                    )
                places.add(place)
                if _write(member, folder / place, archive):
                    num_written += 1
                else:
                    num_kept += 1
    except (*_DAMAGE, gzip.BadGzipFile) as error:
        raise DataError(
            f"{archive}: the archive is damaged or incomplete after {len(places)} files ({error}); "
            "delete it and download it again. What is unpacked stays"
        ) from error
    except NotImplementedError as error:
        raise DataError(
            f"{archive}: its compression cannot be read here ({error}); unpack it by hand"
        ) from error
    return UnpackReport(num_written=num_written, num_kept=num_kept, left_out=tuple(left_out))


def _write(member: _Member, path: Path, archive: Path) -> bool:
    """Write a file; False when it is there in its full size."""
    if path.is_file() and path.stat().st_size == member.num_bytes:
        return False
    with replacing(path) as file:
        require_space(path.parent, member.num_bytes, f"'{member.name}' of {archive}")
        with member.open() as source:
            shutil.copyfileobj(source, file, 1 << 20)
        written = file.tell()
        if written != member.num_bytes:
            raise EOFError(f"'{member.name}' has {written} of {member.num_bytes} bytes")
    return True


def _safe_path(archive: Path, name: str) -> PurePosixPath:
    path = PurePosixPath(name)
    drive = len(name) > 1 and name[1] == ":"
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or drive:
        raise DataError(
            f"{archive}: the name '{name}' leads out of the folder; this archive is not what it "
            "should be, do not use it"
        )
    return path


def _special(archive: Path, name: str, what: str) -> DataError:
    return DataError(
        f"{archive}: '{name}' is {what}; only regular files are unpacked. Data sets need no "
        "others: look at the archive before you unpack it by hand"
    )


@contextmanager
def _members(archive: Path, bar: "tqdm[None]") -> Iterator[Iterator[_Member]]:
    with archive.open("rb") as raw:
        head = raw.read(_BLOCK)
        raw.seek(0)
        if head.startswith(b"PK"):
            with zipfile.ZipFile(raw) as opened:
                yield _zip_members(archive, opened, bar)
            return
        for magic, decompressor in _COMPRESSIONS.items():
            if head.startswith(magic):
                with decompressor(raw) as plain:
                    yield _tar_members(archive, plain, raw, bar)
                return
        if not _is_tar(head):
            shown = head[:40].decode("utf-8", "replace").strip()
            raise DataError(
                f"{archive}: neither zip nor tar (it begins with '{shown}'); a server may have "
                "sent a page in its place: delete it and download it again"
            )
        yield _tar_members(archive, raw, raw, bar)


def _is_tar(head: bytes) -> bool:
    return head[257:262] == b"ustar"


def _zip_members(archive: Path, opened: zipfile.ZipFile, bar: "tqdm[None]") -> Iterator[_Member]:
    files = [entry for entry in opened.infolist() if not entry.is_dir()]
    for entry in files:  # all names before the first file
        _safe_path(archive, entry.orig_filename)
        kind = stat.S_IFMT(entry.external_attr >> 16)
        if kind not in (0, stat.S_IFREG):
            raise _special(archive, entry.filename, "a link or a device")
        if entry.flag_bits & 1:
            raise DataError(
                f"{archive}: '{entry.filename}' is encrypted; unpack this archive by hand"
            )
    bar.reset(total=sum(entry.file_size for entry in files))
    for entry in files:
        yield _Member(
            name=entry.filename,
            num_bytes=entry.file_size,
            open=lambda entry=entry: opened.open(entry),  # type: ignore[misc]
        )
        bar.update(entry.file_size)


def _tar_members(
    archive: Path, plain: IO[bytes], raw: IO[bytes], bar: "tqdm[None]"
) -> Iterator[_Member]:
    bar.reset(total=archive.stat().st_size)
    blocks = _LastRead(plain)
    # "r:": read in order, skipping what is not wanted, without ever going back.
    with tarfile.open(fileobj=blocks, mode="r:") as opened:  # type: ignore[call-overload]
        for entry in opened:
            bar.update(raw.tell() - bar.n)
            opened.members.clear()  # tarfile would keep a header of every file
            if entry.isdir():
                continue
            if not entry.isreg():
                raise _special(archive, entry.name, "a link, a device or a pipe")
            yield _Member(
                name=entry.name,
                num_bytes=entry.size,
                open=lambda entry=entry: opened.extractfile(entry),  # type: ignore[misc]
            )
    # tarfile takes the end of a file for the end of the archive, which is a block of zeros.
    if blocks.last != bytes(_BLOCK):
        raise EOFError("the end of the archive is missing")
    while plain.read(1 << 20):  # a compressed file's checksum stands behind its data
        pass
    bar.update(raw.tell() - bar.n)


class _LastRead:
    """A file that remembers what was read last."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.last = b""

    def read(self, size: int = -1) -> bytes:
        self.last = self._file.read(size)
        return self.last

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()
