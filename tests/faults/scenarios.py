"""Faults other than deaths, each planted in a real run that must get over it or say what is wrong.

A scenario trains in `folder`, gives what was seen, and ends with a run to the end that equals the
uninterrupted one to the bit.
"""

import errno
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import count
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

from mmlm.checkpoint import manifest, shard_writer
from mmlm.checkpoint.manifest import iterations
from mmlm.data.loader import BatchLoader
from mmlm.data.sample import MAX_IMAGES_PER_SAMPLE
from mmlm.train import hf_export, trainer
from mmlm.train.run_guard import WAIT_SECONDS
from mmlm.train.stop import REPEAT_SECONDS
from tests.faults.attempt import Attempt, attempt
from tests.faults.campaign import SAVE_TOTAL_LIMIT, Layout, finish, read_curve, train_words
from tests.faults.kills import Kill

LAYOUT = Layout(tp=2, pp=2)


@dataclass(frozen=True, kw_only=True)
class World:
    """What every scenario starts from."""

    data: Path
    """Of `make_world`."""
    truth: Path
    """Of `run_truth` in `LAYOUT`."""
    folder: Path
    """New; the scenario's own."""

    def words(self, **settings: Any) -> list[str]:
        """The command line of the scenario's run."""
        return train_words(self.data, self.run, **LAYOUT.settings, **settings)

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self.folder / "run"

    def attempt(self, words: list[str], **options: Any) -> Attempt:
        """Run a command in all ranks."""
        number = len(list(self.folder.glob("logs_*")))
        return attempt(words, LAYOUT.world_size, self.folder / f"logs_{number}", **options)

    def finish(self) -> str:
        """See `campaign.finish`."""
        return finish(self.data, self.run, LAYOUT, self.truth)


def _must(holds: bool, ended: Attempt, what: str) -> None:
    if not holds:
        raise AssertionError(f"{what}; exit codes {ended.exit_codes}\n{ended.output}")


def _has_line(ended: Attempt, *words: str) -> bool:
    return any(all(word in line for word in words) for line in ended.output.splitlines())


# Full disks


def disk_full_in_tensors(world: World) -> str:
    """ENOSPC while rank 1 writes its tensors."""
    return _disk_full(world, 1, shard_writer._HashedFile, "write_tensor", skip=9)


def disk_full_in_manifest(world: World) -> str:
    """ENOSPC while rank 0 writes the manifest."""
    return _disk_full(world, 0, manifest, "write_manifest_json", skip=1)


def disk_full_in_renaming(world: World) -> str:
    """ENOSPC when rank 0 gives the checkpoint its name."""
    return _disk_full(world, 0, manifest.Path, "rename", skip=1)


def disk_full_in_export(world: World) -> str:
    """ENOSPC while rank 0 writes a HuggingFace folder."""
    _disk_full(world, 0, hf_export, "write_small_files", skip=1)
    folders = sorted(each.name for each in (world.run / "hf").iterdir())
    assert len(folders) == SAVE_TOTAL_LIMIT and all(name.startswith("iter_") for name in folders)
    return "the run goes on, the next export succeeds, nothing half-written is left"


