"""The report of ``mmlm data check``: text for the terminal, JSON for machines, a PNG of lengths."""

import json
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from mmlm.data.ledger import LEDGER_FILE, describe_counts, list_entries, write_ledger
from mmlm.data.preflight import CheckReport, Doubles, SetSummary, Summary
from mmlm.data.rejection import Action
from mmlm.errors import DataError

REPORT_FILE = "report.json"
TEXT_FILE = "report.txt"
PICTURE_FILE = "lengths.png"

REPORT_VERSION = 1
"""Of the JSON's layout."""

_HEAD = (
    "set",
    "records",
    "times",
    "images",
    "text-only",
    "too long",
    "repaired",
    "broken",
    "tokens min",
    "mean",
    "max",
    "lengths",
)
_LEVELS = " ▁▂▃▄▅▆▇█"
_BAR = 48


def format_report(report: CheckReport) -> str:
    """Return the report as text of several lines."""
    total, settings = report.total, report.settings
    judged = f"judged      {total.num_records:,} records of {len(report.sets)} sets "
    if report.reused:
        judged += "(--reuse: those that were not judged before)"
    else:
        rate = (total.num_records - report.num_resumed) / max(report.seconds, 1e-9)
        judged += f"in {report.seconds:.1f} s, {rate:,.0f} a second"
    lines = [
        f"mmlm data check  {report.meta}",
        f"tokenizer   {report.tokenizer}; cut at {settings.seq_length} tokens; pictures of "
        f"{settings.image_size} pixels take {settings.embeddings_per_image} tokens",
        f"{judged}; {report.num_workers} processes",
        *_resumed(report),
        "",
        _table([_row(summary) for summary in (*report.sets, total)]),
        "",
        f"tokens      {total.num_tokens:,} in {total.num_usable:,} usable records, "
        f"{total.num_supervised_tokens:,} of them supervised; {total.num_samples:,} samples an "
        "epoch",
        "lengths     of the usable records before the cut, in tokens",
        *_histogram(report.length_edges, total.lengths),
        f"ledger      {describe_counts(total.found)}",
        *_notes(report),
    ]
    return "\n".join(lines)


def verdict(report: CheckReport, policy: str) -> str:
    """Return what would become of a training: one line, and the first broken records.

    Args:
        report: of the check.
        policy: ``strict`` or ``skip``.
    """
    exclusions = report.exclusions
    if not exclusions:
        return "result      every record can be used"
    means = {
        "strict": "a training with data.policy=strict would not start; mend them, or use "
        "--policy skip to accept this",
        "skip": "a training with data.policy=skip leaves them out",
    }
    return (
        f"result      {len(exclusions)} of {report.total.num_records} records cannot be used: "
        f"{means[policy]}\n{list_entries(exclusions)}"
    )


def write_report(report: CheckReport, folder: Path, policy: str) -> None:
    """Write the report as text, JSON and PNG, and the ledger beside it.

    Args:
        report: of the check.
        folder: made if missing.
        policy: ``strict`` or ``skip``.

    Raises:
        DataError: the folder cannot be written.
    """
    text = f"{format_report(report)}\n{verdict(report, policy)}\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / TEXT_FILE).write_text(text, encoding="utf-8")
        content = json.dumps(to_json(report, policy), indent=2, ensure_ascii=False)
        (folder / REPORT_FILE).write_text(content + "\n", encoding="utf-8")
        write_ledger(folder / LEDGER_FILE, report.ledger)
        draw_lengths(report, folder / PICTURE_FILE)
    except OSError as error:
        raise DataError(
            f"{error.filename or folder}: cannot write the report ({error.strerror}); free the "
            "disk, or give another --output"
        ) from error


def to_json(report: CheckReport, policy: str) -> dict[str, Any]:
    """The report as JSON values; the ledger has a file of its own."""
    dropped = len(report.exclusions)
    return {
        "version": REPORT_VERSION,
        "meta": report.meta,
        "tokenizer": report.tokenizer,
        "seq_length": report.settings.seq_length,
        "image_size": report.settings.image_size,
        "embeddings_per_image": report.settings.embeddings_per_image,
        "policy": policy,
        "passed": dropped == 0 or policy == "skip",
        "num_dropped": dropped,
        "seconds": report.seconds,
        "reused": report.reused,
        "num_resumed": report.num_resumed,
        "stopped_at": report.stopped_at,
        "num_workers": report.num_workers,
        "length_edges": list(report.length_edges),
        "sets": [_summary_json(summary) for summary in report.sets],
        "total": _summary_json(report.total),
    }


def _summary_json(summary: Summary) -> dict[str, Any]:
    content = {field.name: getattr(summary, field.name) for field in fields(summary)}
    content["found"] = {
        action.value: {reason.value: count for reason, count in reasons.items()}
        for action, reasons in summary.found.items()
    }
    content["lengths"] = list(summary.lengths)
    content["mean_tokens"] = summary.mean_tokens
    content["doubles"] = {
        "num_ids": summary.doubles.num_ids,
        "num_records": summary.doubles.num_records,
        "examples": [
            {"id": double.identity, "places": list(double.places)}
            for double in summary.doubles.examples
        ],
    }
    return content


