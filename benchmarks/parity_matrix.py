"""Train the tiny model in every layout and compare with plain PyTorch: a table to redo.

    source tools/environment.sh dev
    python -m benchmarks.parity_matrix --output benchmarks/results/parity

Each cell trains 12 AdamW steps in fp32 with forked gloo processes on this machine's CPU and is
compared with an independent single-process implementation (tests/parity/reference_*.py): loss and
every gradient of the first step, every weight and all losses after twelve. The bf16 cells are
compared with the same fp32 truth and may be off by twice what plain PyTorch in bf16 is off. Exit
status 1 if a bar is not met.
"""

import argparse
import json
import platform
import sys
import time
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tests.parity.parallel_run import Layout
from tests.parity.scenario import PREFIXES, Scenario, errors_of, plain_bf16_errors

BARS = {"loss": 1e-6, "gradient": 1e-5, "weight": 1e-5, "losses": 1e-5}
"""Largest relative errors that pass: loss and gradients of the first step; weights after the last
and the losses on the way there, in which rounding has been through AdamW twelve times."""

BF16_FACTOR = 2.0
"""bf16: times the error of plain PyTorch in bf16. The loss of one step is left out: a single number
may be right by accident."""

NUM_ITERATIONS = 12
MAX_PROCESSES = 8

CUTS = {
    1: "auto",
    2: "vv|vpEtttL",  # inside the tower
    3: "vv|vpEt|ttL",
    4: "vv|vp|Et|ttL",
    "2x2": "v|vv|pEtt|tL",  # chunks of vision layers, of decoder layers, and of both
    "3x2": "v|v|vp|Et|t|tL",
    "4x2": "v|v|v|p|E|t|tt|L",
}
"""Pipeline cuts by PP, or PP x VPP."""

ONE_IMAGE = (1, *[0] * 9)
"""One of ten samples has a picture: most microbatches, and one DP rank, have none."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One comparison."""

    layout: Layout
    scenario: Scenario
    changes: tuple[tuple[str, Any], ...] = ()
    """Fields of the TrainConfig, e.g. recompute."""

    @property
    def bars(self) -> dict[str, float]:
        """Largest errors that pass."""
        if self.scenario.dtype == "fp32":
            return BARS
        plain = plain_bf16_errors(self.scenario)
        return {
            name: BF16_FACTOR * getattr(plain, name) for name in ("losses", "gradient", "weight")
        }

    def __str__(self) -> str:
        words = [f"{name.removeprefix('recompute_')}={value}" for name, value in self.changes]
        if self.scenario.drop_path:
            words.append(f"drop path {self.scenario.drop_path}")
        if self.scenario.weight != "token":
            words.append(f"weight {self.scenario.weight}")
        if self.scenario.images == (0,):
            words.append("no images")
        elif self.scenario.images == ONE_IMAGE:
            words.append("one image in all")
        if self.scenario.frozen:
            words.append(f"frozen {self.scenario.frozen}")
        if self.scenario.dtype != "fp32":
            words.append(self.scenario.dtype)
        return ", ".join(words) or "plain"


def cells() -> list[Cell]:
    """Every layout once with the plain arithmetic, and each feature over a spread of layouts."""
    found = []
    for tp, pp, dp, vpp, sp in product((1, 2, 4), (1, 2, 3, 4), (1, 2), (None, 2), (False, True)):
        if tp * pp * dp > MAX_PROCESSES or (vpp and pp == 1) or (sp and tp == 1):
            continue
        cut = CUTS[f"{pp}x{vpp}" if vpp else pp]
        layout = Layout(tp=tp, pp=pp, dp=dp, vpp=vpp, sp=sp, pipeline_layout=cut)
        found.append(Cell(layout=layout, scenario=scenario()))
    spread = (
        Layout(),
        Layout(tp=2, pp=2, sp=True, pipeline_layout=CUTS[2]),
        Layout(pp=2, dp=2, vpp=2, pipeline_layout=CUTS["2x2"]),
        Layout(tp=2, pp=2, dp=2, sp=True, vpp=2, overlap=True, pipeline_layout=CUTS["2x2"]),
    )
    full = (("recompute_vision_model", "full"), ("recompute_language_model", "full"))
    attention = tuple((name, "selective") for name, _ in full)
    for layout in spread:
        unpacked = Layout(**{**asdict(layout), "packed": False})
        found += [
            Cell(layout=unpacked, scenario=scenario()),
            Cell(layout=layout, scenario=scenario(), changes=full),
            Cell(layout=layout, scenario=scenario(), changes=attention),
            Cell(layout=layout, scenario=scenario(drop_path=0.6)),
            Cell(layout=layout, scenario=scenario(drop_path=0.6), changes=full),
            Cell(layout=layout, scenario=scenario(images=(0,))),
            Cell(layout=layout, scenario=scenario(weight="sample")),
            Cell(layout=layout, scenario=scenario(weight="square")),
            Cell(layout=layout, scenario=scenario(weight="micro_batch_mean")),
            Cell(layout=layout, scenario=scenario(images=ONE_IMAGE, drop_path=0.6)),
            Cell(layout=layout, scenario=scenario(dtype="bf16")),
            Cell(layout=layout, scenario=scenario(dtype="bf16", drop_path=0.6), changes=full),
        ]
    for part in PREFIXES:
        found += [Cell(layout=layout, scenario=scenario(frozen=part)) for layout in spread[1:]]
    masked = (("vision_drop_path_mode", "mask"),)
    for layout in (
        Layout(tp=4, sp=True),
        Layout(dp=2, overlap=True),
        Layout(pp=4, dp=2, overlap=True, pipeline_layout=CUTS[4]),
    ):
        found += [
            Cell(layout=layout, scenario=scenario()),
            Cell(layout=layout, scenario=scenario(drop_path=0.6)),
            Cell(layout=layout, scenario=scenario(drop_path=0.6), changes=masked),
            Cell(layout=layout, scenario=scenario(dtype="bf16", drop_path=0.6)),
            Cell(layout=layout, scenario=scenario(dtype="bf16", drop_path=0.6), changes=masked),
        ]
    return list(dict.fromkeys(found))


