"""A killed conversion goes on; an error leaves nothing; two do not write the same folder."""

import errno
import logging
import os
import shutil
import signal
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from mmlm.checkpoint import row_stream
from mmlm.conversion.convert import hf_to_megatron, megatron_to_hf
from mmlm.conversion.unfinished import bytes_on_disk, unfinished_folder
from mmlm.errors import CheckpointError
from tests.conversion_helpers import assert_equal, convert_in
from tests.tiny_weights import combined_state_dict, read_model_files

KILLED_AFTER = 60
"""Blocks of tensors; a tiny model has 70 tensors of Megatron's and 79 of HuggingFace's."""


def killed(convert: Callable[[], object]) -> None:
    """Run a conversion in a process that is killed in the middle of its sixtieth block."""

    def run() -> None:
        written = 0
        write_at = row_stream.write_at

        def deadly(descriptor: int, raw: memoryview | bytes, offset: int) -> None:
            nonlocal written
            written += 1
            if written == KILLED_AFTER:
                write_at(descriptor, memoryview(raw)[: len(raw) // 2], offset)
                os.kill(os.getpid(), signal.SIGKILL)
            write_at(descriptor, raw, offset)

        row_stream.write_at = deadly
        torch.set_num_threads(1)
        convert()

    process = get_context("fork").Process(target=run)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Offset of every block that is written in this process."""
    offsets: list[int] = []
    write_at = row_stream.write_at

    def counted(descriptor: int, raw: memoryview | bytes, offset: int) -> None:
        offsets.append(offset)
        write_at(descriptor, raw, offset)

    monkeypatch.setattr(row_stream, "write_at", counted)
    return offsets


def test_a_killed_conversion_in_goes_on(tmp_path, write_tiny_parts, writes, caplog):
    parts = write_tiny_parts()
    killed(lambda: convert_in(parts, tmp_path / "ckpt"))
    assert [each.name for each in (tmp_path / "ckpt").iterdir()] == [".iter_0000000.tmp"]
    with caplog.at_level(logging.INFO):
        convert_in(parts, tmp_path / "ckpt")
    assert len(writes) == 70 - (KILLED_AFTER - 1)
    messages = [record.getMessage() for record in caplog.records]
    assert [m for m in messages if "continuing an interrupted conversion" in m]
    assert not [m for m in messages if "corrupted" in m]
    out = megatron_to_hf(load=tmp_path / "ckpt", output=tmp_path / "out")
    assert_equal(read_model_files(out), combined_state_dict(parts))
    # the same bytes as without a kill
    whole = convert_in(parts, tmp_path / "whole")
    file = "__0_0.distcp"
    assert (whole / file).read_bytes() == (tmp_path / "ckpt/iter_0000000" / file).read_bytes()


def test_a_killed_conversion_out_goes_on(tmp_path, write_tiny_parts, writes):
    parts = write_tiny_parts()
    convert_in(parts, tmp_path / "ckpt")
    options = {"load": tmp_path / "ckpt", "output": tmp_path / "out", "parts": True}
    killed(lambda: megatron_to_hf(**options, max_shard_size_bytes=100_000))
    assert not (tmp_path / "out").exists()
    kept = tmp_path / ".out.tmp"
    assert len(list(kept.rglob("*.safetensors"))) > 1
    (kept / "model-00001-of-00099.safetensors").write_text("of another run")
    (kept / "old").mkdir()
    writes.clear()
    megatron_to_hf(**options, max_shard_size_bytes=100_000)
    assert len(writes) == 2 * 79 - (KILLED_AFTER - 1)
    assert_equal(read_model_files(tmp_path / "out"), combined_state_dict(parts))
    assert_equal(combined_state_dict(tmp_path / "out"), combined_state_dict(parts))
    assert not (tmp_path / "out/old").exists()
    assert not kept.exists()


def test_what_a_kill_left_of_other_weights_is_written_anew(tmp_path, write_tiny_parts):
    first = write_tiny_parts()
    killed(lambda: convert_in(first, tmp_path / "ckpt"))
    second = write_tiny_parts(dtype=torch.bfloat16, folder="second")
    convert_in(second, tmp_path / "ckpt")
    expected = combined_state_dict(second)
    out = tmp_path / "out"
    killed(lambda: megatron_to_hf(load=tmp_path / "ckpt", output=out, parts=True, dtype="fp32"))
    megatron_to_hf(load=tmp_path / "ckpt", output=out)
    assert_equal(read_model_files(out), expected)
    assert {each.suffix for each in out.iterdir() if each.is_dir()} == set()


def test_a_full_disk_in_the_middle_leaves_nothing(tmp_path, write_tiny_parts, monkeypatch):
    parts = write_tiny_parts()
    convert_in(parts, tmp_path / "good")

    def full(descriptor: int, raw: memoryview | bytes, offset: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(row_stream, "write_at", full)
    with pytest.raises(CheckpointError, match=r"iter_0000000\.tmp: cannot be written: No space"):
        convert_in(parts, tmp_path / "ckpt")
    assert list((tmp_path / "ckpt").iterdir()) == []
    with pytest.raises(CheckpointError, match=r"\.out\.tmp: cannot be written: No space left on d"):
        megatron_to_hf(load=tmp_path / "good", output=tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_too_little_space_is_said_before_anything_is_written(
    tmp_path, write_tiny_parts, monkeypatch
):
    parts = write_tiny_parts()
    convert_in(parts, tmp_path / "good")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    for convert in (
        lambda: convert_in(parts, tmp_path / "ckpt"),
        lambda: megatron_to_hf(load=tmp_path / "good", output=tmp_path / "out"),
    ):
        with pytest.raises(CheckpointError, match=r"0\.0 GB are needed, 0\.0 GB are free"):
            convert()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["good", "in"]
    # what is on the disk already is not needed once more
    killed_folder = tmp_path / "ckpt/.iter_0000000.tmp"
    shutil.copytree(tmp_path / "good/iter_0000000", killed_folder)
    convert_in(parts, tmp_path / "ckpt")


def test_two_conversions_do_not_write_one_folder(tmp_path, write_tiny_parts):
    parts = write_tiny_parts()
    with (
        unfinished_folder(tmp_path / "ckpt/.iter_0000000.tmp", []),
        pytest.raises(
            CheckpointError, match=r"iter_0000000\.tmp: another conversion is writing it"
        ),
    ):
        convert_in(parts, tmp_path / "ckpt")
    assert (tmp_path / "ckpt/.iter_0000000.tmp").is_dir()


def hold(folder: Path, error: type[BaseException]) -> None:
    with unfinished_folder(folder, ["kept"]):
        (folder / "kept").write_text("x")
        raise error


def test_errors_remove_the_folder_and_a_kill_does_not(tmp_path: Path):
    for error, left in ((ValueError, False), (CheckpointError, False), (KeyboardInterrupt, True)):
        with pytest.raises(error):
            hold(tmp_path / "x", error)
        assert (tmp_path / "x/kept").exists() == left


def test_only_what_may_be_kept_is_kept(tmp_path: Path):
    folder = tmp_path / "x"
    (folder / "a/b").mkdir(parents=True)
    (tmp_path / "outside").write_text("stays")
    for name in ("a/kept", "a/b/other", "other"):
        (folder / name).write_text("12345")
    (folder / "link").symlink_to(tmp_path / "outside")
    assert bytes_on_disk(folder) == 20
    with unfinished_folder(folder, ["a/kept", "link"]):
        found = {each.relative_to(folder).as_posix() for each in folder.rglob("*")}
    assert found == {"a", "a/kept"}
    assert (tmp_path / "outside").exists()
    assert bytes_on_disk(tmp_path / "nowhere") == 0


def test_an_unwritable_place_is_named(tmp_path: Path, write_tiny_parts):
    (tmp_path / "file").write_text("")
    parts = write_tiny_parts()
    with pytest.raises(
        CheckpointError, match=r"file/ckpt/\.iter_0000000\.tmp: cannot be made: Not"
    ):
        hf_to_megatron(vision=parts / "vision", output=tmp_path / "file/ckpt")