def draw_lengths(report: CheckReport, file: Path) -> None:
    """Draw a histogram of lengths for each set and for all of them, as one PNG.

    Args:
        report: of the check.
        file: the PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    summaries = (*report.sets, report.total)
    num_columns = min(2, len(summaries))
    num_rows = -(-len(summaries) // num_columns)
    figure = Figure(figsize=(6 * num_columns, 2.4 * num_rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
    edges = report.length_edges
    lefts = (0, *edges)
    widths = [right - left for left, right in zip(lefts, edges, strict=False)] + [edges[0]]
    for panel, summary in zip(panels, summaries, strict=False):
        colours = ["#1f5a9d"] * len(edges) + ["#d0502a"]
        panel.bar(lefts, summary.lengths, width=widths, align="edge", color=colours)
        # what is not in any font of the plot must not become a warning
        name = summary.name.encode("ascii", "replace").decode().replace("$", r"\$")
        panel.set_title(f"{name}: {summary.num_usable:,} records", fontsize=9)
        if edges[-1] == report.settings.seq_length:
            panel.axvline(edges[-1], color="#d0502a", linewidth=0.8)
        panel.tick_params(labelsize=8)
        panel.grid(axis="y", alpha=0.3)
    for panel in panels[len(summaries) :]:
        panel.set_axis_off()
    figure.supxlabel("tokens before the cut; red: longer than the cut", fontsize=9)
    figure.supylabel("records", fontsize=9)
    figure.savefig(file, dpi=100)


def _resumed(report: CheckReport) -> list[str]:
    if report.stopped_at is None:
        return []
    return [
        f"resumed     {report.num_resumed:,} of them were judged by a check that was stopped at "
        f"{_local_time(report.stopped_at)}; a picture that changed since is not seen"
    ]


def _local_time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _row(summary: Summary) -> tuple[str, ...]:
    numbers = (
        summary.num_records,
        summary.repeats if isinstance(summary, SetSummary) else "",
        summary.num_images,
        summary.num_text_only,
        summary.count(Action.TRUNCATED),
        summary.count(Action.REPAIRED),
        summary.count(Action.EXCLUDED),
        summary.shortest_tokens,
        round(summary.mean_tokens),
        summary.longest_tokens,
    )
    cells = (f"{number:,}" if isinstance(number, int) else number for number in numbers)
    return (summary.name, *cells, _sparkline(summary.lengths))


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[k]) for row in (_HEAD, *rows)) for k in range(len(_HEAD))]
    lines = []
    for row in (_HEAD, *rows):
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:-1], strict=True)]
        lines.append("  ".join([*cells, row[-1]]).rstrip())
    rule = "-" * max(map(len, lines))
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def _sparkline(counts: Sequence[int]) -> str:
    """One character a bin; the last bin, of what is longer than the cut, stands apart."""
    most = max(max(counts), 1)
    levels = [-(-count * (len(_LEVELS) - 1) // most) for count in counts]
    marks = "".join(_LEVELS[level] for level in levels)
    return f"|{marks[:-1]}|{marks[-1]}"


def _histogram(edges: Sequence[int], counts: Sequence[int]) -> list[str]:
    names = [f"{low + 1:,} - {high:,}" for low, high in zip((0, *edges[:-1]), edges, strict=True)]
    names += [f"over {edges[-1]:,}"]
    most = max(max(counts), 1)
    width, digits = max(map(len, names)), len(f"{most:,}")
    return [
        f"  {name:>{width}}  {count:>{digits},}  {'█' * -(-count * _BAR // most)}".rstrip()
        for name, count in zip(names, counts, strict=True)
    ]


def _notes(report: CheckReport) -> list[str]:
    lines = []
    for summary in report.sets:
        place = f"set '{summary.name}'"
        if not summary.keeps_promise:
            lines.append(
                f"length      {place} has {summary.num_records + summary.num_unused:,} records, "
                f"the meta json promises {summary.promised:,}; is the download complete?"
            )
        if summary.num_unused:
            lines.append(
                f"share       {place}: the last {summary.num_unused:,} records are not used "
                "(repeat_time) and were not judged"
            )
        if summary.num_without_id:
            lines.append(f"ids         {place}: {summary.num_without_id:,} records have none")
        if summary.doubles.num_ids:
            lines.append(f"ids         {place}: {_describe(summary.doubles)}")
    if report.total.doubles.num_ids:
        lines.append(f"ids         in more than one set: {_describe(report.total.doubles)}")
    return lines


def _describe(doubles: Doubles) -> str:
    first = doubles.examples[0]
    return (
        f"{doubles.num_ids:,} ids in {doubles.num_records:,} records, e.g. '{first.identity}' at "
        + " and ".join(first.places[:2])
    )
