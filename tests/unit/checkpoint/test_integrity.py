"""Sizes and checksums: every kind of damage is found, named, and the same on all ranks."""

import json
import os
from hashlib import sha256
from pathlib import Path

import pytest
import torch.distributed as dist

from mmlm.checkpoint import integrity
from mmlm.checkpoint.integrity import (
    INTEGRITY_FILE,
    WrittenFile,
    find_damage,
    read_integrity,
    refuse_damage,
    write_integrity,
)
from mmlm.errors import CheckpointError
from tests.distributed.launch import group_of_one, run_ranks

CONTENT = {"__0_0.distcp": b"a" * 5000, "__1_0.distcp": b"b" * 300, "hf_assets/x.json": b"{}"}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "hf_assets").mkdir()
    for name, content in CONTENT.items():
        (tmp_path / name).write_bytes(content)
    checksum = sha256(b"a" * 5000).hexdigest()
    write_integrity(tmp_path, {"__0_0.distcp": WrittenFile(bytes=5000, sha256=checksum, rank=0)})
    return tmp_path


def test_every_file_is_recorded(directory: Path) -> None:
    records = read_integrity(directory)
    assert records is not None and records.keys() == CONTENT.keys()
    for name, content in CONTENT.items():
        assert records[name].bytes == len(content)
        assert records[name].sha256 == sha256(content).hexdigest()


def test_of_large_files_without_checksum_the_size_is_recorded(
    directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(integrity, "_SMALL_BYTES", 1000)
    write_integrity(directory, {})
    records = read_integrity(directory)
    assert records is not None and records["__0_0.distcp"].sha256 is None
    assert records["__1_0.distcp"].sha256 is not None
    (directory / "__0_0.distcp").write_bytes(b"c" * 5000)
    monkeypatch.setattr(integrity.get_logger(), "propagate", True)
    with group_of_one(), caplog.at_level("INFO", "mmlm"):
        assert find_damage(directory, checksums=True) is None
        assert "of 1 files there are no checksums" in caplog.text
        (directory / "__0_0.distcp").write_bytes(b"c" * 4999)
        damage = find_damage(directory, checksums=False)
        assert damage is not None and "has 4999 bytes, 5000 were written" in damage


def test_what_a_rank_wrote_elsewhere_is_named(directory: Path) -> None:
    (directory / INTEGRITY_FILE).unlink()
    written = {
        "__1_0.distcp": WrittenFile(bytes=301, sha256="1" * 64, rank=1),
        "__9_0.distcp": WrittenFile(bytes=300, sha256="9" * 64, rank=9),
    }
    with pytest.raises(CheckpointError) as caught:
        write_integrity(directory, written)
    text = str(caught.value)
    assert "__1_0.distcp: has 300 bytes, 301 were written (by rank 1)" in text
    assert "__9_0.distcp: missing (by rank 9)" in text
    assert "Every rank must write to one shared file system" in text
    assert not (directory / INTEGRITY_FILE).exists()


def _both(directory: Path, file: str, kind: str) -> tuple[str | None, str | None]:
    if dist.get_rank() == 0:
        path = directory / file
        if kind == "flipped":
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
        elif kind == "cut":
            os.truncate(path, path.stat().st_size - 1)
        elif kind == "gone":
            path.unlink()
    dist.barrier()
    return find_damage(directory, checksums=True), find_damage(directory, checksums=False)


@pytest.mark.distributed
@pytest.mark.parametrize("file", CONTENT)
@pytest.mark.parametrize("kind", ["flipped", "cut", "gone"])
def test_all_ranks_find_the_same_damage(directory: Path, file: str, kind: str) -> None:
    found = run_ranks(2, _both, directory, file, kind, timeout_seconds=60)
    assert found[0] == found[1]
    with_checksums, without = found[0]
    assert with_checksums is not None and with_checksums.startswith(f"{directory / file}: ")
    text = {"flipped": "SHA-256 is ", "cut": "were written", "gone": "missing"}[kind]
    assert text in with_checksums
    assert without == (None if kind == "flipped" else with_checksums)


@pytest.mark.distributed
def test_what_is_whole_is_no_damage(directory: Path) -> None:
    assert run_ranks(3, _both, directory, "", "none") == [(None, None)] * 3


def test_without_a_record_nothing_is_compared_and_that_is_said(
    directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (directory / INTEGRITY_FILE).unlink()
    monkeypatch.setattr(integrity.get_logger(), "propagate", True)
    with group_of_one(), caplog.at_level("INFO", "mmlm"):
        assert find_damage(directory, checksums=True) is None
    assert "has no integrity.json; its files are not compared" in caplog.text


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"version": 2, "files": {}}',
        '{"version": 1}',
        '{"version": 1, "files": {"a": 1}}',
    ],
)
def test_a_damaged_record_is_a_damage(directory: Path, text: str) -> None:
    (directory / INTEGRITY_FILE).write_text(text)
    with group_of_one(), pytest.raises(CheckpointError, match=r"integrity\.json: damaged: "):
        refuse_damage(directory, checksums=True)


def test_a_named_checkpoint_that_is_damaged_is_an_error(directory: Path) -> None:
    content = json.loads((directory / INTEGRITY_FILE).read_text())
    content["files"]["__1_0.distcp"]["sha256"] = "0" * 64
    (directory / INTEGRITY_FILE).write_text(json.dumps(content))
    with (
        group_of_one(),
        pytest.raises(
            CheckpointError, match=r"__1_0\.distcp: SHA-256 is .*; the checkpoint is dam"
        ),
    ):
        refuse_damage(directory, checksums=True)
