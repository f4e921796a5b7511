"""What a data worker delivers, beside a plain loop over the same pictures: a table to redo.

    source tools/environment.sh dev
    python -m benchmarks.loader --output benchmarks/results/loader

The plain loop decodes JPEGs with Pillow, resizes them, and tokenizes the conversation with
SentencePiece: no template, no labels, no batches. The loader gives whole batches: a worker decodes,
resizes and sends, the consuming process tokenizes, normalises and lays out. Both run in turns in
one call, on the same files, each in a process of its own; exit status 1 if, by the clock, a worker
is slower than 0.95 of the loop.

Samples a second are given by the clock, which needs a free core for the worker and one for the
consumer, and for each second of the worker's processor time, which holds on a busy machine too.

Also measured: the processor time of the consuming process, and how long the first batch of
iteration 0 and of iteration 100 000 takes.
"""

import argparse
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import sentencepiece
from PIL import Image
from tqdm import tqdm

from benchmarks.published_lengths import published_table
from mmlm.data.conversation import SYSTEM_MESSAGE
from mmlm.data.dataset import Dataset, open_dataset
from mmlm.data.planners import TrainPlanner
from mmlm.data.sample import SampleSettings
from mmlm.data.tokenizer import Tokenizer
from tests.tiny_data import make_tokenizer

BAR = 0.95
RATES = ("by_clock", "by_processor")
BATCH = 64
SIZE = (640, 480)
IMAGE_SIZE = 448
SEQ_LENGTH = 2048
WORDS = ("what", "does", "the", "picture", "show", "here", "is", "a", "red", "bar", "on", "top")


