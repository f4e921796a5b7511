"""The demo's final report: text for the terminal, ``report.md`` and ``loss.png``.

The majority baseline answers every held-out question with the answer that training samples of the
same set give most often to exactly the same question text (ties: the first in sorted order); a
question that training never asks counts as wrong. It is what can be known without the pictures.
"""

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.internvl_v1_2.demo.playground import HELD_OUT_META, TRAINING_META

MARK = "<image>\n"


@dataclass(frozen=True, kw_only=True)
class ReportInputs:
    """Where everything is that the report reads or names."""

    world: Path
    """Folder of the demo world."""
    run: Path
    """Output folder; gets ``report.md`` and ``loss.png``."""
    before: Path
    """What ``mmlm evaluate`` wrote before training."""
    after: Path
    """What it wrote after training."""
    checkpoint: Path
    """The last checkpoint."""
    hf: Path
    """The exported HuggingFace folder."""
    wall_seconds: float
    """Seconds since the script began."""


def _conversations(meta: dict[str, Any]) -> Iterator[list[tuple[str, str]]]:
    for line in Path(meta["annotation"]).read_text("utf-8").splitlines():
        turns = [turn["value"].removeprefix(MARK) for turn in json.loads(line)["conversations"]]
        yield list(zip(turns[::2], turns[1::2], strict=True))


def _most_frequent(counts: Counter[str]) -> str:
    return min(counts, key=lambda answer: (-counts[answer], answer))


def majority_baseline(training: dict[str, Any], held_out: dict[str, Any]) -> dict[str, float]:
    """Return the share of right answers of the majority baseline, for each set.

    Args:
        training: meta json of the training samples.
        held_out: meta json of the held-out samples.
    """
    shares = {}
    for name, meta in held_out.items():
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for conversation in _conversations(training[name]) if name in training else ():
            for question, answer in conversation:
                counts[question][answer] += 1
        guesses = {question: _most_frequent(answers) for question, answers in counts.items()}
        right = [
            guesses.get(question) == answer
            for conversation in _conversations(meta)
            for question, answer in conversation
        ]
        shares[name] = sum(right) / len(right)
    return shares


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Return the lines of ``metrics.jsonl`` by iteration; of a repeated one the last."""
    lines = (json.loads(line) for line in file.read_text("utf-8").splitlines() if line)
    by_iteration = {line["iteration"]: line for line in lines}
    return [by_iteration[iteration] for iteration in sorted(by_iteration)]


def draw_loss(
    metrics: list[dict[str, Any]], before: float, after: float, file: Path, window: int = 20
) -> None:
    """Draw the training loss, its running mean and the two held-out losses as a PNG.

    Args:
        metrics: from `read_metrics`, at least one line.
        before: held-out loss before training.
        after: held-out loss after training.
        file: the PNG.
        window: iterations in the running mean.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # null: the loss was not a finite number, and the iteration was left out
    metrics = [line for line in metrics if line["loss"] is not None]
    iterations = [line["iteration"] + 1 for line in metrics]
    losses = [line["loss"] for line in metrics]
    means = [
        sum(losses[max(0, k - window + 1) : k + 1]) / min(window, k + 1) for k in range(len(losses))
    ]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(iterations, losses, color="#9bb8d9", linewidth=0.8, label="training, each iteration")
    axes.plot(iterations, means, color="#1f5a9d", label=f"training, mean of {window}")
    ends = ([0, iterations[-1]], [before, after])
    axes.plot(*ends, "o", color="#d0502a", label="held-out, before and after")
    axes.set(xlabel="iteration", ylabel="loss (mean over supervised tokens)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=110)


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


def _rows(
    before: dict[str, Any], after: dict[str, Any], baseline: dict[str, float]
) -> list[tuple[str, ...]]:
    sizes = {name: scores["num_samples"] for name, scores in after["sets"].items()}
    total = sum(baseline[name] * size for name, size in sizes.items()) / sum(sizes.values())
    names = [(name, before["sets"][name], after["sets"][name], baseline[name]) for name in sizes]
    names.append(("total", before["total"], after["total"], total))
    return [
        (
            name,
            str(new["num_samples"]),
            f"{old['loss']:.3f}",
            f"{new['loss']:.3f}",
            f"{share:.1%}",
            f"{old['exact_match']:.1%}",
            f"{new['exact_match']:.1%}",
        )
        for name, old, new, share in names
    ]


HEAD = ("set", "questions", "loss before", "after", "baseline", "exact before", "after")


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[k]) for row in (HEAD, *rows)) for k in range(len(HEAD))]
    lines = []
    for row in (HEAD, tuple("-" * width for width in widths), *rows):
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def make_report(inputs: ReportInputs) -> str:
    """Write ``report.md`` and ``loss.png`` and return the text of the former.

    Args:
        inputs: where everything is.
    """
    before, after, training, held_out = (
        json.loads(file.read_text("utf-8"))
        for file in (
            inputs.before,
            inputs.after,
            inputs.world / TRAINING_META,
            inputs.world / HELD_OUT_META,
        )
    )
    metrics = read_metrics(inputs.run / "metrics.jsonl")
    plot = inputs.run / "loss.png"
    draw_loss(metrics, before["total"]["loss"], after["total"]["loss"], plot)
    rows = _rows(before, after, majority_baseline(training, held_out))
    seconds = sum(line["iteration_seconds"] for line in metrics)
    speed = sum(line["num_tokens"] for line in metrics) / seconds
    places = {
        "log": inputs.run / "training_log.txt",
        "metrics": inputs.run / "metrics.jsonl",
        "TensorBoard": inputs.run / "tensorboard",
        "loss plot": plot,
        "checkpoint": inputs.checkpoint,
        "HuggingFace": inputs.hf,
        "this report": inputs.run / "report.md",
    }
    _, _, old_loss, new_loss, baseline, old_match, new_match = rows[-1]
    text = "\n".join(
        [
            "# InternVL demo: report",
            "",
            f"Held-out loss {old_loss} before, {new_loss} after training. Held-out exact match "
            f"{old_match} before, {new_match} after; the majority answer scores {baseline}.",
            "",
            _table(rows),
            "",
            "Exact match: every token of the answer is the most likely one. Majority answer: the "
            "most frequent answer of the training samples of the set to the same question text.",
            "",
            f"Training: {len(metrics)} iterations in {_minutes(seconds)}, {speed:,.0f} tokens/s. "
            f"The whole script: {_minutes(inputs.wall_seconds)}.",
            "",
            *(f"- {name}: {place}" for name, place in places.items()),
            "",
        ]
    )
    (inputs.run / "report.md").write_text(text, encoding="utf-8")
    return text


def main() -> None:
    """Make the report and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("world", "run", "before", "after", "checkpoint", "hf"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--wall-seconds", type=float, required=True)
    print(make_report(ReportInputs(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()
