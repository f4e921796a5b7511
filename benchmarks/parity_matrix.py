"""Train the tiny model in every layout and compare with plain PyTorch: a table to redo.

    source tools/environment.sh dev
    python -m benchmarks.parity_matrix --output benchmarks/results/parity

Each cell trains 12 AdamW steps in fp32 with forked gloo processes on this machine's CPU and is
compared with an independent single-process implementation (tests/parity/reference_*.py): loss and
every gradient of the first step, every weight and all losses after twelve. Exit status 1 if a bar
is not met.
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
from tests.parity.scenario import (
    Scenario,
    reference_gradients,
    reference_run,
    worst,
    worst_loss,
)

BARS = {"loss": 1e-6, "gradient": 1e-5, "weight": 1e-5, "losses": 1e-5}
"""Largest relative errors that pass: loss and gradients of the first step; weights after the last
and the losses on the way there, in which rounding has been through AdamW twelve times."""

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


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One comparison."""

    layout: Layout
    scenario: Scenario
    changes: tuple[tuple[str, Any], ...] = ()
    """Fields of the TrainConfig, e.g. recompute."""

    def __str__(self) -> str:
        words = [f"{name.removeprefix('recompute_')}={value}" for name, value in self.changes]
        if self.scenario.drop_path:
            words.append(f"drop path {self.scenario.drop_path}")
        if self.scenario.weight != "token":
            words.append(f"weight {self.scenario.weight}")
        if self.scenario.images == (0,):
            words.append("no images")
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
        ]
    return found


def scenario(**changes: Any) -> Scenario:
    """Twelve steps of a model whose decoder heads divide by TP 4."""
    return Scenario(language_heads=(8, 4), num_iterations=NUM_ITERATIONS, **changes)


def measure(cell: Cell) -> dict[str, Any]:
    """Train a cell and compare."""
    began = time.perf_counter()
    found = cell.scenario.run(cell.layout, **dict(cell.changes))
    truth = reference_run(cell.scenario)
    gradient, gradient_name = worst(found.gradients, reference_gradients(cell.scenario))
    weight, weight_name = worst(found.weights, truth.weights)
    first = abs(found.losses[0] - truth.losses[0]) / truth.losses[0]
    errors = {
        "loss": first,
        "gradient": gradient,
        "weight": weight,
        "losses": worst_loss(found, truth),
    }
    return {
        "layout": str(cell.layout),
        "feature": str(cell),
        "errors": errors,
        "gradient_name": gradient_name,
        "weight_name": weight_name,
        "padding_is_zero": found.padding_is_zero,
        "passed": found.padding_is_zero and all(errors[name] <= BARS[name] for name in BARS),
        "seconds": round(time.perf_counter() - began, 1),
    }


def as_markdown(results: list[dict[str, Any]], machine: str) -> str:
    """The table."""
    passed = sum(result["passed"] for result in results)
    largest = {name: max(result["errors"][name] for result in results) for name in BARS}
    lines = [
        "# Parity with plain PyTorch",
        "",
        f"{passed} of {len(results)} cells pass. {NUM_ITERATIONS} AdamW steps in fp32; relative "
        f"errors; bars {BARS}. Largest: "
        + ", ".join(f"{name} {value:.1e}" for name, value in largest.items())
        + f". {machine}",
        "",
        "Made by `python -m benchmarks.parity_matrix`. `s64x1` in a layout: rows of 64 tokens, one "
        "a microbatch. Loss and gradient are of the first step, from the same weights.",
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


def main() -> int:
    """Run the matrix."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("benchmarks/results/parity"),
        help="path without ending: .md and .json are written (default: %(default)s)",
    )
    parser.add_argument("--only", default="", help="cells whose layout or feature has this word")
    options = parser.parse_args()
    torch.set_num_threads(1)
    wanted = [c for c in cells() if options.only in f"{c.layout} {c}"]
    results = [measure(cell) for cell in tqdm(wanted, unit="cell")]
    machine = f"torch {torch.__version__} on {platform.machine()}."
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.with_suffix(".md").write_text(as_markdown(results, machine), "utf-8")
    options.output.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    failed = [result for result in results if not result["passed"]]
    for result in failed:
        print(f"FAILED {result['layout']} {result['feature']}: {result['errors']}")
    print(f"{len(results) - len(failed)} of {len(results)} cells pass")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
