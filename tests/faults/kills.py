"""Where a rank is killed: a real SIGKILL to itself, at a moment that a seed has drawn."""

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args
from unittest.mock import patch

from mmlm.checkpoint import manifest, shard_writer
from mmlm.train import hf_export, trainer

Moment = Literal["iteration", "writing", "commit", "export"]
"""In the middle of an iteration (forward, backward or update); while a checkpoint is written;
while it is published and old ones are deleted; while a HuggingFace folder is written."""

MOMENTS: tuple[Moment, ...] = get_args(Moment)

WRITE_SECONDS = 0.02
"""Each tensor of a checkpoint takes that much longer, so that training goes on meanwhile."""


@dataclass(frozen=True, kw_only=True)
class Kill:
    """One death."""

    moment: Moment
    rank: int
    """Who dies. Rank 0 alone commits."""
    turn: int
    """In which iteration, save or export of the attempt, from 0."""
    fraction: float
    """How far into it, 0 to 1."""

    def __call__(self) -> None:
        """Plant it in this process."""
        _slow_writing()
        {
            "iteration": _in_iteration,
            "writing": _in_writing,
            "commit": _in_commit,
            "export": _in_export,
        }[self.moment](self)

    def __str__(self) -> str:
        return f"{self.moment}, rank {self.rank}, turn {self.turn}, at {self.fraction:.2f}"


def draw_kills(count: int, world_size: int, seed: int) -> list[Kill]:
    """Draw kills whose moments take turns; everything else is at random.

    Args:
        count: how many.
        world_size: ranks to choose from.
        seed: the same seed draws the same kills; it also says which moment comes first.
    """
    generator = random.Random(seed)
    moments = [MOMENTS[(seed + number) % len(MOMENTS)] for number in range(count)]
    return [
        Kill(
            moment=moment,
            rank=0 if moment == "commit" else generator.randrange(world_size),
            turn=generator.randrange(2),
            fraction=generator.random(),
        )
        for moment in moments
    ]


def slow_writing() -> None:
    """Plant only what every rank needs: writing that takes long."""
    _slow_writing()


def die() -> None:
    """End at once, without a word."""
    os.kill(os.getpid(), signal.SIGKILL)


def _replace(owner: Any, name: str, function: Callable[..., Any]) -> None:
    patch.object(owner, name, function).start()  # until the process ends


def _slow_writing() -> None:
    original = shard_writer._HashedFile.write_tensor

    def write(self: Any, tensor: Any) -> None:
        time.sleep(WRITE_SECONDS)
        original(self, tensor)

    _replace(shard_writer._HashedFile, "write_tensor", write)


def _in_iteration(kill: Kill) -> None:
    original, turn, last = trainer.train_step, -1, 0.3

    def step(*arguments: Any, **options: Any) -> Any:
        nonlocal turn, last
        turn += 1
        if turn == kill.turn:
            threading.Timer(kill.fraction * last, die).start()
        began = time.monotonic()
        result = original(*arguments, **options)
        last = time.monotonic() - began
        return result

    _replace(trainer, "train_step", step)


def _in_writing(kill: Kill) -> None:
    write_file = shard_writer.ShardWriter._write_file
    write_tensor = shard_writer._HashedFile.write_tensor
    turn, left = -1, -1

    def begin(self: Any) -> None:
        nonlocal turn, left
        turn += 1
        left = int(kill.fraction * len(self._items)) if turn == kill.turn else -1
        write_file(self)

    def one(self: Any, tensor: Any) -> None:
        nonlocal left
        if left == 0:
            die()
        left -= 1
        write_tensor(self, tensor)

    _replace(shard_writer.ShardWriter, "_write_file", begin)
    _replace(shard_writer._HashedFile, "write_tensor", one)


_COMMIT_STEPS = 8
"""Calls of the file system in a commit, from the renaming on; files are flushed before."""


def _in_commit(kill: Kill) -> None:
    """Between two calls of the file system that publish a checkpoint or delete an old one."""
    turn, left = -1, -1
    originals = {name: getattr(manifest, name) for name in ("_fsync_tree", "_fsync", "_remove")}

    def stepped(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            if left == 0:
                die()
            left -= 1
            return function(*arguments, **options)

        return call

    def flush(directory: Any) -> None:
        nonlocal turn, left
        originals["_fsync_tree"](directory)
        turn += 1
        if turn == kill.turn:
            left = int(kill.fraction * _COMMIT_STEPS)

    for name in ("_fsync", "_remove"):
        _replace(manifest, name, stepped(originals[name]))
    _replace(manifest.os, "replace", stepped(os.replace))
    _replace(manifest.Path, "rename", stepped(manifest.Path.rename))
    _replace(manifest, "_fsync_tree", flush)


def _in_export(kill: Kill) -> None:
    stream, gather, turn, left = hf_export._stream, hf_export.gather_tensors, -1, -1

    def begin(entries: Any, *arguments: Any) -> Any:
        nonlocal turn, left
        turn += 1
        left = int(kill.fraction * len(entries)) if turn == kill.turn else -1
        return stream(entries, *arguments)

    def one(*arguments: Any) -> Any:
        nonlocal left
        if left == 0:
            die()
        left -= 1
        return gather(*arguments)

    _replace(hf_export, "_stream", begin)
    _replace(hf_export, "gather_tensors", one)
