"""FRESH=1 deletes an earlier run, but neither a living one nor what a requeued job has done."""

import fcntl
import json
from pathlib import Path

import pytest

from tests.unit.examples.test_pretrain import converted, eight_gpus, put, refusal, run, tools

__all__ = ["tools"]


@pytest.fixture
def checkpoint(tools: Path, tmp_path: Path) -> Path:
    """What is deleted; the training that would follow does nothing."""
    eight_gpus(tools)
    put(tools, "python", "exit 0")
    put(tools, "srun", "exit 0")
    latest = tmp_path / "out/checkpoints/latest"
    latest.parent.mkdir(parents=True)
    latest.write_text("iter_0000005\n", encoding="utf-8")
    holder = {"host": "node3", "pid": 17}
    (tmp_path / "out/run.lock").write_text(json.dumps(holder) + "\n", encoding="utf-8")
    return latest


SLURM = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "8"}


@pytest.mark.parametrize("job", [{}, SLURM, SLURM | {"SLURM_RESTART_COUNT": "0"}])
def test_an_earlier_run_is_deleted(
    job: dict[str, str], checkpoint: Path, tools: Path, tmp_path: Path
) -> None:
    """The killed run left its words in the lock file, but nobody holds the lock."""
    result = run(tools, FRESH="1", **job, **converted(tmp_path))
    assert result.returncode == 0, result.stderr
    assert not checkpoint.exists()


@pytest.mark.parametrize("job", [{}, SLURM])
def test_a_living_run_is_kept(
    job: dict[str, str], checkpoint: Path, tools: Path, tmp_path: Path
) -> None:
    with (tmp_path / "out/run.lock").open("r+", encoding="utf-8") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        error = refusal(run(tools, FRESH="1", **job, **converted(tmp_path)))
    assert f"{tmp_path}/out is in use by another run" in error
    assert '"pid": 17' in error
    assert checkpoint.exists()


def test_a_lock_that_cannot_be_asked_deletes_nothing(
    checkpoint: Path, tools: Path, tmp_path: Path
) -> None:
    (tmp_path / "out/run.lock").unlink()
    (tmp_path / "out/run.lock").mkdir()
    assert "run.lock cannot be opened" in refusal(run(tools, FRESH="1", **converted(tmp_path)))
    assert checkpoint.exists()


@pytest.mark.parametrize("nodes", ["1", "8"])
def test_a_requeued_job_deletes_nothing(
    nodes: str, checkpoint: Path, tools: Path, tmp_path: Path
) -> None:
    job = SLURM | {"SLURM_JOB_NUM_NODES": nodes, "SLURM_RESTART_COUNT": "2"}
    result = run(tools, FRESH="1", **job, **converted(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "nothing is deleted, because Slurm has started this job again" in result.stderr
    assert checkpoint.exists()