def _disk_full(world: World, rank: int, owner: Any, name: str, skip: int) -> str:
    def fault() -> None:
        original, calls = getattr(owner, name), 0

        def full(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == skip + 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(*arguments, **options)

        patch.object(owner, name, full).start()

    ended = world.attempt(world.words(), faults={rank: fault})
    _must(set(ended.exit_codes) == {0}, ended, "the run did not survive a full disk")
    _must(_has_line(ended, "No space left"), ended, "nothing was said of the full disk")
    leftovers = list((world.run / "checkpoints").glob(".iter_*"))
    _must(not leftovers, ended, f"{leftovers} were left")
    world.finish()
    return "the run goes on, the next save succeeds, nothing half-written is left"


# Damaged files


def flipped_byte(world: World) -> str:
    """One byte in the middle of the newest checkpoint's largest file is changed."""

    def damage(file: Path) -> None:
        with file.open("r+b") as stream:
            stream.seek(file.stat().st_size // 2)
            byte = stream.read(1)[0]
            stream.seek(-1, os.SEEK_CUR)
            stream.write(bytes([byte ^ 0x01]))

    return _damaged(world, damage)


def truncated_file(world: World) -> str:
    """The newest checkpoint's largest file loses its second half."""
    return _damaged(world, lambda file: os.truncate(file, file.stat().st_size // 2))


def missing_file(world: World) -> str:
    """The newest checkpoint's largest file is deleted."""
    return _damaged(world, Path.unlink)


def _damaged(world: World, damage: Callable[[Path], None]) -> str:
    killed = world.attempt(
        world.words(), faults={2: Kill(moment="iteration", rank=2, turn=9, fraction=0.5)}
    )
    *_, before, newest = iterations(world.run / "checkpoints")
    file = max(newest.glob("*.distcp"), key=lambda each: each.stat().st_size)
    _must(killed.exit_codes[2] == -9, killed, "rank 2 was not killed")
    damage(file)
    output = world.finish()
    for word in (file.name, newest.name, before.name):
        assert word in output, f"{word} is not named:\n{output}"
    return "found on resume, named, and passed over for the newest intact one"


# Bad numbers

SAMPLE = 5
"""With a picture."""


def poisoned_sample(world: World) -> str:
    """NaN in the pixels of one sample; the run is told to stop at the first bad iteration."""
    words = world.words(train__max_nonfinite_iterations=1)
    ended = world.attempt(words, faults=dict.fromkeys(range(LAYOUT.world_size), _poison))
    _must(set(ended.exit_codes) == {1}, ended, "it did not stop")
    (file,) = world.run.glob("nonfinite_iteration_*.json")
    dump = json.loads(file.read_text(encoding="utf-8"))
    found = {sample["sample_id"] for sample in dump["samples"]}
    _must(found == {SAMPLE}, ended, f"{file} names {found}")
    world.finish()
    return f"stops, names sample {SAMPLE}, the rank and the layer, and nothing bad was saved"


def poisoned_sample_skipped(world: World) -> str:
    """NaN in the pixels of one sample in one iteration."""
    ended = world.attempt(
        world.words(), faults=dict.fromkeys(range(LAYOUT.world_size), partial(_poison, once=True))
    )
    _must(set(ended.exit_codes) == {0}, ended, "it did not go on")
    losses = [line["loss"] for line in read_curve(world.run)]
    _must(losses.count(None) == 1, ended, f"losses {losses}")
    return "that update is skipped on all ranks, the run goes on to its end"


def _poison(*, once: bool = False) -> None:
    original = BatchLoader._make

    def make(self: Any, plan: Any, *arguments: Any) -> Any:
        batch = original(self, plan, *arguments)
        images = batch.image_ids // MAX_IMAGES_PER_SAMPLE == SAMPLE
        if images.any() and batch.pixel_values is not None and not (once and plan.epoch):
            batch.pixel_values[images] = float("nan")
        return batch

    patch.object(BatchLoader, "_make", make).start()


# Signals


def sigterm(world: World) -> str:
    """SIGTERM to one rank."""
    return _stopped(world, signal.SIGTERM)


def sigusr1(world: World) -> str:
    """SIGUSR1 to one rank, as Slurm warns."""
    return _stopped(world, signal.SIGUSR1)


def _stopped(world: World, number: signal.Signals) -> str:
    ended = world.attempt(
        world.words(), on_start=_later(world.run, lambda ranks: os.kill(ranks[3].pid, number))
    )
    _must(set(ended.exit_codes) == {0}, ended, "a stop is no failure")
    done = len(read_curve(world.run))
    newest = iterations(world.run / "checkpoints")[-1].name
    _must(newest == f"iter_{done:07d}", ended, f"saved {newest} after {done} iterations")
    _must((world.run / "stopped.json").is_file(), ended, "there is no marker")
    world.finish()
    assert not (world.run / "stopped.json").exists(), "the marker was left"
    return "the iteration is finished and saved, exit 0 with a marker"


def second_signal(world: World) -> str:
    """SIGTERM twice."""

    def twice(ranks: list[ForkProcess]) -> None:
        os.kill(ranks[0].pid or 0, signal.SIGTERM)
        time.sleep(REPEAT_SECONDS + 0.5)  # sooner, it would be the first one told again
        os.kill(ranks[0].pid or 0, signal.SIGTERM)

    ended = world.attempt(
        world.words(),
        faults={0: partial(_long_iteration, 30.0)},
        on_start=_later(world.run, twice, num_lines=5),
    )
    _must(ended.exit_codes[0] != 0 and not ended.left_behind, ended, "it did not end at once")
    world.finish()
    return "ends at once, not with 0"


def _long_iteration(seconds: float) -> None:
    original, turns = trainer.train_step, count()

    def step(*arguments: Any, **options: Any) -> Any:
        if next(turns) == 5:
            time.sleep(seconds)
        return original(*arguments, **options)

    patch.object(trainer, "train_step", step).start()


def _later(
    run: Path, action: Callable[[list[ForkProcess]], None], num_lines: int = 3
) -> Callable[[list[ForkProcess]], None]:
    """Do something when the run has done some iterations."""

    def wait(ranks: list[ForkProcess]) -> None:
        while len(read_curve(run)) < num_lines and any(rank.is_alive() for rank in ranks):
            time.sleep(0.02)
        action(ranks)

    return lambda ranks: threading.Thread(target=wait, args=(ranks,), daemon=True).start()


# Hangs


def stopped_rank(world: World) -> str:
    """SIGSTOP to one rank, so that it neither dies nor answers."""
    ended = world.attempt(
        world.words(parallel__timeout_minutes=0.25),
        on_start=_later(world.run, lambda ranks: os.kill(ranks[2].pid, signal.SIGSTOP)),
        patience_seconds=10.0,
    )
    _must(ended.left_behind == (2,), ended, "only the stopped rank may be left")
    _must(_has_line(ended, "rank 2"), ended, "nobody says that it was rank 2")
    world.finish()
    return "the others end and name the rank and where it was"


def second_launch(world: World) -> str:
    """The same command a second time, while the first runs."""
    found: list[Attempt] = []

    def again(_: list[ForkProcess]) -> None:
        found.append(world.attempt(world.words()))

    first = world.attempt(
        world.words(),
        faults={0: partial(_long_iteration, 2 * WAIT_SECONDS)},
        on_start=_later(world.run, again, num_lines=1),
    )
    (second,) = found
    _must(0 not in second.exit_codes, second, "the second was not refused")
    _must(set(first.exit_codes) == {0}, first, "the first was disturbed")
    world.finish()
    return "refused with the holder's host and process; the first is not disturbed"


SCENARIOS: tuple[Callable[[World], str], ...] = (
    disk_full_in_tensors,
    disk_full_in_manifest,
    disk_full_in_renaming,
    disk_full_in_export,
    flipped_byte,
    truncated_file,
    missing_file,
    poisoned_sample,
    poisoned_sample_skipped,
    sigterm,
    sigusr1,
    second_signal,
    stopped_rank,
    second_launch,
)
