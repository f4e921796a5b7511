"""What a data worker delivers, beside a plain loop over the same pictures: a table to redo.

    source tools/environment.sh dev
    python -m benchmarks.loader --output benchmarks/results/loader

The plain loop decodes JPEGs with Pillow, resizes them, and tokenizes the conversation with
SentencePiece: no template, no labels, no batches. A worker does all that the training needs but
normalising, and sends the result to the trainer's process, which lays it out. Both run in turns in
one call, on the same files; exit status 1 if a worker is slower than 0.95 of the loop.

Also measured: how long the first batch of iteration 0 and of iteration 100 000 takes.
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


def plain_loop(folder: Path, sample_ids: Sequence[int]) -> float:
    """Decode, resize and tokenize, nothing else; return samples a second."""
    lines = (folder / "bench.jsonl").read_text("utf-8").splitlines()
    pieces = sentencepiece.SentencePieceProcessor(
        model_file=str(folder / "tokenizer" / "tokenizer.model")
    )
    began = time.perf_counter()
    for sample_id in sample_ids:
        record = json.loads(lines[sample_id])
        with Image.open(folder / record["image"]) as image:
            np.asarray(
                image.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
            )
        pieces.encode(f"system\n{SYSTEM_MESSAGE}")
        for turn in record["conversations"]:
            pieces.encode(f"{turn['from']}\n{turn['value']}")
    return len(sample_ids) / (time.perf_counter() - began)


def _timed_loop(folder: Path, sample_ids: Sequence[int], answer: Any) -> None:
    answer.put(plain_loop(folder, sample_ids))


def plain_loops(folder: Path, sample_ids: Sequence[int], num_processes: int) -> float:
    """Run the plain loop in as many processes at once; return samples a second of all."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    shares = [sample_ids[number::num_processes] for number in range(num_processes)]
    processes = [
        context.Process(target=_timed_loop, args=(folder, share, answers)) for share in shares
    ]
    for process in processes:
        process.start()
    total = sum(answers.get() for _ in processes)
    for process in processes:
        process.join()
    return float(total)


def loader_rate(
    dataset: Dataset, planner: TrainPlanner, num_workers: int, num_iterations: int
) -> tuple[float, int]:
    """Consume batches as fast as they come.

    Returns:
        Samples a second, after the first iteration; resident bytes of one worker.
    """
    # imported here: each worker imports this file too, and should not import torch
    from mmlm.data.loader import BatchLoader

    with BatchLoader(
        dataset,
        planner,
        data_parallel_rank=0,
        end_iteration=num_iterations,
        num_workers=num_workers,
        prefetch_iterations=2,
    ) as loader:
        loader.batches(0)
        began, samples = time.perf_counter(), 0
        for iteration in range(1, num_iterations):
            plan, _ = loader.batches(iteration)
            samples += plan.num_samples
        seconds = time.perf_counter() - began
        sizes = [
            child.memory_info().rss
            for child in psutil.Process(os.getpid()).children()
            if "spawn_main" in " ".join(child.cmdline())
        ]
    return samples / seconds, max(sizes, default=0)


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


def measure(num_samples: int, num_workers: int, num_rounds: int) -> dict[str, Any]:
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
            global_batch_size=64,
            seq_length=SEQ_LENGTH,
            micro_batch_size=1,
            data_parallel_size=1,
        )
        rounds = []
        for _ in tqdm(range(num_rounds), desc="rounds", unit="round"):
            plain = plain_loops(folder, range(num_samples), num_workers)
            rate, size = loader_rate(dataset, planner, num_workers, 1 + num_samples // 64)
            rounds.append({"plain": plain, "loader": rate, "ratio": rate / plain, "rss": size})
        first = {
            iteration: min(first_batch_seconds(dataset, planner, iteration) for _ in range(3))
            for iteration in (0, 100_000)
        }
    return {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}",
        "num_samples": num_samples,
        "num_workers": num_workers,
        "rounds": rounds,
        "ratio_median": median(entry["ratio"] for entry in rounds),
        "worker_rss_bytes": max(entry["rss"] for entry in rounds),
        "first_batch_seconds": first,
        "first_plan_seconds": {iteration: plan_seconds(iteration) for iteration in (0, 100_000)},
    }


def as_markdown(report: dict[str, Any]) -> str:
    """The report as a table."""
    lines = [
        "# Loader",
        "",
        f"`python -m benchmarks.loader` on {report['machine']}: {report['num_samples']} JPEGs of "
        f"{SIZE[0]} x {SIZE[1]}, {report['num_workers']} worker(s) against as many processes of "
        "the plain loop (Pillow decodes and resizes, SentencePiece tokenizes), in turns.",
        "",
        "| round | plain loop, samples/s | loader, samples/s | ratio |",
        "|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {number} | {entry['plain']:.1f} | {entry['loader']:.1f} | {entry['ratio']:.3f} |"
        for number, entry in enumerate(report["rounds"], start=1)
    ]
    verdict = "is met" if report["ratio_median"] >= BAR else "is **not** met"
    first, planned = report["first_batch_seconds"], report["first_plan_seconds"]
    lines += [
        "",
        f"Median ratio {report['ratio_median']:.3f}; the bar of {BAR} {verdict}. A worker holds "
        f"{report['worker_rss_bytes'] / 2**20:.0f} MiB.",
        "",
        f"First batch of 64 samples at iteration 0: {first[0]:.2f} s, at iteration 100 000: "
        f"{first[100_000]:.2f} s. First plan of 1 267 819 samples: {planned[0]:.2f} s and "
        f"{planned[100_000]:.2f} s, the drawing of the epoch's order included.",
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write ``OUTPUT.md`` and ``OUTPUT.json``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", default="benchmarks/results/loader")
    parser.add_argument("--samples", type=int, default=640)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    report = measure(options.samples, options.workers, options.rounds)
    output = Path(options.output)
    output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    output.with_suffix(".md").write_text(as_markdown(report), encoding="utf-8")
    print(as_markdown(report))
    return 0 if report["ratio_median"] >= BAR else 1


if __name__ == "__main__":
    sys.exit(main())
