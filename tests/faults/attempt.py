"""One attempt at a training that may be killed, as a launcher sees it.

The ranks are forked, so that torch and megatron-core need not be imported again, and run the
command line ``mmlm train``. Unlike with `run_ranks` nothing is expected of them: how they ended is
the result.
"""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkProcess
from pathlib import Path

import torch
import torch.distributed as dist

from mmlm import cli
from tests.distributed.launch import PRELOADED

assert PRELOADED, "imported before the fork"

Fault = Callable[[], None]
"""Called in a rank before the training: plants what will go wrong there."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """How it ended."""

    exit_codes: tuple[int, ...]
    """Of each rank: 0 done, 1 an error, negative: the signal that ended it."""
    output: str
    """What the ranks printed on stderr, rank by rank."""
    seconds_to_end: float
    """Between the first rank's failure and the last rank's end; 0 where none failed."""
    left_behind: tuple[int, ...]
    """Ranks that did not end by themselves."""


def attempt(
    words: Sequence[str],
    world_size: int,
    logs: Path,
    faults: Mapping[int, Fault] | None = None,
    *,
    patience_seconds: float = 90.0,
    on_start: Callable[[list[ForkProcess]], None] | None = None,
) -> Attempt:
    """Run a command of mmlm in forked ranks.

    Args:
        words: of the command line, e.g. ``["train", "--recipe", ...]``.
        world_size: ranks.
        logs: folder for what the ranks print.
        faults: rank -> what is planted there.
        patience_seconds: after the first failure, how long the others may take.
        on_start: is given the processes, to send them signals for instance.
    """
    logs.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("fork")
    # as torchrun does: the store is not in a rank, and outlives them all
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = [
        context.Process(
            target=_rank_main,
            args=(rank, world_size, store.port, words, (faults or {}).get(rank), logs),
        )
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    if on_start is not None:
        on_start(ranks)
    failed_at: float | None = None
    while any(process.is_alive() for process in ranks):
        if failed_at is None and any(process.exitcode not in (0, None) for process in ranks):
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() - failed_at > patience_seconds:
            break
        time.sleep(0.02)
    ended = time.monotonic()
    left_behind = tuple(rank for rank, process in enumerate(ranks) if process.is_alive())
    for process in ranks:
        process.kill()
        process.join()
    return Attempt(
        exit_codes=tuple(int(process.exitcode or 0) for process in ranks),
        output="".join(_log(logs, rank).read_text(errors="replace") for rank in range(world_size)),
        seconds_to_end=0.0 if failed_at is None else ended - failed_at,
        left_behind=left_behind,
    )


def _log(logs: Path, rank: int) -> Path:
    return logs / f"rank_{rank}.txt"


def _rank_main(
    rank: int, world_size: int, port: int, words: Sequence[str], fault: Fault | None, logs: Path
) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
    )
    log = os.open(_log(logs, rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    torch.set_num_threads(1)
    status = 1
    try:
        if fault is not None:
            fault()
        status = cli.main(words)
    except BaseException as error:  # as Python would print it; a rank of torchrun ends with 1
        print(f"[rank {rank}] {type(error).__name__}: {error}", file=sys.stderr)
    finally:
        sys.stderr.flush()
        os._exit(status)
