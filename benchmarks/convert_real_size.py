"""Weights of the real size in and out: bit for bit, how fast beside ``cp``, and in how much memory.

    source tools/environment.sh dev
    python -m benchmarks.convert_real_size --folder /a/disk/with/40/GB \\
        --output benchmarks/results/convert_real_size

Two cases, random bf16 weights in the published shapes, written shard by shard: InternViT-6B (45
layers, 11 GB), and of Yi-34B four layers, the embedding and the head at their true width (6 GB).
Each goes in with hf_to_megatron.py and out with megatron_to_hf.py, as a user would start them, and
verify.py compares what came in with the checkpoint and with what came out.

Each conversion runs three times, in turn with ``cp -r`` of what it reads to the same disk; the
medians are compared, because a disk that others use takes once 12 and once 28 seconds for the same
bytes. All start with the files out of the page cache and end when the disk has everything. Exit
status 1 if a conversion is slower than 0.7 of ``cp``, if its peak resident memory (of the whole
process, libraries included) is above 2 x the largest tensor + 500 MB, or if anything is not the
same to the bit. At most three times the larger case lies on the disk. With ``--small`` the parts
have their true width and fewer layers: 2 and 3 GB.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tqdm import tqdm

from tests.tiny_data import make_tokenizer
from tests.tiny_weights import llm_shapes, tiny_llm_config, tiny_vision_config, vision_shapes

ROUNDS = 3
RATE_BAR = 0.7
MEMORY_BAR_FACTOR, MEMORY_BAR_BYTES = 2, 500e6
SHARD_BYTES = 2_000_000_000
ROOT = Path(__file__).parents[1]
TOOLS = ROOT / "tools" / "checkpoint_convert"

INTERNVIT_6B: Mapping[str, Any] = tiny_vision_config(
    hidden_size=3200,
    intermediate_size=12800,
    num_attention_heads=25,
    num_hidden_layers=45,
    image_size=448,
)
YI_34B_FOUR_LAYERS: Mapping[str, Any] = tiny_llm_config(
    64000,
    hidden_size=7168,
    intermediate_size=20480,
    num_attention_heads=56,
    num_key_value_heads=8,
    num_hidden_layers=4,
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One part of a model."""

    title: str
    option: str
    """Of hf_to_megatron.py."""
    part: str
    """Folder in what megatron_to_hf.py --parts writes."""
    config: Mapping[str, Any]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor."""
        return (vision_shapes if self.part == "vision" else llm_shapes)(self.config)

    @property
    def num_bytes(self) -> int:
        """Of all tensors, bf16."""
        return 2 * sum(prod(shape) for shape in self.shapes.values())

    @property
    def memory_bar(self) -> float:
        """Bytes that a conversion may have in memory."""
        largest = 2 * max(prod(shape) for shape in self.shapes.values())
        return MEMORY_BAR_FACTOR * largest + MEMORY_BAR_BYTES


CASES = (
    Case(
        title="InternViT-6B, 45 layers",
        option="--vision",
        part="vision",
        config=INTERNVIT_6B,
    ),
    Case(
        title="Yi-34B: 4 of 60 layers, embedding and head",
        option="--llm",
        part="llm",
        config=YI_34B_FOUR_LAYERS,
    ),
)

SMALL_CASES = tuple(
    replace(case, title=f"{case.title}: {layers} layers of it", config=config)
    for case, layers in zip(CASES, (8, 1), strict=True)
    for config in [{**case.config, "num_hidden_layers": layers}]
)


def write_source(folder: Path, case: Case) -> None:
    """Write random finite weights, a shard in memory at a time, by HuggingFace's own library."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**case.config, "torch_dtype": "bfloat16"}))
    if case.part == "llm":
        make_tokenizer(folder)
    shards = list(_shards(case.shapes))
    generator = np.random.default_rng(0)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(tqdm(shards, desc="writing weights", unit="shard"), start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {each: _random(generator, case.shapes[each]) for each in names}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, name)
    index = {"metadata": {"total_size": case.num_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _shards(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        num_bytes = 2 * prod(shape)
        if names and size + num_bytes > SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += num_bytes
    yield names


def _random(generator: np.random.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    """Random bits of bf16, but for the highest of the exponent: no NaN, no infinity."""
    bits = np.frombuffer(generator.bytes(2 * prod(shape)), dtype=np.uint16) & np.uint16(0xBFFF)
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).view(shape)


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One command."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    """Largest resident memory of its process."""


def timed(reads: Path, writes: Path, *command: object) -> Timing:
    """Run a command to its end, and to the end of the disk's work.

    Args:
        reads: what it reads, which is put out of the page cache before.
        writes: folder that it writes.
        *command: program and arguments.
    """
    for file in _files(reads):
        _sync(file, forget=True)
    began = time.perf_counter()
    status, _, usage = run(*command)
    if status:
        raise RuntimeError(f"{command}: exit status {status}")
    for file in _files(writes):
        _sync(file, forget=False)
    return Timing(seconds=time.perf_counter() - began, **usage)


RUNNER = """
import json, os, subprocess, sys
process = subprocess.Popen(sys.argv[2:])
_, status, usage = os.wait4(process.pid, 0)
with open(sys.argv[1], "w") as file:
    json.dump({
        "cpu_seconds": usage.ru_utime + usage.ru_stime, "peak_bytes": 1024 * usage.ru_maxrss
    }, file)
sys.exit(os.waitstatus_to_exitcode(status))
"""
"""Between this process and the command: a process begins with the peak memory of its parent, which
here has held the weights."""


def run(*command: object) -> tuple[int, str, dict[str, Any]]:
    """Run a command: exit status, what it printed, its CPU seconds and its peak memory."""
    with tempfile.NamedTemporaryFile("r") as file:
        words = [sys.executable, "-c", RUNNER, file.name, *map(str, command)]
        # the tools find the package of this folder
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.run(
            words, stdout=subprocess.PIPE, text=True, env=environment, check=False
        )
        return process.returncode, process.stdout, json.load(file)


def _files(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file()]


def _sync(file: Path, *, forget: bool) -> None:
    """Wait until a file is on the disk; put it out of the page cache if asked to."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if forget:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def convert(case: Case, reads: Path, writes: Path, tool: str, *words: object) -> dict[str, Any]:
    """A conversion and a copy in turn; what the last conversion has written stays."""
    copies, found = [], []
    for _ in range(ROUNDS):
        shutil.rmtree(writes, ignore_errors=True)
        copies.append(_copy(reads))
        found.append(timed(reads, writes, sys.executable, TOOLS / tool, *words))
    seconds = median(each.seconds for each in found)
    ratio = median(copies) / seconds
    peak_bytes = max(each.peak_bytes for each in found)
    return {
        "seconds": [each.seconds for each in found],
        "cpu_seconds": median(each.cpu_seconds for each in found),
        "peak_bytes": peak_bytes,
        "rate": case.num_bytes / seconds,
        "copy_seconds": copies,
        "ratio": ratio,
        "memory_bar": case.memory_bar,
        "passed": ratio >= RATE_BAR and peak_bytes <= case.memory_bar,
    }


def _copy(folder: Path) -> float:
    target = folder.parent / "copy"
    target.mkdir()
    found = timed(folder, target, "cp", "-r", folder, target)
    shutil.rmtree(target)
    return found.seconds


def run_case(folder: Path, case: Case) -> dict[str, Any]:
    """One part in, out and compared; removes what it has written."""
    source, checkpoint, out = folder / "source", folder / "checkpoint", folder / "out"
    try:
        write_source(source, case)
        into = convert(
            case,
            source,
            checkpoint,
            "hf_to_megatron.py",
            case.option,
            source,
            "--output",
            checkpoint,
        )
        verified = [_verify(source, "--megatron", checkpoint)]
        out_of = convert(
            case,
            checkpoint,
            out,
            "megatron_to_hf.py",
            *("--load", checkpoint, "--output", out),
        )
        verified.append(_verify(source, "--hf", out))
    finally:
        for each in (source, checkpoint, out, folder / "copy"):
            shutil.rmtree(each, ignore_errors=True)
    return {
        "title": case.title,
        "num_tensors": len(case.shapes),
        "num_bytes": case.num_bytes,
        "in": into,
        "out": out_of,
        "verify": verified,
        "passed": into["passed"] and out_of["passed"] and all(each["same"] for each in verified),
    }


def _verify(source: Path, option: str, other: Path) -> dict[str, Any]:
    began = time.perf_counter()
    status, text, usage = run(sys.executable, TOOLS / "verify.py", "--hf", source, option, other)
    return {
        "same": status == 0,
        "text": text.replace(str(source.parent), "").strip().splitlines(),
        "seconds": time.perf_counter() - began,
        **usage,
    }


def as_markdown(cases: list[dict[str, Any]], place: str) -> str:
    """All results as a page."""
    lines = [
        "# Weights of the real size, in and out",
        "",
        f"Made by `python -m benchmarks.convert_real_size` on {place}. Random bf16 weights in the "
        "published shapes. Everything begins out of the page cache and ends when the disk has it; "
        f"`cp` and each conversion run {ROUNDS} times in turn, on the same bytes and the same "
        "disk, and their medians are compared. "
        f"Bars: {RATE_BAR} of the speed of `cp`; {MEMORY_BAR_FACTOR} x the largest tensor "
        f"+ {MEMORY_BAR_BYTES / 1e6:.0f} MB of resident memory, Python and libraries included.",
    ]
    for case in cases:
        size = case["num_bytes"] / 1e9
        lines += [
            "",
            f"## {case['title']}: {case['num_tensors']} tensors, {size:.2f} GB",
            "",
            "| | seconds | of them CPU | GB/s | seconds of `cp` | of `cp` | peak memory, MB "
            "| bar, MB | bars |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for way, title in (("in", "HuggingFace → checkpoint"), ("out", "checkpoint → HuggingFace")):
            each = case[way]
            lines.append(
                f"| {title} | {_seconds(each['seconds'])} | {each['cpu_seconds']:.1f} | "
                f"{each['rate'] / 1e9:.3f} | {_seconds(each['copy_seconds'])} | "
                f"{each['ratio']:.2f} | "
                f"{each['peak_bytes'] / 1e6:.0f} | {each['memory_bar'] / 1e6:.0f} | "
                f"{_word(each['passed'])} |"
            )
        lines.append("")
        for title, each in zip(
            ("the checkpoint", "the folder that came out"), case["verify"], strict=True
        ):
            lines.append(
                f"`verify.py` of the source against {title} ({each['seconds']:.1f} s, peak "
                f"{each['peak_bytes'] / 1e6:.0f} MB): {each['text'][-1]}."
            )
    return "\n".join([*lines, ""])


def _seconds(times: list[float]) -> str:
    return ", ".join(f"{each:.1f}" for each in times)


def _word(passed: bool) -> str:
    return "met" if passed else "**NOT met**"


def main() -> int:
    """Measure, write, judge."""
    parser = argparse.ArgumentParser(description="Weights of the real size in and out.")
    parser.add_argument("--folder", type=Path, required=True, help="on the disk; must not exist")
    parser.add_argument("--output", type=Path, help="write PATH.md and PATH.json")
    parser.add_argument("--small", action="store_true", help="fewer layers; to try it out")
    options = parser.parse_args()
    chosen = SMALL_CASES if options.small else CASES
    free = shutil.disk_usage(options.folder.absolute().parent).free
    needed = 3.2 * max(case.num_bytes for case in chosen)
    if options.folder.exists() or free < needed:
        parser.error(
            f"{options.folder} exists"
            if options.folder.exists()
            else f"{needed / 1e9:.0f} GB are needed, {free / 1e9:.0f} GB are free"
        )
    options.folder.mkdir()
    load = os.getloadavg()[0]
    try:
        cases = [run_case(options.folder, case) for case in chosen]
    finally:
        shutil.rmtree(options.folder)
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    place = (
        f"{platform.machine()}, {cores} cores, {memory:.0f} GB of memory, Python "
        f"{platform.python_version()}, load average {load:.1f} at the start"
    )
    text = as_markdown(cases, place)
    print(text)
    if options.output:
        options.output.with_suffix(".md").write_text(text, encoding="utf-8")
        content = json.dumps({"place": place, "cases": cases}, indent=2, ensure_ascii=False)
        options.output.with_suffix(".json").write_text(content + "\n", encoding="utf-8")
    return 0 if all(case["passed"] for case in cases) else 1


if __name__ == "__main__":
    sys.exit(main())
