"""What is done with an iteration whose loss or gradient norm is not finite.

It has changed nothing. The first of a row is replayed to find where it began, so that the user
learns of it early, and so is the one that ends the run.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.distributed import DistributedDataParallel

from mmlm.config.model import ModelConfig
from mmlm.data.collate import Batch
from mmlm.data.dataset import Dataset
from mmlm.data.step_plan import StepPlan
from mmlm.errors import DataError, MmlmError
from mmlm.log import get_logger
from mmlm.parallel.agreement import on_rank_zero
from mmlm.parallel.topology import Topology
from mmlm.train.forward_step import ForwardStep
from mmlm.train.nonfinite_count import NonfiniteCount
from mmlm.train.replay import Finding, first_findings, replay
from mmlm.train.train_step import StepResult

_NUM_NAMED = 3
"""Places and samples that a message names; the file has all."""


class DivergenceError(MmlmError):
    """Too many iterations in a row had a loss or gradient norm that is not a finite number."""


@dataclass(frozen=True, kw_only=True)
class BadNumbers:
    """Reports iterations that are not finite and ends the run when there are too many."""

    model: Sequence[DistributedDataParallel]
    sizes: ModelConfig
    dataset: Dataset
    topology: Topology
    output_dir: Path
    limit: int
    """Iterations in a row at which the run ends."""

    def handle(
        self,
        plan: StepPlan,
        batches: Sequence[Batch],
        forward_step: ForwardStep,
        result: StepResult,
        count: NonfiniteCount,
    ) -> None:
        """Replay, write and say what was found; nothing where the iteration is finite. Collective.

        Args:
            plan: of the iteration.
            batches: what this rank had.
            forward_step: as in the iteration.
            result: what came out.
            count: of the iterations that are not finite, with this one.

        Raises:
            DivergenceError: on all ranks, if this is the last that is allowed. Its message names
                the layer, the samples and the file.
        """
        if result.is_finite:
            return
        is_last = count.in_a_row >= self.limit
        headline = (
            f"iteration {plan.iteration} was left out: loss {result.loss}, gradient norm "
            f"{result.grad_norm}, {count.in_a_row} in a row and {count.total} in all"
        )
        if not is_last and count.in_a_row > 1:
            get_logger().warning(headline)
            return
        loss, findings = replay(self.model, forward_step, batches, self.sizes, self.topology)
        file = self.output_dir / f"nonfinite_iteration_{plan.iteration:07d}.json"

        def write() -> str:
            report = self._report(plan, result, count, loss, findings)
            text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
            try:
                file.write_text(text, "utf-8")
            except OSError as error:  # a full disk is no reason to end here, nor to hide why
                return f"{describe(report)}. {file} CANNOT BE WRITTEN: {error.strerror or error}"
            return f"{describe(report)}. All is in {file}"

        found = on_rank_zero(write, self.topology.control_group)
        if is_last:
            raise DivergenceError(
                f"{headline}; train.max_nonfinite_iterations is {self.limit}. {found}. "
                "Nothing was saved after this iteration: mend or take out these samples, "
                "or resume from an earlier checkpoint with a lower learning rate"
            )
        get_logger().warning(f"{headline}. {found}")

    def _report(
        self,
        plan: StepPlan,
        result: StepResult,
        count: NonfiniteCount,
        replayed_loss: float,
        findings: Sequence[Finding],
    ) -> dict[str, Any]:
        firsts = first_findings(findings)
        samples = sorted({sample_id for _, ids in firsts for sample_id in ids})
        return {
            "iteration": plan.iteration,
            "loss": _number(result.loss),
            "grad_norm": _number(result.grad_norm),
            "replayed_loss": _number(replayed_loss),
            "nonfinite_in_a_row": count.in_a_row,
            "nonfinite_iterations": count.total,
            "first": [
                {
                    **_place(first[0]),
                    "ranks": [_rank(finding) for finding in first],
                    "sample_ids": list(ids),
                }
                for first, ids in firsts
            ],
            "ranks": first_of_ranks(findings),
            "samples": [self._sample(sample_id) for sample_id in samples],
            "batch": [[list(row) for rows in rank for row in rows] for rank in plan.microbatches],
        }

    def _sample(self, sample_id: int) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "sample_id": sample_id,
            "set": self.dataset.annotation_set(sample_id).name,
        }
        try:
            record = self.dataset.record(sample_id)
        except DataError as error:  # the file was edited: the id still tells which it was
            return entry | {"error": str(error)}
        return entry | {
            "file": str(record.file),
            "line": record.line,
            "id": record.identity,
            "images": list(record.images),
        }


def first_of_ranks(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """For each rank that saw something, what it saw first."""
    by_rank: dict[int, list[Finding]] = {}
    for finding in findings:
        by_rank.setdefault(finding.rank, []).append(finding)
    firsts = (min(of_rank, key=lambda f: f.causal_key) for of_rank in by_rank.values())
    return [
        {**_rank(first), **_place(first), "sample_ids": list(first.sample_ids or ())}
        for first in sorted(firsts, key=lambda finding: finding.rank)
    ]


def describe(report: dict[str, Any]) -> str:
    """Say in one sentence what a report found."""
    if not report["first"]:
        return (
            "A replay of it found every value finite: either the square of the norm is too great "
            "for fp32, or a device or link computed something else this time"
        )
    lines = []
    for first in report["first"][:_NUM_NAMED]:
        ranks = "; ".join(
            f"rank {each['rank']}: TP {each['tp_rank']}, PP {each['pp_rank']}, DP {each['dp_rank']}"
            for each in first["ranks"][:_NUM_NAMED]
        )
        text = f"the {first['kind']} of {first['layer']} (chunk {first['chunk']}; {ranks})"
        if first["sample_ids"]:
            text += f" in samples {_some(first['sample_ids'])}"
        lines.append(text)
    places = [
        f"{each['sample_id']} is {each['file']}:{each['line']} of set '{each['set']}'"
        for each in report["samples"][:_NUM_NAMED]
        if "file" in each
    ]
    more = len(report["first"]) - len(lines)
    text = "Not finite first: " + ", and ".join(lines)
    if more:
        text += f", and in {more} other microbatches"
    return text + (f"; sample {', '.join(places)}" if places else "")


def _some(ids: Sequence[int]) -> str:
    shown = ", ".join(str(sample_id) for sample_id in ids[:_NUM_NAMED])
    return shown + (f" and {len(ids) - _NUM_NAMED} more" if len(ids) > _NUM_NAMED else "")


def _place(finding: Finding) -> dict[str, Any]:
    return {
        "kind": finding.kind,
        "layer": finding.layer,
        "chunk": finding.chunk,
        "microbatch": finding.microbatch,
    }


def _rank(finding: Finding) -> dict[str, Any]:
    return {
        "rank": finding.rank,
        "tp_rank": finding.tp_rank,
        "pp_rank": finding.pp_rank,
        "dp_rank": finding.dp_rank,
    }


def _number(value: float) -> float | str:
    """JSON has no nan and no inf."""
    return value if math.isfinite(value) else str(value)
