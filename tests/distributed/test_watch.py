"""Ranks that die, stop or stall under torchrun: the others end soon and one message says which."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from mmlm.conversion.convert import hf_to_megatron
from tests.tiny_data import make_playground, make_tokenizer
from tests.tiny_weights import tiny_llm_config, tiny_vision_config, write_parts

RECIPE = """
from mmlm.config.schema import *

def run():
    return RunConfig(
        output_dir={output!r},
        data=DataConfig(meta={meta!r}, seq_length=128, num_workers=1),
        parallel=ParallelConfig(timeout_minutes={minutes}),
        train=TrainConfig(global_batch_size=8, dtype="fp32", train_iters=5000),
        checkpoint=CheckpointConfig(load={load!r}),
    )
"""

PROGRAM = """
import os, sys, time
from mmlm.data.loader import BatchLoader

rank = int(os.environ.get("RANK", "0"))
if __name__ == "__main__":  # data workers import it as well
    open({folder!r} + f"/pid_{{rank}}", "w").write(str(os.getpid()))

def nap_in_batches(loader, iteration, real=BatchLoader.batches):
    if {fault!r} == "data" and rank == {rank} and iteration >= 3:
        time.sleep(3600)
    if {fault!r} == "error" and rank == {rank} and iteration >= 3:
        raise ValueError("this rank alone is wrong")
    return real(loader, iteration)

BatchLoader.batches = nap_in_batches
from mmlm.train.watch import Watch

def nap_in_forward(watch, step, real=Watch.counting):
    counted = real(watch, step)
    def slow(iterator, chunk):
        if {fault!r} == "forward" and rank == {rank} and watch._beat.iteration >= 3:
            time.sleep(3600)
        return counted(iterator, chunk)
    return slow

Watch.counting = nap_in_forward
if __name__ == "__main__":
    from mmlm.cli import main
    sys.exit(main(sys.argv[1:]))
"""


@dataclass
class Training:
    """A running training of several processes."""

    process: subprocess.Popen[str]
    folder: Path

    def pid(self, rank: int) -> int:
        return int((self.folder / f"pid_{rank}").read_text())

    def wait_for_iteration(self, iteration: int) -> None:
        metrics = self.folder / "out" / "metrics.jsonl"
        for _ in range(1200):
            assert self.process.poll() is None, self.process.communicate()[1]
            if metrics.exists() and len(metrics.read_text().splitlines()) > iteration:
                return
            time.sleep(0.1)
        raise AssertionError("the training does not move")

    def end(self, limit_seconds: float) -> tuple[str, float]:
        """Wait for the end; return what was written and how long it took."""
        began = time.monotonic()
        _, written = self.process.communicate(timeout=limit_seconds)
        took = time.monotonic() - began
        assert self.process.returncode != 0
        for _ in range(50):
            if not self.living():
                return written, took
            time.sleep(0.1)
        raise AssertionError(f"orphans: {self.living()}")

    def living(self) -> list[str]:
        """Command lines of what is left: the session's processes, data workers included."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == self.process.pid and fields[0] != "Z":
                    found.append((entry / "cmdline").read_text().replace("\0", " "))
            except OSError:  # it has just ended
                continue
        return found


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_tokenizer(folder / "llm")
    write_parts(folder, tiny_vision_config(), tiny_llm_config(448))
    hf_to_megatron(vision=folder / "vision", llm=folder / "llm", output=folder / "start")
    make_playground(folder / "playground", 16)
    return folder


@contextmanager
def training(
    world: Path,
    folder: Path,
    *,
    ranks: int = 1,
    fault: str = "",
    rank: int = 1,
    minutes: float = 0.1,
    place: Mapping[str, str] | None = None,
    more: Sequence[str] = (),
) -> Iterator[Training]:
    """Start a training; whatever is left of it is killed at the end."""
    recipe = folder / "recipe.py"
    meta = str(world / "playground" / "meta.json")
    text = RECIPE.format(
        output=str(folder / "out"), meta=meta, load=str(world / "start"), minutes=minutes
    )
    recipe.write_text(text)
    program = folder / "program.py"
    program.write_text(PROGRAM.format(folder=str(folder), fault=fault, rank=rank))
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += [str(program), "train", "--recipe", f"{recipe}:run"]
    if ranks > 1:
        command += ["--set", "parallel.pipeline_model_parallel_size=2"]
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    environment.update(place or {})
    command += more
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as process:
        running = Training(process, folder)
        try:
            yield running
        finally:
            if running.living():
                os.killpg(process.pid, signal.SIGKILL)


def the_message(written: str) -> str:
    """The one line that says why all end."""
    lines = [line for line in written.splitlines() if "; all ranks end" in line]
    assert len(lines) == 1, written
    assert "error: " in lines[0]
    return lines[0]


