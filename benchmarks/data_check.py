"""How fast ``mmlm data check`` judges, beside a plain loop, and how large an index is in memory.

    source tools/environment.sh dev
    python -m benchmarks.data_check --output benchmarks/results/data_check

The plain loop parses each line, decodes its JPEG with Pillow and tokenizes its turns with
SentencePiece; no template, no labels, no rules. In turns, on the same files: the loop in one
process, the loop in as many processes as there are cores (each with its share), and the check in as
many. Exit status 1 if the check is slower than 0.8 of the loops on all cores: on a machine that has
other work, or whose cores share what they compute with, those are less than cores x one loop, which
is reported as well. The check's time includes the start of its processes.

The index of the published sets (1 267 819 records in nine files, sizes drawn as
`benchmarks.published_lengths` does) is opened in a fresh process: seconds, and resident memory,
interpreter and libraries included. Exit status 1 above 1 s or 200 MB.
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import sentencepiece
from PIL import Image
from tqdm import tqdm

from benchmarks.published_lengths import PUBLISHED_SETS, published_table
from mmlm.data.annotation import read_meta
from mmlm.data.length_index import INDEX_DTYPE, index_path, write_index
from mmlm.data.preflight import check_data
from mmlm.data.sample import SampleSettings
from mmlm.data.tokenizer import Tokenizer
from tests.tiny_data import make_tokenizer

RATE_BAR = 0.8
OPEN_SECONDS_BAR = 1.0
OPEN_BYTES_BAR = 200e6
SETTINGS = SampleSettings(seq_length=2048, image_size=448, embeddings_per_image=256)


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How long some records took."""

    rate: float
    """Records a second."""
    cpu_milliseconds: float
    """Of all processes together, per record."""


def plain_loop(folder: Path, first: int = 0, step: int = 1) -> float:
    """Parse, decode and tokenize every ``step``-th line; return seconds."""
    pieces = sentencepiece.SentencePieceProcessor(
        model_file=str(folder / "tokenizer" / "tokenizer.model")
    )
    lines = (folder / "bench.jsonl").read_bytes().splitlines()[first::step]
    began = time.perf_counter()
    for line in lines:
        record = json.loads(line)
        with Image.open(folder / record["image"]) as image:
            image.convert("RGB")
        for turn in record["conversations"]:
            pieces.encode(turn["value"])
    return time.perf_counter() - began


def time_loops(folder: Path, num_samples: int, num_processes: int) -> Timing:
    """Run the plain loop in several processes at once; the slowest counts, their start does not."""
    before = _cpu_seconds()
    with ProcessPoolExecutor(num_processes, multiprocessing.get_context("spawn")) as pool:
        shares = [
            pool.submit(plain_loop, folder, first, num_processes) for first in range(num_processes)
        ]
        seconds = max(share.result() for share in shares)
    cpu = _cpu_seconds() - before
    return Timing(rate=num_samples / seconds, cpu_milliseconds=1e3 * cpu / num_samples)


def time_check(folder: Path, num_samples: int, num_workers: int) -> Timing:
    """Judge the same lines."""
    before = _cpu_seconds()
    report = check_data(
        folder / "meta.json",
        Tokenizer(folder / "tokenizer"),
        SETTINGS,
        cache_dir=folder / "cache",
        num_workers=num_workers,
    )
    cpu = _cpu_seconds() - before
    assert report.total.num_usable == num_samples, "the benchmark's own data are sound"
    return Timing(rate=num_samples / report.seconds, cpu_milliseconds=1e3 * cpu / num_samples)


def _cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    usage = [resource.getrusage(each) for each in who]
    return sum(each.ru_utime + each.ru_stime for each in usage)


