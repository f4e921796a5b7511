"""Signals through pretrain.sh, what it makes of a stopped run, and words that a shell would run."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.unit.examples.test_pretrain import ROOT, SCRIPT, converted, eight_gpus, put, run, tools

__all__ = ["tools"]

MARKER = {"iteration": 7, "train_iters": 60, "reason": "SIGUSR1", "time": "2026-01-02T03:04:05"}

# as torchrun and its ranks do: hears the signal, saves, ends with status 1
STOPS = """
trap 'cp "$HOME/marker.json" "$OUT/stopped.json"; echo "the last line" >&2; exit 1' USR1
touch "$OUT/started"
while :; do sleep 0.05; done
"""


@contextmanager
def started(
    tools: Path, output: Path, settings: dict[str, str], words: tuple[str, ...] = ("bash", SCRIPT)
) -> Iterator[subprocess.Popen[str]]:
    """The script at the moment when its training runs."""
    (tools / "marker.json").write_text(json.dumps(MARKER, indent=2), encoding="utf-8")
    environment = {"PATH": f"{tools}{os.pathsep}{os.defpath}", "HOME": str(tools)}
    environment |= {"MMLM_VENV": "none", "OUT": str(output), **settings}
    with subprocess.Popen(
        words,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            deadline = time.monotonic() + 30
            while not (output / "started").exists():
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < deadline
                time.sleep(0.02)
            yield process
        finally:
            with suppress(ProcessLookupError):  # nobody of it is left
                os.killpg(process.pid, signal.SIGKILL)


def whole(tools: Path, settings: dict[str, str], words: tuple[str, ...]) -> tuple[int, str]:
    """A script that ends by itself."""
    environment = {"PATH": f"{tools}{os.pathsep}{os.defpath}", "HOME": str(tools)}
    environment |= {"MMLM_VENV": "none", **settings}
    ended = subprocess.run(
        words,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=60,
    )
    return ended.returncode, ended.stdout


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    written, _ = process.communicate(timeout=30)
    return process.returncode, written


def test_a_stopped_run_is_a_success_that_continues(tools: Path, tmp_path: Path) -> None:
    eight_gpus(tools)
    put(tools, "python", STOPS)
    output = tmp_path / "out"
    with started(tools, output, converted(tmp_path)) as process:
        process.send_signal(signal.SIGUSR1)
        status, written = end(process)
    assert status == 0, written
    assert "stopped after iteration 7 of 60 by SIGUSR1; the same command continues" in written
    assert "failed" not in written and "checkpoints:" not in written
    assert "the last line" in (output / "training_log.txt").read_text(encoding="utf-8")


def test_a_marker_of_before_is_not_taken_for_this_run(tools: Path, tmp_path: Path) -> None:
    eight_gpus(tools)
    put(tools, "python", 'echo "error: no" >&2; exit 1')
    (tmp_path / "out").mkdir()
    (tmp_path / "out/stopped.json").write_text(json.dumps(MARKER, indent=2), encoding="utf-8")
    result = run(tools, **converted(tmp_path))
    assert result.returncode == 1
    assert "mmlm train failed" in result.stderr and "continues" not in result.stderr


def test_a_run_that_dies_of_the_signal_is_no_success(tools: Path, tmp_path: Path) -> None:
    eight_gpus(tools)
    put(tools, "python", STOPS.replace("cp ", ": "))
    output = tmp_path / "out"
    with started(tools, output, converted(tmp_path)) as process:
        process.send_signal(signal.SIGUSR1)
        status, written = end(process)
    assert status == 1
    assert "ended by SIGUSR1 without a new checkpoint" in written


def test_demo_neither_evaluates_nor_finishes_after_a_stop(tools: Path, tmp_path: Path) -> None:
    demo = tmp_path / "demo"
    (demo / "converted").mkdir(parents=True)
    (demo / "converted/latest").touch()
    (demo / "world.json").touch()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/evaluation_before.json").touch()
    put(tools, "python", f'case "$*" in *" train "*) ;; *) exit 0 ;; esac\n{STOPS}')
    settings = {"DEMO": "1", "DEMO_DIR": str(demo), "OUTPUT_DIR": str(tmp_path / "out")}
    settings["CUDA_VISIBLE_DEVICES"] = ""
    with started(tools, tmp_path / "out", settings) as process:
        process.send_signal(signal.SIGUSR1)
        status, written = end(process)
    assert status == 0, written
    assert "stopped after iteration 7 of 60" in written
    assert "exporting" not in written and "evaluating" not in written
    assert not (tmp_path / "out/finished").exists()


@pytest.mark.parametrize(
    ("reason", "requeue", "is_requeued"),
    [
        ("SIGUSR1", "1", True),
        ("exit_duration_minutes", "1", True),
        ("SIGTERM", "1", False),
        ("SIGUSR1", "0", False),
    ],
)
def test_slurm_requeues_what_was_not_cancelled(
    reason: str, requeue: str, is_requeued: bool, tools: Path, tmp_path: Path
) -> None:
    """The batch script gets the signal alone, as --signal=B: has it, and srun hands it on."""
    put(tools, "srun", STOPS)
    put(tools, "scontrol", 'echo "scontrol $*"')
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "8", "SLURM_SUBMIT_DIR": str(ROOT)}
    settings = {**converted(tmp_path), **job, "REQUEUE": requeue}
    batch = ("bash", "examples/internvl_v1_2/slurm/pretrain.sbatch")
    output = tmp_path / "out"
    with started(tools, output, settings, batch) as process:
        (tools / "marker.json").write_text(json.dumps(MARKER | {"reason": reason}, indent=2))
        process.send_signal(signal.SIGUSR1)
        status, written = end(process)
    assert status == 0, written
    assert f"stopped after iteration 7 of 60 by {reason}" in written
    assert ("scontrol requeue 7" in written) == is_requeued


@pytest.mark.parametrize(
    ("before", "after", "is_requeued"),
    [("iter_0000200", "iter_0000400", True), ("iter_0000200", "iter_0000200", False)],
)
def test_slurm_requeues_a_failure_that_came_after_progress(
    before: str, after: str, is_requeued: bool, tools: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    (output / "checkpoints").mkdir(parents=True)
    (output / "checkpoints" / "latest").write_text(f"{before}\n")
    put(tools, "srun", f'echo {after} >"$OUTPUT_DIR/checkpoints/latest"; exit 1')
    put(tools, "scontrol", 'echo "scontrol $*"')
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "8", "SLURM_SUBMIT_DIR": str(ROOT)}
    batch = ("bash", "examples/internvl_v1_2/slurm/pretrain.sbatch")
    status, written = whole(tools, {**converted(tmp_path), **job}, batch)
    assert status == 1, written
    assert ("scontrol requeue 7" in written) == is_requeued
    assert ("not requeued" in written) != is_requeued


def test_restarts_over_several_nodes_are_refused(tools: Path, tmp_path: Path) -> None:
    put(tools, "srun", "exit 0")
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "8", "SLURM_SUBMIT_DIR": str(ROOT)}
    settings = {**converted(tmp_path), **job, "MAX_RESTARTS": "2"}
    batch = ("bash", "examples/internvl_v1_2/slurm/pretrain.sbatch")
    status, written = whole(tools, settings, batch)
    assert status == 1, written
    assert "MAX_RESTARTS=2 works on one machine, this is 8 nodes" in written


@pytest.mark.parametrize("place", ["child=$!", 'is_starting=""'])
def test_a_signal_at_the_very_start_is_handed_on(place: str, tools: Path, tmp_path: Path) -> None:
    """Held up just where the child lives and its number is not yet known, or only just."""
    eight_gpus(tools)
    put(tools, "python", STOPS)
    text = (ROOT / "examples/internvl_v1_2/launch.sh").read_text(encoding="utf-8")
    held_up = text.replace(f"    {place}\n", f"    sleep 1\n    {place}\n")
    assert held_up != text
    copy = tmp_path / "repository"
    for name in ("pretrain.sh", "recipe.py"):
        (copy / SCRIPT).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / SCRIPT.replace("pretrain.sh", name), copy / "examples/internvl_v1_2")
    (copy / "examples/internvl_v1_2/launch.sh").write_text(held_up, encoding="utf-8")
    shutil.copytree(ROOT / "tools", copy / "tools")
    output = tmp_path / "out"
    words = ("bash", str(copy / SCRIPT))
    with started(tools, output, converted(tmp_path), words) as process:
        process.send_signal(signal.SIGUSR1)
        status, written = end(process)
    assert status == 0, written
    assert "stopped after iteration 7 of 60" in written


def test_batch_file_asks_for_the_warning() -> None:
    text = (ROOT / "examples/internvl_v1_2/slurm/pretrain.sbatch").read_text(encoding="utf-8")
    asked = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    for words in ("--requeue", "--open-mode=append", "--signal=B:USR1@300"):
        assert f"#SBATCH {words}" in asked


EVIL = "a b $(touch {0}) `touch {0}` ; touch {0} 'x' \"y\" *"


def test_words_of_the_user_are_never_run(tools: Path, tmp_path: Path) -> None:
    eight_gpus(tools)
    put(tools, "python", r"""printf '<%s>\n' "$@" """)
    wound = tmp_path / "wound"
    settings = converted(tmp_path)
    evil = EVIL.format("wound")
    output = tmp_path / evil
    settings["OUTPUT_DIR"] = str(output)
    result = run(tools, "--set", f"eval_meta={evil}", **settings)
    assert result.returncode == 0, result.stderr
    assert f"<output_dir={output}>" in result.stderr
    assert f"<eval_meta={evil}>" in result.stderr
    assert (output / "training_log.txt").is_file()
    assert not wound.exists() and not (ROOT / "wound").exists()


@pytest.mark.parametrize(
    "name", ["GPUS", "TP", "GPUS_PER_NODE", "BATCH_SIZE", "SLURM_JOB_NUM_NODES", "STOP_SECONDS"]
)
def test_numbers_are_not_evaluated(name: str, tools: Path, tmp_path: Path) -> None:
    eight_gpus(tools)
    wound = tmp_path / "wound"
    settings = {"SLURM_JOB_ID": "7", **converted(tmp_path), name: f"x[$(touch {wound})]"}
    result = run(tools, **settings)
    assert result.returncode == 1
    assert f"{name}='x[" in result.stderr
    assert not wound.exists()


def test_words_for_srun_are_split_and_nothing_else(tools: Path, tmp_path: Path) -> None:
    put(tools, "srun", r"""printf '<%s>\n' "$@" """)
    result = run(tools, PARTITION="llm", SRUN_ARGS="-x * $(touch wound)", **converted(tmp_path))
    assert result.returncode == 0, result.stderr
    for word in ("<-x>", "<*>", "<$(touch>", "<wound)>"):
        assert word in result.stderr
    assert not (ROOT / "wound").exists()


def test_output_dir_of_the_overrides_is_where_the_marker_is(tools: Path, tmp_path: Path) -> None:
    eight_gpus(tools)
    elsewhere = tmp_path / "elsewhere"
    put(tools, "python", f"cp '{tools}/marker.json' '{elsewhere}/stopped.json'")
    (tools / "marker.json").write_text(json.dumps(MARKER, indent=2), encoding="utf-8")
    result = run(tools, "--set", f"output_dir={elsewhere}", **converted(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "stopped after iteration 7 of 60" in result.stderr
