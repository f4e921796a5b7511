"""A tiny run under real torchrun, for tests that send it signals."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from mmlm.conversion.convert import hf_to_megatron
from tests.tiny_data import make_playground, make_tokenizer
from tests.tiny_weights import tiny_llm_config, tiny_vision_config, write_parts

LIMIT_SECONDS = 120
TORCHRUN = ("--standalone", "--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")

RECIPE = """
from mmlm.config.schema import *

def run():
    return RunConfig(
        output_dir={output!r},
        parallel=ParallelConfig(pipeline_model_parallel_size=2),
        data=DataConfig(meta={meta!r}, seq_length=128, num_workers=1),
        eval_meta={meta!r},
        train=TrainConfig(global_batch_size=8, dtype="fp32", train_iters=60),
        optimizer=OptimizerConfig(lr=1e-3),
        checkpoint=CheckpointConfig(load={load!r}, save_interval=0),
    )
"""


def make_recipe(folder: Path) -> str:
    """PP 2, two processes, 60 iterations on a small playground; writes to ``folder/out``."""
    make_tokenizer(folder / "llm")
    write_parts(folder, tiny_vision_config(), tiny_llm_config(448))
    load = folder / "start"
    hf_to_megatron(vision=folder / "vision", llm=folder / "llm", output=load)
    meta = make_playground(folder / "playground", 16)
    file = folder / "recipe.py"
    file.write_text(RECIPE.format(output=str(folder / "out"), meta=str(meta), load=str(load)))
    return f"{file}:run"


@contextmanager
def torchrun(
    recipe: str, output: Path, *settings: str, words: Sequence[str] = ()
) -> Iterator[subprocess.Popen[str]]:
    """Start two ranks; whatever is left of them at the end of the block is killed."""
    command = [sys.executable, "-m", "torch.distributed.run", *TORCHRUN, "--nproc-per-node", "2"]
    command += [*words, "-m", "mmlm", "train", "--recipe", recipe]
    for setting in (f"output_dir={output}", *settings):
        command += ["--set", setting]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    output.mkdir(parents=True, exist_ok=True)
    with (output.parent / f"{output.name}.log").open("a", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, text=True, env=environment)
        try:
            yield process
        finally:
            left = [process.pid, *(each.pid for each in psutil.Process().children(recursive=True))]
            for pid in left:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            process.wait()


def said(output: Path) -> str:
    """What the run has printed."""
    return (output.parent / f"{output.name}.log").read_text(encoding="utf-8")


def ranks(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The ranks that torchrun has started, in their order."""
    found = []
    for child in psutil.Process(process.pid).children():
        if "mmlm" in child.cmdline():
            found.append((int(child.environ()["RANK"]), child))
    return [child for _, child in sorted(found, key=lambda pair: pair[0])]


def wait_for(process: subprocess.Popen[str], happens: Any, what: str) -> None:
    """Wait until ``happens()`` is true while the process lives."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while not happens():
        assert process.poll() is None, f"it ended before {what}"
        assert time.monotonic() < deadline, f"no {what} in {LIMIT_SECONDS} s"
        time.sleep(0.02)


def wait_for_iterations(process: subprocess.Popen[str], output: Path, count: int) -> None:
    """Wait until that many iterations are in the log."""
    wait_for(process, lambda: len(curve(output)) >= count, f"iteration {count}")


def curve(output: Path) -> list[dict[str, Any]]:
    """The complete lines of ``metrics.jsonl``."""
    file = output / "metrics.jsonl"
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


def marker(output: Path) -> dict[str, Any]:
    """What the run says about its stop."""
    content: dict[str, Any] = json.loads((output / "stopped.json").read_text(encoding="utf-8"))
    return content


def assert_no_orphans() -> None:
    """No process that this test has started is left."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        left = [each for each in psutil.process_iter(["cmdline", "ppid"]) if _is_ours(each)]
        if not left:
            return
        time.sleep(0.1)
    raise AssertionError(f"left: {[each.info['cmdline'] for each in left]}")


def _is_ours(process: psutil.Process) -> bool:
    words = " ".join(process.info["cmdline"] or ())
    return process.info["ppid"] == 1 and "mmlm" in words and str(os.getpid()) in words