def scenario(**changes: Any) -> Scenario:
    """Twelve steps of a model whose decoder heads divide by TP 4."""
    return Scenario(language_heads=(8, 4), num_iterations=NUM_ITERATIONS, **changes)


def measure(cell: Cell) -> dict[str, Any]:
    """Train a cell and compare."""
    began = time.perf_counter()
    found = cell.scenario.run(cell.layout, **dict(cell.changes))
    errors = asdict(errors_of(cell.scenario, found))
    bars = cell.bars
    return {
        "layout": str(cell.layout),
        "feature": str(cell),
        "dtype": cell.scenario.dtype,
        "errors": {name: errors[name] for name in BARS},
        "bars": bars,
        "gradient_name": errors["gradient_name"],
        "weight_name": errors["weight_name"],
        "padding_is_zero": found.padding_is_zero,
        "passed": found.padding_is_zero and all(errors[name] <= bars[name] for name in bars),
        "seconds": round(time.perf_counter() - began, 1),
    }


def as_markdown(results: list[dict[str, Any]], machine: str) -> str:
    """The table."""
    passed = sum(result["passed"] for result in results)
    lines = [
        "# Parity with plain PyTorch",
        "",
        f"{passed} of {len(results)} cells pass. {NUM_ITERATIONS} AdamW steps each; relative "
        f"errors against plain single-process PyTorch in fp32. {machine}",
        "",
        *_largest(results),
        "",
        "Made by `python -m benchmarks.parity_matrix`. `s64x1` in a layout: rows of 64 tokens, one "
        "a microbatch; `OV`: gradient reduction and weight gathering overlapped. Loss and gradient "
        "are of the first step, from the same weights.",
        "",
        "| layout | feature | loss | worst gradient | of | weights after 12 steps | losses | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        errors = result["errors"]
        layout = result["layout"].replace("|", "\\|")
        lines.append(
            f"| {layout} | {result['feature']} | {errors['loss']:.1e} | "
            f"{errors['gradient']:.1e} | `{result['gradient_name']}` | {errors['weight']:.1e} | "
            f"{errors['losses']:.1e} | {'ok' if result['passed'] else '**FAILED**'} |"
        )
    return "\n".join(lines) + "\n"


def _largest(results: list[dict[str, Any]]) -> list[str]:
    """Largest errors of the fp32 cells, and of the bf16 cells as shares of plain bf16's."""
    lines = []
    exact = [result for result in results if result["dtype"] == "fp32"]
    if exact:
        found = {name: max(each["errors"][name] for each in exact) for name in BARS}
        lines.append(
            f"fp32, {len(exact)} cells, bars {BARS}. Largest: "
            + ", ".join(f"{name} {value:.1e}" for name, value in found.items())
            + "."
        )
    rounded = [result for result in results if result["dtype"] == "bf16"]
    if rounded:
        ratios = {
            name: max(BF16_FACTOR * each["errors"][name] / each["bars"][name] for each in rounded)
            for name in rounded[0]["bars"]
        }
        lines += [
            "",
            f"bf16, {len(rounded)} cells, bar {BF16_FACTOR:g} times the error of plain PyTorch in "
            "bf16, in one process. Largest: "
            + ", ".join(f"{name} {value:.2f} times" for name, value in ratios.items())
            + ".",
        ]
    return lines


def main() -> int:
    """Run the matrix."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output",
        type=Path,
        help="path without ending: .md and .json are written (default: benchmarks/results/parity; "
        "with --only nothing is written by default)",
    )
    parser.add_argument("--only", default="", help="cells whose layout or feature has this word")
    options = parser.parse_args()
    torch.set_num_threads(1)
    wanted = [c for c in cells() if options.only in f"{c.layout} {c}"]
    if not wanted:
        parser.error(f"--only {options.only}: no layout or feature has this word")
    results = [measure(cell) for cell in tqdm(wanted, unit="cell")]
    machine = f"torch {torch.__version__} on {platform.machine()}."
    output = options.output or (None if options.only else Path("benchmarks/results/parity"))
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.with_suffix(".md").write_text(as_markdown(results, machine), "utf-8")
        output.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    failed = [result for result in results if not result["passed"]]
    for result in failed:
        print(f"FAILED {result['layout']} {result['feature']}: {result['errors']}")
    print(f"{len(results) - len(failed)} of {len(results)} cells pass")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
