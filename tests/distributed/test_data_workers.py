"""A data worker that dies, or finds a picture gone, ends the run; the last checkpoint is usable."""

import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from mmlm.conversion.convert import hf_to_megatron
from tests.distributed.launch import run_ranks
from tests.distributed.test_errors import command_rank, failing_command
from tests.tiny_data import make_playground, make_tokenizer
from tests.tiny_weights import tiny_llm_config, tiny_vision_config, write_parts

RECIPE = """
from mmlm.config.schema import *

def run():
    return RunConfig(
        output_dir={output!r},
        parallel=ParallelConfig(pipeline_model_parallel_size=2),
        data=DataConfig(meta={meta!r}, seq_length=128, num_workers=1),
        train=TrainConfig(global_batch_size=8, dtype="fp32", train_iters=4000),
        checkpoint=CheckpointConfig(load={load!r}, save_interval=2),
    )
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    """PP 2 on a small playground: the first rank alone decodes, with one worker."""
    make_tokenizer(tmp_path / "llm")
    write_parts(tmp_path, tiny_vision_config(), tiny_llm_config(448))
    load = tmp_path / "start"
    hf_to_megatron(vision=tmp_path / "vision", llm=tmp_path / "llm", output=load)
    meta = make_playground(tmp_path / "playground", 16)
    file = tmp_path / "recipe.py"
    text = RECIPE.format(output=str(tmp_path / "out"), meta=str(meta), load=str(load))
    file.write_text(text)
    return f"{file}:run"


def workers() -> list[psutil.Process]:
    """Data workers of the ranks that this process forked."""
    family = psutil.Process().children(recursive=True)
    return [process for process in family if "spawn_main" in " ".join(process.cmdline())]


def kill_workers(folder: Path) -> None:
    for worker in workers():
        os.kill(worker.pid, signal.SIGKILL)


def remove_pictures(folder: Path) -> None:
    for picture in (folder / "playground").rglob("*.png"):
        picture.rename(picture.with_suffix(".gone"))


def strike(fault: Callable[[Path], None], folder: Path) -> None:
    """Wait for the first checkpoint, then do what is to go wrong."""
    deadline = time.monotonic() + 60
    while not (folder / "out" / "checkpoints" / "latest").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    fault(folder)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("fault", "pattern"),
    [
        (
            kill_workers,
            r"error: .*pictured\.jsonl:\d+ .*data worker 0 ended \(killed by SIGKILL\)",
        ),
        (remove_pictures, r"error: .*pictured\.jsonl:\d+ .*\.png: the image does not exist"),
    ],
)
def test_the_run_ends_and_resumes(
    fault: Callable[[Path], None], pattern: str, recipe: str, tmp_path: Path
) -> None:
    striker = threading.Thread(target=strike, args=(fault, tmp_path))
    striker.start()
    written = failing_command(["train", "--recipe", recipe], tmp_path)
    striker.join()
    assert re.search(pattern, written), written
    assert workers() == []
    for picture in (tmp_path / "playground").rglob("*.gone"):
        picture.rename(picture.with_suffix(".png"))
    saved = int((tmp_path / "out" / "checkpoints" / "latest").read_text().removeprefix("iter_"))
    more = ["train", "--recipe", recipe, "--set", "train.exit_duration_minutes=0.1"]
    assert run_ranks(2, command_rank, more, tmp_path) == [0, 0]
    assert int((tmp_path / "out" / "checkpoints" / "latest").read_text()[5:]) > saved
