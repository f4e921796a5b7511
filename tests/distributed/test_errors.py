"""Bad input ends every process soon, with one message that names the place, and status 1.

Most cases fork two ranks that run the command itself; one starts real processes with torchrun, as a
user does, and lets a picture vanish under one rank while the other waits for it.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmlm.checkpoint.integrity import INTEGRITY_FILE
from mmlm.cli import main
from mmlm.conversion.convert import hf_to_megatron
from tests.distributed.launch import RankFailure, run_ranks
from tests.tiny_data import make_playground, make_tokenizer
from tests.tiny_weights import tiny_llm_config, tiny_vision_config, write_parts

LIMIT_SECONDS = 30.0

RECIPE = """
from mmlm.config.schema import *

def run():
    return RunConfig(
        output_dir={output!r},
        data=DataConfig(meta={meta!r}, seq_length=128, num_workers=0),
        train=TrainConfig(global_batch_size=8, dtype="fp32", train_iters=4),
        checkpoint=CheckpointConfig(load={load!r}),
    )
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted checkpoint of the tiny model."""
    folder = tmp_path_factory.mktemp("start")
    make_tokenizer(folder / "llm")
    write_parts(folder, tiny_vision_config(), tiny_llm_config(448))
    hf_to_megatron(vision=folder / "vision", llm=folder / "llm", output=folder / "checkpoint")
    return folder / "checkpoint"


@pytest.fixture
def recipe(start: Path, tmp_path: Path) -> str:
    """A recipe on a small playground of its own."""
    meta = make_playground(tmp_path / "playground", 16)
    file = tmp_path / "recipe.py"
    text = RECIPE.format(output=str(tmp_path / "out"), meta=str(meta), load=str(start))
    file.write_text(text)
    return f"{file}:run"


def command_rank(arguments: list[str], folder: Path) -> int:
    """Run ``mmlm`` with its messages in a file of this rank."""
    file = os.open(folder / f"stderr_{os.environ['RANK']}", os.O_CREAT | os.O_WRONLY)
    os.dup2(file, 2)
    sys.stderr = os.fdopen(2, "w")  # pytest has put its own there
    return main(arguments)


def failing_command(arguments: list[str], folder: Path, *, ranks: int = 2) -> str:
    """Run a command that must fail on every rank; return what all ranks wrote."""
    began = time.monotonic()
    try:
        statuses = run_ranks(ranks, command_rank, arguments, folder, timeout_seconds=LIMIT_SECONDS)
    except RankFailure as failure:  # they left without returning, as they do inside a world
        statuses = ["hung"] if "killed" in str(failure) else [1] * ranks
    assert statuses == [1] * ranks
    assert time.monotonic() - began < LIMIT_SECONDS
    written = "".join(file.read_text() for file in sorted(folder.glob("stderr_*")) if file.exists())
    assert "Traceback" not in written
    errors = [line for line in written.splitlines() if "error: " in line]
    # one that says what is wrong; where a single rank failed, the watch tells the others of it
    assert sum("all ranks end" not in line for line in errors) == 1, written
    assert all("ended with an error" in line for line in errors if "all ranks end" in line), written
    return written


def break_json(folder: Path) -> None:
    file = folder / "playground" / "opensource" / "pictured.jsonl"
    lines = file.read_text().splitlines()
    lines[4] = lines[4][:-9]
    file.write_text("\n".join(lines) + "\n")


def break_picture(folder: Path) -> None:
    first_picture(folder).write_bytes(b"not a picture")


def remove_picture(folder: Path) -> None:
    first_picture(folder).unlink()


def extra_picture(folder: Path) -> None:
    file = folder / "playground" / "opensource" / "pictured.jsonl"
    entries = [json.loads(line) for line in file.read_text().splitlines()]
    entry = next(entry for entry in entries if isinstance(entry["image"], str))
    entry["image"] = [entry["image"]] * 3
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def remove_annotation(folder: Path) -> None:
    (folder / "playground" / "opensource" / "pictured.jsonl").unlink()


def first_picture(folder: Path) -> Path:
    return next(iter(sorted((folder / "playground").rglob("*.png"))))


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("fault", "pattern"),
    [
        (break_json, r"pictured\.jsonl:5.*not valid JSON"),
        (break_picture, r"pictured\.jsonl:\d+.*\.png"),
        (remove_picture, r"pictured\.jsonl:\d+.*\.png"),
        (extra_picture, r"pictured\.jsonl:\d+.*<image>"),
        (remove_annotation, r"pictured\.jsonl"),
    ],
)
def test_broken_data(
    fault: Callable[[Path], None], pattern: str, recipe: str, tmp_path: Path
) -> None:
    fault(tmp_path)
    written = failing_command(["train", "--recipe", recipe], tmp_path)
    assert re.search(pattern, written, re.DOTALL), written
    assert not (tmp_path / "out" / "checkpoints").exists()


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("overrides", "pattern"),
    [
        (["parallel.tensor_model_parallel_size=3"], "2 processes cannot be divided by"),
        (
            ["parallel.pipeline_model_parallel_size=2", "parallel.pipeline_layout=vv|vpEttL"],
            r"without the cuts it must read vvvpEtttL",
        ),
        (["data.meta=nowhere.json"], r"data\.meta: the file 'nowhere\.json' does not exist"),
        (["checkpoint.load=nowhere"], "nowhere: does not exist"),
        (["data.seq_lenght=9"], "the nearest is 'seq_length'"),
        (["data.tokenizer=nowhere"], "nowhere"),
    ],
)
def test_wrong_settings(overrides: list[str], pattern: str, recipe: str, tmp_path: Path) -> None:
    arguments = ["train", "--recipe", recipe]
    for override in overrides:
        arguments += ["--set", override]
    written = failing_command(arguments, tmp_path)
    assert re.search(pattern, written), written


@pytest.mark.distributed
def test_tp_that_does_not_divide(recipe: str, tmp_path: Path) -> None:
    arguments = ["train", "--recipe", recipe, "--set", "parallel.tensor_model_parallel_size=4"]
    written = failing_command(arguments, tmp_path, ranks=4)
    assert "does not divide language.num_query_groups 2" in written


@pytest.mark.distributed
@pytest.mark.parametrize("change", ["missing", "shape"])
def test_checkpoint_that_does_not_fit(
    change: str, start: Path, recipe: str, tmp_path: Path
) -> None:
    manifest = start / "iter_0000000" / "mmlm.json"
    records = start / "iter_0000000" / INTEGRITY_FILE
    before, sizes = manifest.read_text(), records.read_text()
    records.unlink()  # it would name the manifest that was changed
    content: dict[str, Any] = json.loads(before)
    if change == "missing":
        content["model"]["vision"]["num_layers"] = 4
    else:
        content["model"]["language"]["ffn_hidden_size"] = 80
    manifest.write_text(json.dumps(content))
    try:
        written = failing_command(["train", "--recipe", recipe], tmp_path)
    finally:
        manifest.write_text(before)
        records.write_text(sizes)
    name = {"missing": "vision_model.decoder.layers.3", "shape": "mlp.linear_fc1.weight"}[change]
    assert name in written


@pytest.mark.distributed
def test_picture_that_vanishes_during_the_run_ends_all_processes(
    recipe: str, tmp_path: Path
) -> None:
    """Real processes: the index is built, then a picture goes and one rank alone notices."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "mmlm", "train", "--recipe", recipe]
    settings = ["parallel.pipeline_model_parallel_size=2", "train.train_iters=2000"]
    for setting in settings:
        command += ["--set", setting]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as process:
        metrics = tmp_path / "out" / "metrics.jsonl"
        waited = time.monotonic()
        while not metrics.exists() and time.monotonic() - waited < 120:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        for picture in (tmp_path / "playground").rglob("*.png"):
            picture.unlink()
        began = time.monotonic()
        _, written = process.communicate(timeout=LIMIT_SECONDS)
        assert time.monotonic() - began < LIMIT_SECONDS
    assert process.returncode != 0
    assert re.search(r"error: .*pictured\.jsonl:\d+.*\.png", written), written
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # nobody is left of its process group