def write_world(folder: Path, num_samples: int) -> Path:
    """Write JPEGs of 640 x 480 pixels, about 100 kB each, and a set that talks about them.

    Returns:
        The meta json.
    """
    generator = np.random.default_rng(0)
    (folder / "images").mkdir()
    lines = []
    for number in range(num_samples):
        coarse = generator.integers(0, 256, (30, 40, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize(SIZE, Image.Resampling.BICUBIC))
        noisy = smooth.astype(np.int16) + generator.integers(-12, 13, smooth.shape)
        picture = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
        picture.save(folder / "images" / f"{number}.jpg", quality=90)
        turns = []
        for turn in range(3):
            asked, said = (" ".join(generator.choice(WORDS, count)) for count in (12, 40))
            turns += [
                {"from": "human", "value": "<image>\n" * (turn == 0) + asked},
                {"from": "gpt", "value": said},
            ]
        lines.append({"id": number, "image": f"images/{number}.jpg", "conversations": turns})
    annotation = folder / "bench.jsonl"
    annotation.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    entry = {"root": str(folder), "annotation": str(annotation), "data_augment": False}
    (folder / "meta.json").write_text(
        json.dumps({"bench": {**entry, "repeat_time": 1, "length": num_samples}}), encoding="utf-8"
    )
    return folder / "meta.json"


@dataclass(frozen=True, kw_only=True)
class Rate:
    """Samples a second."""

    by_clock: float
    by_processor: float
    """For each second of processor time of the plain loop or the worker."""
    consumer_seconds: float = 0.0
    """Processor time of the consuming process, all threads, a sample."""


def plain_loop(folder: Path, sample_ids: Sequence[int]) -> Rate:
    """Decode, resize and tokenize, nothing else."""
    lines = (folder / "bench.jsonl").read_text("utf-8").splitlines()
    pieces = sentencepiece.SentencePieceProcessor(
        model_file=str(folder / "tokenizer" / "tokenizer.model")
    )
    began, used = time.perf_counter(), time.process_time()
    for sample_id in sample_ids:
        record = json.loads(lines[sample_id])
        with Image.open(folder / record["image"]) as image:
            np.asarray(
                image.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
            )
        pieces.encode(f"system\n{SYSTEM_MESSAGE}")
        for turn in record["conversations"]:
            pieces.encode(f"{turn['from']}\n{turn['value']}")
    count = len(sample_ids)
    return Rate(
        by_clock=count / (time.perf_counter() - began),
        by_processor=count / (time.process_time() - used),
    )


def _answer(folder: Path, sample_ids: Sequence[int], answers: Any) -> None:
    plain_loop(folder, sample_ids[:32])  # warm, as the loader is after its first iteration
    answers.put(plain_loop(folder, sample_ids))


def plain_process(folder: Path, sample_ids: Sequence[int]) -> Rate:
    """Run the plain loop in a process of its own."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=_answer, args=(folder, sample_ids, answers))
    process.start()
    rate: Rate = answers.get()
    process.join()
    return rate


def loader_rate(dataset: Dataset, planner: TrainPlanner, num_iterations: int) -> tuple[Rate, int]:
    """Consume the batches of one worker as fast as they come.

    Returns:
        After the first iteration; and the worker's resident bytes.
    """
    # imported here: the worker imports this file too, and should not import torch
    from mmlm.data.loader import BatchLoader

    with BatchLoader(
        dataset,
        planner,
        data_parallel_rank=0,
        end_iteration=num_iterations,
        num_workers=1,
        prefetch_iterations=1,
    ) as loader:
        loader.batches(0)
        (worker,) = [
            child
            for child in psutil.Process(os.getpid()).children()
            if "spawn_main" in " ".join(child.cmdline())
        ]
        consumed = time.process_time()
        began, used = time.perf_counter(), sum(worker.cpu_times()[:2])
        count = 0
        for iteration in range(1, num_iterations):
            plan, _ = loader.batches(iteration)
            count += plan.num_samples
        rate = Rate(
            by_clock=count / (time.perf_counter() - began),
            by_processor=count / (sum(worker.cpu_times()[:2]) - used),
            consumer_seconds=(time.process_time() - consumed) / count,
        )
        return rate, worker.memory_info().rss


def first_batch_seconds(dataset: Dataset, planner: TrainPlanner, iteration: int) -> float:
    """Time from nothing to the first batch of an iteration, in a thread."""
    from mmlm.data.loader import BatchLoader  # as above

    began = time.perf_counter()
    with BatchLoader(dataset, planner, data_parallel_rank=0, end_iteration=iteration + 1) as loader:
        loader.batches(iteration)
    return time.perf_counter() - began


def plan_seconds(iteration: int) -> float:
    """Time to plan an iteration of 1.27 M samples whose order nobody has drawn yet."""
    planner = TrainPlanner(
        table=published_table(1_267_819),
        seed=iteration,  # another seed, another order
        global_batch_size=512,
        seq_length=2048,
        micro_batch_size=1,
        data_parallel_size=8,
    )
    began = time.perf_counter()
    planner.plan(iteration)
    return time.perf_counter() - began


def measure(num_samples: int, num_rounds: int) -> dict[str, Any]:
    """Run everything; see the module."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = Tokenizer(make_tokenizer(folder / "tokenizer"))
        meta = write_world(folder, num_samples)
        settings = SampleSettings(
            seq_length=SEQ_LENGTH, image_size=IMAGE_SIZE, embeddings_per_image=256
        )
        dataset = open_dataset(meta, tokenizer, settings, cache_dir=folder / "cache")
        planner = TrainPlanner(
            table=dataset.table,
            seed=1,
            global_batch_size=BATCH,
            seq_length=SEQ_LENGTH,
            micro_batch_size=1,
            data_parallel_size=1,
        )
        rounds = []
        for _ in tqdm(range(num_rounds), desc="rounds", unit="round"):
            plain = plain_process(folder, range(num_samples))
            loader, size = loader_rate(dataset, planner, 1 + num_samples // BATCH)
            rounds.append({"plain": asdict(plain), "loader": asdict(loader), "rss_bytes": size})
        first = {
            iteration: min(first_batch_seconds(dataset, planner, iteration) for _ in range(3))
            for iteration in (0, 100_000)
        }
    medians = {
        way: {name: median(entry[way][name] for entry in rounds) for name in rounds[0][way]}
        for way in ("plain", "loader")
    }
    return {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}",
        "num_samples": num_samples,
        "rounds": rounds,
        "medians": medians,
        "ratios": {name: medians["loader"][name] / medians["plain"][name] for name in RATES},
        "worker_rss_bytes": max(entry["rss_bytes"] for entry in rounds),
        "first_batch_seconds": first,
        "first_plan_seconds": {iteration: plan_seconds(iteration) for iteration in (0, 100_000)},
    }


def as_markdown(report: dict[str, Any]) -> str:
    """The report as a table."""
    lines = [
        "# Loader",
        "",
        f"`python -m benchmarks.loader` on {report['machine']}: {report['num_samples']} JPEGs of "
        f"{SIZE[0]} x {SIZE[1]}, one worker against one process of the plain loop (Pillow decodes "
        "and resizes, SentencePiece tokenizes), in turns. Samples a second by the clock, and for "
        "each second of processor time of the plain loop or the worker. The clock of the loader "
        "needs two free cores, one of them for the consumer: it suffers most from other work.",
        "",
        "| round | plain, clock | loader, clock | plain, processor | worker, processor |",
        "|--:|--:|--:|--:|--:|",
    ]
    named = [(str(number), entry) for number, entry in enumerate(report["rounds"], start=1)]
    for name, entry in [*named, ("median", report["medians"])]:
        values = [entry[way][rate] for rate in RATES for way in ("plain", "loader")]
        lines.append(f"| {name} | " + " | ".join(f"{value:.1f}" for value in values) + " |")
    by_clock, by_processor = (report["ratios"][name] for name in RATES)
    verdict = "is met" if by_clock >= BAR else "is **not** met"
    first, planned = report["first_batch_seconds"], report["first_plan_seconds"]
    lines += [
        "",
        f"Ratio of the medians: {by_clock:.3f} by the clock (the bar of {BAR} {verdict}), "
        f"{by_processor:.3f} by processor time. A worker holds "
        f"{report['worker_rss_bytes'] / 2**20:.0f} MiB. The consuming process spends "
        f"{report['medians']['loader']['consumer_seconds'] * 1e3:.1f} ms of processor time a "
        "sample to receive, tokenize, normalise and lay out.",
        "",
        f"First batch of {BATCH} samples at iteration 0: {first[0]:.2f} s, at iteration 100 000: "
        f"{first[100_000]:.2f} s. First plan of 1 267 819 samples: {planned[0]:.2f} s and "
        f"{planned[100_000]:.2f} s, the drawing of the epoch's order included.",
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write ``OUTPUT.md`` and ``OUTPUT.json``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", default="benchmarks/results/loader")
    parser.add_argument("--samples", type=int, default=320)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args(arguments)
    report = measure(options.samples, options.rounds)
    output = Path(options.output)
    output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    output.with_suffix(".md").write_text(as_markdown(report), encoding="utf-8")
    print(as_markdown(report))
    return 0 if report["ratios"]["by_clock"] >= BAR else 1


if __name__ == "__main__":
    sys.exit(main())
