"""Sizes and checksums of the files of a checkpoint: written with it, compared before it is read.

``integrity.json`` lies in the iteration's directory and names every other file there:
``{"version": 1, "files": {"__0_0.distcp": {"bytes": 123, "sha256": "..."}}}``. A checksum is null
where the one who wrote the file did not have the bytes in order: of converted weights only the size
is known.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mmlm.checkpoint.patient import UnreachableFileError, read_patiently, size_of
from mmlm.errors import CheckpointError
from mmlm.log import get_logger
from mmlm.parallel.agreement import on_rank_zero

INTEGRITY_FILE = "integrity.json"
_VERSION = 1
_SMALL_BYTES = 64 * 2**20
_BLOCK_BYTES = 4 * 2**20


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """What a file was when it was written."""

    bytes: int
    """Its size."""
    sha256: str | None
    """Its checksum in hexadecimal digits; None if unknown."""


@dataclass(frozen=True, kw_only=True)
class WrittenFile(FileRecord):
    """A file that a rank says it has written."""

    rank: int
    """Which rank."""


def write_integrity(directory: Path, written: Mapping[str, WrittenFile]) -> None:
    """Write the record of a directory that is otherwise complete.

    Args:
        directory: of an iteration, not published yet.
        written: file name -> what the ranks have hashed while they wrote it. Of the other files,
            small ones are read for it and large ones have their size recorded alone.

    Raises:
        CheckpointError: when a file of ``written`` is not here, or is of another size.
    """
    _refuse_absent(directory, written)
    records = {
        name: asdict(FileRecord(bytes=each.bytes, sha256=each.sha256))
        for name, each in written.items()
    }
    for file in sorted(directory.rglob("*")):
        name, is_own = file.relative_to(directory).as_posix(), file.name == INTEGRITY_FILE
        if file.is_file() and not is_own and name not in records:
            size = file.stat().st_size
            checksum = sha256_of(file) if size <= _SMALL_BYTES else None
            records[name] = asdict(FileRecord(bytes=size, sha256=checksum))
    text = json.dumps({"version": _VERSION, "files": records}, indent=1)
    (directory / INTEGRITY_FILE).write_text(text + "\n", encoding="utf-8")


def read_integrity(directory: Path) -> dict[str, FileRecord] | None:
    """Read the record of a directory: file name -> what it was; None if there is no record.

    Raises:
        CheckpointError: when the record itself is damaged.
    """
    file = directory / INTEGRITY_FILE
    try:
        content: Any = json.loads(read_patiently(Path.read_bytes, file))
        if content["version"] != _VERSION:
            raise ValueError(f"version {content['version']!r}, known is {_VERSION}")
        return {
            name: FileRecord(bytes=int(record["bytes"]), sha256=record["sha256"])
            for name, record in content["files"].items()
        }
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: damaged: {type(error).__name__}: {error}") from error


def find_damage(
    directory: Path, *, checksums: bool, group: dist.ProcessGroup | None = None
) -> str | None:
    """Compare a checkpoint with its record; collective, the files are shared out over the ranks.

    Args:
        directory: of an iteration.
        checksums: whether to read all files and compare their checksums, or only their sizes.
        group: all ranks, for small messages.

    Returns:
        What is wrong, naming the file, the same on every rank; None when nothing is.

    Raises:
        UnreachableFileError: on all ranks, when a file cannot be read for a reason that is not its
            own, and no other one is damaged.
    """

    def look() -> tuple[str | None, dict[str, FileRecord]]:
        try:
            records = read_integrity(directory)
        except UnreachableFileError:
            raise
        except CheckpointError as error:
            return str(error), {}
        if records is None:
            get_logger().info(f"{directory}: has no {INTEGRITY_FILE}; its files are not compared")
            return None, {}
        hashed = {name: each for name, each in records.items() if each.sha256 is not None}
        if checksums and len(hashed) < len(records):
            get_logger().info(
                f"{directory}: of {len(records) - len(hashed)} files there are no checksums, as of "
                "all converted weights; only their sizes are compared"
            )
        return _wrong_size(directory, records), hashed

    damage, hashed = on_rank_zero(look, group)
    if damage is not None or not checksums or not hashed:
        return damage
    own = _share(hashed, dist.get_world_size())[dist.get_rank()]
    damage, unreachable = None, None
    try:
        damage = _wrong_checksum(directory, own)
    except UnreachableFileError as error:
        unreachable = str(error)
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (damage, unreachable), group=group)
    damage = next((each for each, _ in found if each is not None), None)
    unreachable = next((each for _, each in found if each is not None), None)
    if damage is None and unreachable is not None:
        raise UnreachableFileError(unreachable)
    return damage


def refuse_damage(
    directory: Path, *, checksums: bool, group: dist.ProcessGroup | None = None
) -> None:
    """Raise a CheckpointError on all ranks for what `find_damage` finds; collective."""
    damage = find_damage(directory, checksums=checksums, group=group)
    if damage is not None:
        raise CheckpointError(
            f"{damage}; the checkpoint is damaged: copy it again or name another one"
        )


def sha256_of(file: Path) -> str:
    """SHA-256 of a file in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(file, "rb", buffering=0) as stream:
        buffer = bytearray(_BLOCK_BYTES)
        while count := stream.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def _refuse_absent(directory: Path, written: Mapping[str, WrittenFile]) -> None:
    """Look, on this rank, for what all ranks have written."""
    problems = []
    for name, each in sorted(written.items()):
        problem = _wrong_size(directory, {name: each})
        if problem is not None:
            problems.append(f"{problem.removeprefix(f'{directory}/')} (by rank {each.rank})")
    if problems:
        raise CheckpointError(
            f"{directory}: of {len(written)} files that the ranks have written, rank 0 does not "
            f"find {len(problems)} as they were written: {'; '.join(problems)}. Every rank must "
            "write to one shared file system: put output_dir on one"
        )


def _wrong_size(directory: Path, records: Mapping[str, FileRecord]) -> str | None:
    for name, record in records.items():
        file = directory / name
        try:
            size = size_of(file)
        except OSError as error:
            return f"{file}: {'missing' if isinstance(error, FileNotFoundError) else error}"
        if size != record.bytes:
            return f"{file}: has {size} bytes, {record.bytes} were written"
    return None


def _wrong_checksum(directory: Path, records: Mapping[str, FileRecord]) -> str | None:
    for name, record in records.items():
        file = directory / name
        try:
            found = read_patiently(sha256_of, file)
        except OSError as error:
            return f"{file}: cannot be read: {error.strerror or error}"
        if found != record.sha256:
            return f"{file}: SHA-256 is {found[:12]}…, {str(record.sha256)[:12]}… was written"
    return None


def _share(records: Mapping[str, FileRecord], num_shares: int) -> list[dict[str, FileRecord]]:
    """Share files out so that all have about as many bytes to read."""
    shares: list[dict[str, FileRecord]] = [{} for _ in range(num_shares)]
    sizes = [0] * num_shares
    for name, record in sorted(records.items(), key=lambda item: (-item[1].bytes, item[0])):
        smallest = sizes.index(min(sizes))
        shares[smallest][name] = record
        sizes[smallest] += record.bytes
    return shares