@pytest.mark.distributed
@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_rank(world: Path, tmp_path: Path, victim: int) -> None:
    with training(world, tmp_path, ranks=2, minutes=10) as run:
        run.wait_for_iteration(3)
        pid = run.pid(victim)
        os.kill(pid, signal.SIGKILL)
        written, took = run.end(40)
    message = the_message(written)
    expected = rf"rank {victim} \(TP 0, PP {victim}, DP 0; \S+, process {pid}\) died in \S+ of "
    assert re.search(expected + r"iteration \d+.* \(there since \d\d:\d\d:\d\d UTC\)", message)
    assert took < 20, "not the timeout of 10 minutes"


@pytest.mark.slow
@pytest.mark.distributed
def test_a_stopped_rank(world: Path, tmp_path: Path) -> None:
    with training(world, tmp_path, ranks=2) as run:
        run.wait_for_iteration(3)
        os.kill(run.pid(1), signal.SIGSTOP)
        written, took = run.end(80)
    message = the_message(written)
    assert re.search(r"rank 1 \(.*\) has given no sign of life for [67] s", message), message
    assert "(its process is stopped)" in message
    # torchrun gives the stopped process 30 s before it kills it
    assert took < 60


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("fault", "rank", "phase"),
    [
        ("data", 1, "data"),
        pytest.param("forward", 0, "forward-backward", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_does_not_move(
    world: Path, tmp_path: Path, fault: str, rank: int, phase: str
) -> None:
    with training(world, tmp_path, ranks=2, fault=fault, rank=rank) as run:
        run.wait_for_iteration(2)
        written, took = run.end(60)
    message = the_message(written)
    assert re.search(rf"rank {rank} \(.*\) has not moved on for [67] s", message), message
    where = {"data": "nap_in_batches", "forward": "slow"}[fault]
    assert re.search(rf"at program.py:\d+ in {where}, in {phase} of iteration 3", message)
    assert "so did" not in message and "parallel.timeout_minutes is 0.1" in message
    assert f"stacks of rank {rank}" in written and f"in {where}" in written.split("stacks of")[1]
    assert written.count("stacks of rank") == 1
    assert took < 30


@pytest.mark.slow
@pytest.mark.distributed
def test_an_error_of_one_rank_is_told_by_the_others(world: Path, tmp_path: Path) -> None:
    with training(world, tmp_path, ranks=2, fault="error", minutes=10) as run:
        run.wait_for_iteration(2)
        written, took = run.end(40)
    message = the_message(written)
    assert "rank 1 (" in message
    assert "ended with an error (ValueError: this rank alone is wrong) in data of iteration 3" in (
        message
    )
    assert "Traceback" in written and took < 25


@pytest.mark.distributed
def test_one_process_without_torchrun(world: Path, tmp_path: Path) -> None:
    with training(world, tmp_path, ranks=1, fault="data", rank=0) as run:
        run.wait_for_iteration(2)
        written, took = run.end(60)
    assert "rank 0 (TP 0, PP 0, DP 0;" in the_message(written)
    assert "stacks of rank 0" in written and took < 20


@pytest.mark.slow
@pytest.mark.distributed
def test_torchrun_that_is_killed_leaves_no_ranks(world: Path, tmp_path: Path) -> None:
    with training(world, tmp_path, ranks=2) as run:
        run.wait_for_iteration(3)
        run.process.kill()  # torchrun itself, and with it the store
        written, _ = run.end(40)
    assert "cannot reach the store at" in written


@pytest.mark.slow
@pytest.mark.distributed
def test_a_rank_that_pauses_and_goes_on_ends_nothing(world: Path, tmp_path: Path) -> None:
    """Shorter than the timeout: the run goes on, and its lines are those of any run."""
    with training(world, tmp_path, ranks=2, minutes=0.2) as run:
        run.wait_for_iteration(3)
        os.kill(run.pid(1), signal.SIGSTOP)
        time.sleep(5)
        os.kill(run.pid(1), signal.SIGCONT)
        lines = len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines())
        run.wait_for_iteration(lines + 20)
        last = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[-2]
        assert json.loads(last)["nonfinite_iterations"] == 0
        assert run.process.poll() is None


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_without_torchrun_the_store_goes_with_rank_0(
    world: Path, tmp_path: Path, number: signal.Signals, free_port: int
) -> None:
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port), "WORLD_SIZE": "2"}
    settings = ["--set", "parallel.pipeline_model_parallel_size=2"]
    with (
        training(world, tmp_path, place={**place, "RANK": "0"}, more=settings) as first,
        training(world, tmp_path, place={**place, "RANK": "1"}, more=settings) as second,
    ):
        first.wait_for_iteration(3)
        os.kill(first.pid(0), number)
        written, took = second.end(60)
    assert "error: rank 1 (" in written and "cannot reach the store at 127.0.0.1:" in written
    state = "gone" if number == signal.SIGKILL else "stopped"
    assert re.search(rf"rank 0 \(.*\) is {state}, last in \S+ of iteration", written), written
    assert took < 40


@pytest.fixture
def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
