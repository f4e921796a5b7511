"""The report of an iteration that is not finite, on a disk that is full."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from mmlm.train import bad_numbers as module
from mmlm.train.bad_numbers import BadNumbers, DivergenceError
from mmlm.train.nonfinite_count import NonfiniteCount
from mmlm.train.train_step import StepResult
from tests.distributed.launch import run_ranks
from tests.unit.train.test_metrics import plan


def _full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _report_on_a_full_disk(folder: Path) -> tuple[list[str], str]:
    warnings: list[str] = []
    nothing: Any = None
    topology: Any = type("Place", (), {"control_group": None})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "replay", lambda *_: (1.0, []))
        patch.setattr(module.get_logger(), "warning", warnings.append)
        patch.setattr(Path, "write_text", _full)
        bad = BadNumbers(
            model=nothing,
            sizes=nothing,
            dataset=nothing,
            topology=topology,
            output_dir=folder,
            limit=2,
        )
        result = StepResult(loss=float("nan"), grad_norm=1.0, learning_rate=1e-3)
        count = NonfiniteCount(total=1, in_a_row=1)
        bad.handle(plan(0), [], nothing, result, count)
        with pytest.raises(DivergenceError) as caught:
            bad.handle(plan(1), [], nothing, result, NonfiniteCount(total=2, in_a_row=2))
    return warnings, str(caught.value)


@pytest.mark.distributed
def test_a_full_disk_costs_the_report_and_not_the_run(tmp_path: Path) -> None:
    for (warning,), error in run_ranks(2, _report_on_a_full_disk, tmp_path):
        for number, text in enumerate((warning, error)):
            assert f"nonfinite_iteration_000000{number}.json CANNOT BE WRITTEN: No space" in text
            assert "A replay of it found every value finite" in text
        assert "max_nonfinite_iterations is 2" in error
