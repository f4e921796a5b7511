"""A training that is killed again and again, and must not notice.

Each attempt resumes what the one before has left, and is killed in its turn; the last one runs to
the end. After each, every line of metrics.jsonl is the line of an uninterrupted run to the bit, no
complete checkpoint is lost, and all that are there are intact.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmlm.checkpoint.manifest import iterations, resolve
from mmlm.checkpoint.tensor_reader import TensorReader
from mmlm.conversion.convert import hf_to_megatron
from tests.faults.attempt import Attempt, attempt
from tests.faults.kills import Kill, slow_writing
from tests.tiny_data import make_playground, make_tokenizer
from tests.tiny_weights import tiny_llm_config, tiny_vision_config, write_parts

RECIPE = Path(__file__).parents[2] / "examples" / "internvl_v1_2" / "recipe.py"
TRAIN_ITERS = 28
SAVE_INTERVAL = 2
SAVE_TOTAL_LIMIT = 3
EXPORT_INTERVAL = 3


def make_world(folder: Path) -> Path:
    """Weights, tokenizer and pictures that everything here trains on."""
    make_tokenizer(folder / "hf" / "llm")
    write_parts(folder / "hf", tiny_vision_config(), tiny_llm_config(448))
    hf_to_megatron(
        vision=folder / "hf" / "vision", llm=folder / "hf" / "llm", output=folder / "start"
    )
    make_playground(folder / "playground", 40)
    return folder


def train_words(world: Path, output: Path, **settings: Any) -> list[str]:
    """The command line of a training.

    Args:
        world: of `make_world`.
        output: the run's folder.
        **settings: fields, with ``__`` for the dot.
    """
    fields: dict[str, Any] = {
        "output_dir": output,
        "data.meta": world / "playground" / "meta.json",
        "data.seq_length": 128,
        "data.cache_dir": world / "cache",
        "eval_meta": "",
        "train.train_iters": TRAIN_ITERS,
        "train.global_batch_size": 8,
        "train.vision_drop_path_rate": 0.3,
        "train.vision_drop_path_mode": "mask",
        "optimizer.lr": 1e-3,
        "optimizer.adam_eps": 1e-6,
        "checkpoint.load": world / "start",
        "checkpoint.save_interval": SAVE_INTERVAL,
        "checkpoint.save_total_limit": SAVE_TOTAL_LIMIT,
        "checkpoint.export_hf_interval": EXPORT_INTERVAL,
        **{name.replace("__", "."): value for name, value in settings.items()},
    }
    words = ["train", "--recipe", f"{RECIPE}:tiny"]
    for name, value in fields.items():
        words += ["--set", f"{name}={value}"]
    return words


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Of an attempt."""

    tp: int = 1
    pp: int = 1
    dp: int = 1

    @property
    def world_size(self) -> int:
        """Ranks."""
        return self.tp * self.pp * self.dp

    @property
    def settings(self) -> dict[str, Any]:
        """For `train_words`."""
        return {
            "parallel__tensor_model_parallel_size": self.tp,
            "parallel__pipeline_model_parallel_size": self.pp,
        }

    def __str__(self) -> str:
        return f"TP {self.tp} x PP {self.pp} x DP {self.dp}"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one kill led to."""

    kill: Kill
    iterations_before: tuple[str, ...]
    """Complete checkpoints when the attempt began."""
    iterations_after: tuple[str, ...]
    """Complete checkpoints when all ranks had ended."""
    started_at: int
    """Iterations that were done and saved when the attempt began."""
    seconds_to_end: float
    """Between the death and the end of the last rank."""
    problems: tuple[str, ...]
    """What should not be; empty where all is well."""


def run_truth(world: Path, output: Path, layout: Layout) -> None:
    """Train without a fault, and keep every checkpoint."""
    words = train_words(world, output, **layout.settings, checkpoint__save_total_limit=0)
    ended = attempt(words, layout.world_size, output.with_name(f"{output.name}_logs"))
    assert set(ended.exit_codes) == {0}, ended.output


def run_campaign(
    world: Path, folder: Path, kills: Sequence[Kill], layouts: Sequence[Layout], truth: Path
) -> list[Outcome]:
    """Train in `folder`, die as often as there are kills, and finish.

    Args:
        world: of `make_world`.
        folder: new; gets the run.
        kills: one an attempt.
        layouts: of the attempts, in turns. With one, everything is compared to the bit; with
            several, curves to `TOLERANCE`.
        truth: of `run_truth`, in the first layout.
    """
    output, outcomes, exact = folder / "run", [], len(layouts) == 1
    for number, kill in enumerate(kills):
        layout = layouts[number % len(layouts)]
        words = train_words(world, output, **layout.settings)
        before, start = _complete(output), _newest(output)
        faults = dict.fromkeys(range(layout.world_size), slow_writing) | {kill.rank: kill}
        ended = attempt(words, layout.world_size, folder / f"logs_{number}", faults)
        after = _complete(output)
        problems = [
            *_problems_of_start(ended.output, start),
            *_problems_of_death(ended, kill),
            *_problems_of_checkpoints(output, before, after),
            *(_problems_of_weights(output, truth) if exact else ()),
            *_problems_of_curve(output, truth, exact=exact),
        ]
        outcomes.append(
            Outcome(
                kill=kill,
                iterations_before=before,
                iterations_after=after,
                started_at=start,
                seconds_to_end=ended.seconds_to_end,
                problems=tuple(problems),
            )
        )
    start = _newest(output)
    printed = finish(world, output, layouts[len(kills) % len(layouts)], truth, exact=exact)
    problems = _problems_of_start(printed, start)
    if problems:
        raise AssertionError("\n".join(problems))
    return outcomes


def finish(world: Path, output: Path, layout: Layout, truth: Path, *, exact: bool = True) -> str:
    """Train to the end without a fault, and compare with the uninterrupted run.

    Returns:
        What the ranks printed.

    Raises:
        AssertionError: where anything differs.
    """
    words = train_words(world, output, **layout.settings)
    ended = attempt(words, layout.world_size, output.with_name(f"{output.name}_last_logs"))
    problems = [] if set(ended.exit_codes) == {0} else [f"the last attempt failed: {ended.output}"]
    problems += _problems_of_curve(output, truth, complete=True, exact=exact)
    problems += _problems_of_weights(output, truth) if exact else ()
    if problems:
        raise AssertionError("\n".join(problems))
    return ended.output


def _complete(output: Path) -> tuple[str, ...]:
    return tuple(each.name for each in iterations(output / "checkpoints"))


def _newest(output: Path) -> int:
    """Iterations that are saved, whether or not a kill came before `latest` was replaced."""
    complete = _complete(output)
    return int(complete[-1].removeprefix("iter_")) if complete else 0


def _problems_of_start(printed: str, wanted: int) -> list[str]:
    """The run says from which iteration it goes on: the newest that was saved."""
    found = re.search(r"^start .*, iteration (\d+)$", printed, flags=re.MULTILINE)
    if found is None:
        return [f"it did not say where it began:\n{printed}"]
    began = int(found[1])
    return [] if began == wanted else [f"it began at iteration {began}, not at {wanted}"]


def _problems_of_death(ended: Attempt, kill: Kill) -> list[str]:
    problems = []
    if ended.exit_codes[kill.rank] != -9:
        problems.append(f"the rank was not killed: {ended.exit_codes}\n{ended.output}")
    if ended.left_behind:
        problems.append(f"ranks {ended.left_behind} did not end\n{ended.output}")
    if any(code == 0 for code in ended.exit_codes):
        problems.append(f"a rank took it for success: {ended.exit_codes}")
    return problems


def _problems_of_checkpoints(
    output: Path, before: Sequence[str], after: Sequence[str]
) -> list[str]:
    """Those that were there are there, or were deleted for enough newer ones; all can be used."""
    problems = []
    for name in before:
        newer = [each for each in after if each > name]
        if name not in after and len(newer) < SAVE_TOTAL_LIMIT:
            problems.append(f"{name} was lost; there are {after}")
    if after and resolve(output / "checkpoints").name not in after[-2:]:
        problems.append(f"latest is {resolve(output / 'checkpoints').name} of {after}")
    return problems


LINE = ("iteration", "loss", "grad_norm", "learning_rate", "consumed_samples", "num_tokens")
"""Of a line of metrics.jsonl, what does not depend on the machine."""

TOLERANCE = 1e-6
"""Of losses and norms between layouts, relative."""


def _problems_of_curve(
    output: Path, truth: Path, *, complete: bool = False, exact: bool = True
) -> list[str]:
    """Every line, and in the end all of them, as in the uninterrupted run."""
    wanted, found = read_curve(truth), read_curve(output)
    problems = [
        f"iteration {line['iteration']}: {name} is {line[name]}, not {right[name]}"
        for line, right in zip(found, wanted, strict=False)
        for name in LINE
        if not abs(line[name] - right[name]) <= (0.0 if exact else TOLERANCE * abs(right[name]))
    ]
    if complete and len(found) != len(wanted):
        problems.append(f"{len(found)} iterations of {len(wanted)}")
    return problems


def read_curve(output: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; one that a kill has cut short is left out."""
    file = output / "metrics.jsonl"
    text = file.read_text("utf-8") if file.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _problems_of_weights(output: Path, truth: Path) -> list[str]:
    """Every checkpoint that is left holds what the uninterrupted run had then, to the bit."""
    problems = []
    for directory in iterations(output / "checkpoints"):
        found, wanted = (
            TensorReader(directory),
            TensorReader(truth / "checkpoints" / directory.name),
        )
        if found.infos != wanted.infos:
            problems.append(f"{directory.name}: other tensors")
        problems += [
            f"{directory.name}: {key} differs"
            for key in wanted.infos
            if not torch.equal(found.read(key), wanted.read(key))
        ]
    return problems