def compare_rates(folder: Path, num_samples: int, num_rounds: int) -> dict[str, Any]:
    """Run loop, loops and check in turns; return all rates and the median of the ratios."""
    # imported here: it brings torch, which every spawned process would import with this file
    from benchmarks.loader import write_world

    num_cores = len(os.sched_getaffinity(0))
    write_world(folder, num_samples)
    make_tokenizer(folder / "tokenizer")
    plain_loop(folder)  # the files are in the page cache from here on
    rounds = []
    for _ in tqdm(range(num_rounds), desc="rounds", unit="round"):
        one = time_loops(folder, num_samples, 1)
        all_cores = time_loops(folder, num_samples, num_cores)
        check = time_check(folder, num_samples, num_cores)
        rounds.append(
            {
                "loop": asdict(one),
                "loops": asdict(all_cores),
                "check": asdict(check),
                "ratio_to_loops": check.rate / all_cores.rate,
                "ratio_to_cores_times_loop": check.rate / (num_cores * one.rate),
            }
        )
    ratio = median(each["ratio_to_loops"] for each in rounds)
    return {
        "num_samples": num_samples,
        "num_cores": num_cores,
        "rounds": rounds,
        "ratio_to_loops": ratio,
        "ratio_to_cores_times_loop": median(each["ratio_to_cores_times_loop"] for each in rounds),
        "passed": ratio >= RATE_BAR,
    }


def write_published_indexes(folder: Path) -> Path:
    """Write the length indexes of nine sets of the published sizes, but no records.

    Returns:
        The meta json.
    """
    tokenizer = Tokenizer(make_tokenizer(folder / "tokenizer"))
    total = sum(each.num_samples for each in PUBLISHED_SETS)
    table = published_table(total)
    meta, start = {}, 0
    for each in PUBLISHED_SETS:
        annotation = folder / f"{each.name}.jsonl"
        annotation.write_text("")
        meta[each.name] = {"root": str(folder), "annotation": str(annotation)}
    (folder / "meta.json").write_text(json.dumps(meta))
    (folder / "cache").mkdir()
    for each, entry in zip(PUBLISHED_SETS, read_meta(folder / "meta.json"), strict=True):
        part = slice(start, start := start + each.num_samples)
        rows = np.zeros(each.num_samples, dtype=INDEX_DTYPE)
        rows["line"] = np.arange(1, each.num_samples + 1)
        rows["offset"] = 1200 * (rows["line"].astype(np.int64) - 1)
        rows["num_tokens"] = rows["num_tokens_uncut"] = table.num_tokens[part]
        rows["num_images"] = table.num_images[part]
        rows["num_supervised_tokens"] = table.num_supervised_tokens[part]
        rows["usable"] = 1
        write_index(index_path(entry, tokenizer, SETTINGS, folder / "cache"), rows, [])
    return folder / "meta.json"


OPEN = """
import json, sys, time
from pathlib import Path
import psutil
from mmlm.data.dataset import open_dataset
from mmlm.data.sample import SampleSettings
from mmlm.data.tokenizer import Tokenizer

folder = Path(sys.argv[1])
tokenizer = Tokenizer(folder / "tokenizer")
settings = SampleSettings(seq_length=2048, image_size=448, embeddings_per_image=256)
before, began = psutil.Process().memory_info().rss, time.perf_counter()
cache = folder / "cache"
dataset = open_dataset(folder / "meta.json", tokenizer, settings, cache_dir=cache, build=False)
seconds = time.perf_counter() - began
after = psutil.Process().memory_full_info()
print(json.dumps({
    "num_samples": len(dataset.table.num_tokens), "seconds": seconds,
    "grown_bytes": after.rss - before, "resident_bytes": after.rss, "own_bytes": after.uss,
}))
"""
"""Nothing else is imported in that process, so that its memory is that of the data room."""


