"""Numbers of each iteration: one JSON line, TensorBoard scalars and the progress bar."""

import math
import resource
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from mmlm.data.dataset import Dataset
from mmlm.data.ledger import count_entries
from mmlm.data.step_plan import StepPlan
from mmlm.parallel.topology import Topology
from mmlm.train.board import Board
from mmlm.train.line_file import LineFile, drop_lines_from
from mmlm.train.nonfinite_count import NonfiniteCount
from mmlm.train.stop import Stopper
from mmlm.train.train_step import StepResult

METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """Writes the metrics of a run; only rank 0 touches files.

    ``metrics.jsonl`` has one line an iteration with full precision; null stands for a number that
    is not finite. A run that resumes drops the lines of iterations that it will do again. What
    cannot be written, on a full disk say, is missing and costs the run nothing else.

    Args:
        output_dir: of the run.
        topology: this rank's place.
        start_iteration: iterations already done.
        train_iters: iterations of the whole run.
        show_progress: draw a progress bar on rank 0.
    """

    def __init__(
        self,
        output_dir: Path,
        topology: Topology,
        *,
        start_iteration: int,
        train_iters: int,
        show_progress: bool = True,
    ) -> None:
        self._topology = topology
        self._start_iteration = start_iteration
        self._clock = time.perf_counter()
        self._stall_seconds = 0.0  # of checkpoints completed since the last line
        self._outputs: _Outputs | None = None
        if topology.rank == 0:
            self._outputs = _Outputs(output_dir, start_iteration, train_iters, show_progress)

    def restart_clock(self) -> None:
        """Leave what happened since the last iteration (evaluation, saving) out of the speed."""
        self._clock = time.perf_counter()

    def log(
        self,
        plan: StepPlan,
        result: StepResult,
        data_seconds: float,
        stopper: Stopper | None = None,
        nonfinite: NonfiniteCount | None = None,
    ) -> dict[str, Any]:
        """Record an iteration; collective.

        Args:
            plan: what it contained.
            result: what came out.
            data_seconds: how long this rank waited for its batches.
            stopper: learns, by the way, whether any rank was told to stop.
            nonfinite: iterations left out so far, this one included; none by default.

        Returns:
            The line that rank 0 wrote.
        """
        nonfinite = nonfinite or NonfiniteCount()
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        shared = torch.tensor(
            [
                seconds,
                data_seconds,
                peak_memory_bytes(self._topology.device),
                0 if stopper is None else stopper.code,
            ],
            dtype=torch.float64,
            device=self._topology.device,
        )
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        seconds, data_seconds, memory, stop_code = shared.tolist()
        if stopper is not None:
            stopper.learn(int(stop_code))
        line = {
            "iteration": plan.iteration,
            "loss": _or_null(result.loss),
            "grad_norm": _or_null(result.grad_norm),
            "learning_rate": result.learning_rate,
            "consumed_samples": (plan.iteration + 1) * plan.num_samples,
            "epoch": plan.epoch,
            "iteration_seconds": seconds,
            "data_wait_seconds": data_seconds,
            "tokens_per_second": plan.num_tokens / seconds,
            "samples_per_second": plan.num_samples / seconds,
            "num_tokens": plan.num_tokens,
            "num_supervised_tokens": plan.num_supervised_tokens,
            "num_packs": plan.num_rows,
            "num_microbatches": plan.num_microbatches,
            "pack_fill": plan.pack_fill,
            "padding_share": plan.padding_share,
            "images_per_pack": plan.num_images / plan.num_rows,
            "peak_memory_bytes": int(memory),
            "save_stall_seconds": self._stall_seconds,
            "nonfinite_iterations": nonfinite.total,
            "nonfinite_in_a_row": nonfinite.in_a_row,
        }
        self._stall_seconds = 0.0
        if self._outputs is not None:
            self._outputs.write(line)
            self._outputs.bar.set_postfix_str(
                f"loss {result.loss:.4f}, lr {result.learning_rate:.2e}, "
                f"norm {result.grad_norm:.2f}, {plan.num_tokens / seconds:.0f} tokens/s"
            )
            self._outputs.bar.update(1)
        return line

    def note_stall(self, iteration: int, seconds: float) -> None:
        """Record how long the training stood still for the checkpoint of an iteration."""
        self._stall_seconds += seconds
        if self._outputs is not None:
            self._outputs.board.add_scalar("checkpoint/stall_seconds", seconds, iteration - 1)

    def log_evaluation(self, iteration: int, report: dict[str, Any]) -> None:
        """Record a held-out evaluation after ``iteration`` iterations (rank 0 writes)."""
        if self._outputs is not None:
            for name in ("loss", "exact_match"):
                self._outputs.board.add_scalar(f"eval/{name}", report["total"][name], iteration - 1)
            self.say(
                f"evaluation after {iteration} iterations: loss {report['total']['loss']:.4f}, "
                f"exact match {report['total']['exact_match']:.1%}"
            )

    def log_ledger(self, dataset: Dataset) -> None:
        """Record how many records are left out, cut, changed or odd, and why (rank 0 writes)."""
        if self._outputs is None:
            return
        for action, reasons in count_entries(dataset.ledger()).items():
            for reason, count in reasons.items():
                name = f"data_ledger/{action.value}/{reason.value}"
                self._outputs.board.add_scalar(name, count, self._start_iteration)

    def say(self, text: str) -> None:
        """Print a line above the progress bar (rank 0)."""
        if self._outputs is not None:
            self._outputs.bar.write(text)

    def close(self) -> None:
        """End the files and the bar."""
        if self._outputs is not None:
            self._outputs.board.close()
            self._outputs.bar.close()


class _Outputs:
    """The files and the bar of rank 0."""

    def __init__(
        self, output_dir: Path, start_iteration: int, train_iters: int, show_progress: bool
    ) -> None:
        path = output_dir / METRICS_FILE
        drop_lines_from(path, start_iteration)
        self.file = LineFile(path)
        self.board = Board(output_dir / "tensorboard", purge_step=start_iteration)
        self.bar = tqdm(
            total=train_iters,
            initial=start_iteration,
            unit="it",
            desc="train",
            disable=not show_progress,
            dynamic_ncols=True,
        )

    def write(self, line: dict[str, Any]) -> None:
        self.file.append(line)
        for name, value in line.items():
            if name != "iteration" and value is not None:
                self.board.add_scalar(f"train/{name}", value, line["iteration"])


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory that this process has used: of the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def _or_null(value: float) -> float | None:
    """JSON has no nan and no inf."""
    return value if math.isfinite(value) else None
