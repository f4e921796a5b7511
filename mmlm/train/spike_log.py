"""Loss spikes of a run and the samples that were trained on: ``loss_spikes.jsonl``."""

import json
import math
from collections import deque
from pathlib import Path

from mmlm.data.step_plan import StepPlan
from mmlm.log import get_logger
from mmlm.train.line_file import LineFile, drop_lines_from, iteration_of
from mmlm.train.loss_spikes import find_spike
from mmlm.train.metrics import METRICS_FILE

SPIKES_FILE = "loss_spikes.jsonl"


class SpikeLog:
    """Looks at each loss; where it is a spike, says so and appends a line to the file.

    For rank 0 alone: the loss and the plan are the same on every rank. A run that resumes takes the
    last losses from ``metrics.jsonl``, so it judges as one without an interruption, and drops the
    spikes of iterations that it will do again.

    Args:
        output_dir: of the run; its ``metrics.jsonl`` ends before `start_iteration`.
        start_iteration: iterations already done.
        factor: ``train.loss_spike_factor``.
        window: ``train.loss_spike_window``.
    """

    def __init__(
        self, output_dir: Path, *, start_iteration: int, factor: float, window: int
    ) -> None:
        self._factor = factor
        self._file = LineFile(output_dir / SPIKES_FILE)
        drop_lines_from(self._file.path, start_iteration)
        self._losses: deque[float] = deque(
            _losses_before(output_dir / METRICS_FILE, start_iteration), maxlen=window
        )

    def look(self, plan: StepPlan, loss: float) -> bool:
        """Judge the loss of an iteration.

        Args:
            plan: what it contained.
            loss: what came out.

        Returns:
            Whether it is a spike.
        """
        usual = find_spike(self._losses, loss, self._factor)
        self._losses.append(loss)
        if usual is None:
            return False
        line = {
            "iteration": plan.iteration,
            "loss": loss,
            "usual_median": usual.median,
            "usual_spread": usual.spread,
            "limit": usual.limit(self._factor),
            "num_losses": usual.num_losses,
            # [data-parallel rank][row] = samples
            "sample_ids": [
                [list(row) for rows in rank for row in rows] for rank in plan.microbatches
            ],
        }
        is_written = self._file.append(line)
        where = f"in {self._file.path}" if is_written else f"written nowhere: {line['sample_ids']}"
        get_logger().warning(
            f"loss spike: iteration {plan.iteration} has loss {loss:.4f}, and the median of the "
            f"last {usual.num_losses} is {usual.median:.4f} (limit {line['limit']:.4f}); its "
            f"{plan.num_samples} samples are {where}"
        )
        return True


def _losses_before(metrics: Path, start_iteration: int) -> list[float]:
    if not metrics.exists():
        return []
    lines = metrics.read_text(encoding="utf-8").splitlines()
    kept = [json.loads(line) for line in lines if iteration_of(line) < start_iteration]
    # null stands for a loss that is not finite, which takes a place in the window as well
    return [math.nan if line["loss"] is None else line["loss"] for line in kept]