def measure_opening(folder: Path, num_rounds: int) -> dict[str, Any]:
    """Open the published indexes in fresh processes; return the medians."""
    meta = write_published_indexes(folder)
    command = [sys.executable, "-c", OPEN, str(meta.parent)]
    rounds = [
        json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        for _ in range(num_rounds)
    ]
    found = {name: median(each[name] for each in rounds) for name in rounds[0]}
    passed = found["seconds"] < OPEN_SECONDS_BAR and found["resident_bytes"] < OPEN_BYTES_BAR
    disk = sum(file.stat().st_size for file in (folder / "cache").glob("*.npy"))
    return {**found, "disk_bytes": disk, "passed": passed}


def as_markdown(rates: dict[str, Any], opening: dict[str, Any], place: str) -> str:
    """Both results as a page."""
    lines = [
        "# mmlm data check, and the length index",
        "",
        f"Made by `python -m benchmarks.data_check` on {place}.",
        "",
        f"## Speed: {rates['num_samples']} records with a JPEG of 640 x 480 each",
        "",
        "The plain loop (JSON, Pillow's decode, SentencePiece) in one process, in "
        f"{rates['num_cores']} at once, and the check in {rates['num_cores']}, in turns; records a "
        "second, and CPU milliseconds a record:",
        "",
        "| round | loop | loops on all cores | check | check / loops | check / (cores x loop) | "
        "CPU of the loops | CPU of the check |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for number, each in enumerate(rates["rounds"], start=1):
        loop, loops, check = each["loop"], each["loops"], each["check"]
        lines.append(
            f"| {number} | {loop['rate']:.0f} | {loops['rate']:.0f} | {check['rate']:.0f} | "
            f"{each['ratio_to_loops']:.2f} | {each['ratio_to_cores_times_loop']:.2f} | "
            f"{loops['cpu_milliseconds']:.2f} | {check['cpu_milliseconds']:.2f} |"
        )
    lines += [
        "",
        f"Median of check / loops {rates['ratio_to_loops']:.2f}, bar {RATE_BAR}: {_word(rates)}. "
        f"Median of check / (cores x loop) {rates['ratio_to_cores_times_loop']:.2f}.",
        "",
        f"## Opening the index of {opening['num_samples']:,} records in nine sets",
        "",
        "| | found | bar |",
        "|---|---|---|",
        f"| seconds | {opening['seconds']:.3f} | {OPEN_SECONDS_BAR:g} |",
        f"| resident memory of the process, MB | {opening['resident_bytes'] / 1e6:.0f} | "
        f"{OPEN_BYTES_BAR / 1e6:.0f} |",
        f"| of it not shared with other processes, MB | {opening['own_bytes'] / 1e6:.0f} | |",
        f"| grown by the opening, MB | {opening['grown_bytes'] / 1e6:.0f} | |",
        f"| on the disk, MB | {opening['disk_bytes'] / 1e6:.0f} | |",
        "",
        f"{_word(opening)}.",
        "",
    ]
    return "\n".join(lines)


def _word(result: dict[str, Any]) -> str:
    return "met" if result["passed"] else "**NOT met**"


def main() -> int:
    """Measure, write, judge."""
    parser = argparse.ArgumentParser(description="Speed of the check, size of the index.")
    parser.add_argument("--samples", type=int, default=2000, help="records to judge")
    parser.add_argument("--rounds", type=int, default=5, help="how often")
    parser.add_argument("--output", type=Path, help="write PATH.md and PATH.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as rate_folder, tempfile.TemporaryDirectory() as folder:
        rates = compare_rates(Path(rate_folder), options.samples, options.rounds)
        opening = measure_opening(Path(folder), options.rounds)
    place = f"{platform.machine()}, {rates['num_cores']} cores, Python {platform.python_version()}"
    text = as_markdown(rates, opening, place)
    print(text)
    if options.output:
        content = {"place": place, "rates": rates, "opening": opening}
        options.output.with_suffix(".md").write_text(text, encoding="utf-8")
        options.output.with_suffix(".json").write_text(json.dumps(content, indent=2) + "\n")
    return 0 if rates["passed"] and opening["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
