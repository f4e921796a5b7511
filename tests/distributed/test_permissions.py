"""What a run leaves can be read by whom the umask says, no more and no fewer."""

import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from mmlm.conversion.convert import hf_to_megatron, megatron_to_hf
from mmlm.train.stop import MARKER_FILE, write_marker
from tests.distributed.launch import run_ranks
from tests.distributed.test_trainer import config, train_rank, world

__all__ = ["world"]


def odd_permissions(folder: Path, umask: int) -> list[str]:
    """Files and folders that were not made with the usual permissions."""
    odd = []
    for each in [folder, *folder.rglob("*")]:
        wanted = (0o777 if each.is_dir() else 0o666) & ~umask
        found = stat.S_IMODE(each.stat().st_mode)
        if found != wanted:
            odd.append(f"{each.relative_to(folder)}: {found:o}, not {wanted:o}")
    return odd


@pytest.mark.distributed
@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_a_run_its_exports_and_conversions(umask: int, world: Path, tmp_path: Path) -> None:
    earlier = os.umask(umask)
    try:
        output = tmp_path / "run"
        run = config(world, output, tp=2, train_iters=2)
        settings = replace(
            run.checkpoint, save_interval=1, save_total_limit=1, export_hf_interval=1
        )
        run_ranks(2, train_rank, replace(run, checkpoint=settings))
        write_marker(output, iteration=2, train_iters=2, reason="SIGTERM")
        megatron_to_hf(load=output / "checkpoints", output=tmp_path / "hf")
        parts = world / "hf"
        hf_to_megatron(vision=parts / "vision", llm=parts / "llm", output=tmp_path / "converted")
    finally:
        os.umask(earlier)
    left = {each.name for each in output.iterdir()}
    assert left >= {"checkpoints", "hf", "metrics.jsonl", "tensorboard", "data_cache", MARKER_FILE}
    assert left >= {"config.json", "run.lock", "data_ledger.jsonl"}
    for folder in (output, tmp_path / "hf", tmp_path / "converted"):
        assert odd_permissions(folder, umask) == []


def test_a_private_file_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "private").touch(0o600)
    (tmp_path / "closed").mkdir(0o700)
    assert len(odd_permissions(tmp_path, 0o022)) == 3, "pytest's own folder is closed too"
