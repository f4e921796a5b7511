"""How full and level batches are, packed and not, and what planning costs: a table to redo.

    source tools/environment.sh dev
    python -m benchmarks.packing --output benchmarks/results/packing

Samples have lengths like those of the published sets (benchmarks/published_lengths.py), costs are
those of InternViT-6B with Yi-34B. Every number is over the iterations of one layout; exit status 1
if a bar is not met. Planning times are of this process alone, on this machine.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from tqdm import tqdm

from benchmarks.published_lengths import published_table
from mmlm.config.schema import Packing
from mmlm.data.packing import PackingCost
from mmlm.data.step_plan import SampleTable, StepPlan, step_plan

DATA_PARALLEL_SIZES = (1, 2, 4, 8, 16)
GLOBAL_BATCH_SIZES = (512, 128)
SEQ_LENGTHS = (2048, 4096)
NUM_ITERATIONS = 200
UNPACKED_ROWS = 8
"""Samples of a padded micro-batch: PER_DEVICE_BATCH_SIZE of the published script."""

BARS = {(2048, 512, 4): 0.93, (2048, 512, 8): 0.90}
"""Least mean fill by seq_length, global batch and DP. There too: at most 1.05 times the mean tokens
and 1.10 times the mean images on any DP rank of any iteration, and 20 ms to plan one."""


def _totals(
    plan: StepPlan, table: SampleTable, cost: PackingCost
) -> tuple[list[int], list[int], list[list[float]]]:
    """Tokens and images of each DP rank, and the cost of each of its microbatches."""
    tokens, images, costs = [], [], []
    for microbatches in plan.microbatches:
        ids = [[sample for row in rows for sample in row] for rows in microbatches]
        flat = [sample for group in ids for sample in group]
        tokens.append(int(table.num_tokens[flat].sum()))
        images.append(int(table.num_images[flat].sum()))
        costs.append(
            [
                sum(cost.of(int(table.num_tokens[i]), int(table.num_images[i])) for i in group)
                for group in ids
            ]
        )
    return tokens, images, costs


def _over_mean(values: Sequence[float]) -> float:
    return max(values) / fmean(values)


def measure_packed(
    table: SampleTable, seq_length: int, global_batch_size: int, ranks: int, num_iterations: int
) -> dict[str, Any]:
    """Statistics of the packed plans of one layout.

    Args:
        table: sizes of the samples, cut at ``seq_length``.
        seq_length: tokens of a row.
        global_batch_size: samples of an iteration.
        ranks: data-parallel size.
        num_iterations: how many are planned.
    """
    cost = PackingCost()
    fills, seconds = [], []
    of_tokens, of_images, of_costs, of_microbatches = [], [], [], []
    for iteration in range(-1, num_iterations):  # the first draws the epoch's order, uncounted
        began = time.process_time()
        plan = step_plan(
            table,
            seed=1,
            iteration=max(iteration, 0),
            global_batch_size=global_batch_size,
            seq_length=seq_length,
            micro_batch_size=1,
            data_parallel_size=ranks,
            cost=cost,
        )
        if iteration < 0:
            continue
        seconds.append(time.process_time() - began)
        tokens, images, costs = _totals(plan, table, cost)
        fills.append(plan.pack_fill)
        of_tokens.append(_over_mean(tokens))
        of_images.append(_over_mean(images))
        of_costs.append(_over_mean([sum(rank) for rank in costs]))
        of_microbatches.append(_over_mean([one for rank in costs for one in rank]))
    return {
        "seq_length": seq_length,
        "global_batch_size": global_batch_size,
        "data_parallel_size": ranks,
        "fill_mean": fmean(fills),
        "fill_least": min(fills),
        "tokens_over_mean_worst": max(of_tokens),
        "images_over_mean_worst": max(of_images),
        "cost_over_mean_worst": max(of_costs),
        "microbatch_over_mean": fmean(of_microbatches),
        "plan_ms_median": 1e3 * median(seconds),
        "plan_ms_mean": 1e3 * fmean(seconds),
        "plan_ms_worst": 1e3 * max(seconds),
    }


def measure_unpacked(
    table: SampleTable, packing: Packing, seq_length: int, ranks: int, num_iterations: int
) -> dict[str, Any]:
    """Padding of one way to batch 512 samples, and how many times its tokens are computed."""
    plans = [
        step_plan(
            table,
            seed=1,
            iteration=iteration,
            global_batch_size=512,
            seq_length=seq_length,
            micro_batch_size=1 if packing == "pack" else UNPACKED_ROWS,
            data_parallel_size=ranks,
            packing=packing,
            loss_group_size=UNPACKED_ROWS,
        )
        for iteration in tqdm(range(num_iterations), desc=packing, unit="it", leave=False)
    ]
    computed = [plan.num_computed_tokens for plan in plans]
    return {
        "packing": packing,
        "seq_length": seq_length,
        "padding_share": 1 - sum(plan.num_tokens for plan in plans) / sum(computed),
        "most_over_mean_iteration": _over_mean(computed),
    }


def failures(cells: Sequence[dict[str, Any]]) -> list[str]:
    """Bars that are not met, one line each."""
    found = []
    for cell in cells:
        key = (cell["seq_length"], cell["global_batch_size"], cell["data_parallel_size"])
        if key not in BARS:
            continue
        for name, value, holds in (
            ("fill", cell["fill_mean"], cell["fill_mean"] >= BARS[key]),
            ("tokens", cell["tokens_over_mean_worst"], cell["tokens_over_mean_worst"] <= 1.05),
            ("images", cell["images_over_mean_worst"], cell["images_over_mean_worst"] <= 1.10),
            ("planning ms", cell["plan_ms_mean"], cell["plan_ms_mean"] <= 20.0),
        ):
            if not holds:
                found.append(f"seq_length, samples, DP {key}: {name} {value:.4g}")
    return found


def as_markdown(report: dict[str, Any]) -> str:
    """The report as tables."""
    lines = [
        "# Packing",
        "",
        f"`python -m benchmarks.packing` on {report['machine']}; {report['iterations']} iterations "
        "a row. Lengths like the published sets' (`benchmarks/published_lengths.py`); cost is "
        "FLOPs of InternViT-6B with Yi-34B. *Worst* is the worst iteration; *x mean* is the "
        "dearest over the mean. Planning is processor time, one process.",
        "",
        "## Packed",
        "",
        "| seq_length | samples | DP | fill, mean | fill, least | tokens a rank, worst | images a "
        "rank, worst | cost a rank, worst | microbatch, x mean | plan ms, median | mean | worst |",
        "|--:" * 12 + "|",
    ]
    for cell in report["packed"]:
        lines.append(
            f"| {cell['seq_length']} | {cell['global_batch_size']} | {cell['data_parallel_size']} "
            f"| {cell['fill_mean']:.1%} | {cell['fill_least']:.1%} "
            f"| {cell['tokens_over_mean_worst']:.3f} | {cell['images_over_mean_worst']:.3f} "
            f"| {cell['cost_over_mean_worst']:.3f} | {cell['microbatch_over_mean']:.3f} "
            f"| {cell['plan_ms_median']:.1f} | {cell['plan_ms_mean']:.1f} "
            f"| {cell['plan_ms_worst']:.1f} |"
        )
    lines += [
        "",
        "The number of rows is a multiple of DP, so fill falls where rows are few for their DP.",
        "",
        "## Packed and not",
        f"512 samples, DP 8; padded micro-batches of {UNPACKED_ROWS}. Every sample is "
        "computed in all; padding is computed besides.",
        "",
        "| data.packing | seq_length | padding | computed for a token "
        "| dearest iteration, x mean |",
        "|---|--:|--:|--:|--:|",
    ]
    for cell in report["unpacked"]:
        padding = cell["padding_share"]
        lines.append(
            f"| {cell['packing']} | {cell['seq_length']} | {padding:.1%} | {1 / (1 - padding):.2f} "
            f"| {cell['most_over_mean_iteration']:.2f} |"
        )
    broken = report["failures"]
    lines += ["", "Every bar is met." if not broken else "Not met: " + "; ".join(broken) + "."]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write ``OUTPUT.md`` and ``OUTPUT.json``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", default="benchmarks/results/packing")
    parser.add_argument("--iterations", type=int, default=NUM_ITERATIONS)
    options = parser.parse_args(arguments)
    tables = {length: published_table(seq_length=length) for length in SEQ_LENGTHS}
    layouts = [
        (length, samples, ranks)
        for length in SEQ_LENGTHS
        for samples in GLOBAL_BATCH_SIZES
        for ranks in DATA_PARALLEL_SIZES
    ]
    packed = [
        measure_packed(tables[length], length, samples, ranks, options.iterations)
        for length, samples, ranks in tqdm(layouts, desc="packed", unit="layout")
    ]
    ways: tuple[Packing, ...] = ("pack", "none", "group_by_length", "published")
    unpacked = [
        measure_unpacked(tables[length], way, length, 8, options.iterations)
        for length in SEQ_LENGTHS
        for way in ways
    ]
    report = {
        "machine": f"{platform.processor() or platform.machine()}, Python "
        f"{platform.python_version()}",
        "iterations": options.iterations,
        "packed": packed,
        "unpacked": unpacked,
        "failures": failures(packed),
    }
    output = Path(options.output)
    output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    output.with_suffix(".md").write_text(as_markdown(report), encoding="utf-8")
    print(as_markdown(report))
    return 1 if report["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
