"""Run a function on several gloo ranks: torch and megatron-core are imported once, then forked.

Eight ranks start in about a second instead of fifty, because importing takes six seconds of
processor time each.
"""

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func

# imported before the fork, so that the children need not
PRELOADED = (parallel_state, get_megatron_optimizer, get_forward_backward_func)


class RankFailure(AssertionError):
    """A rank raised; the message holds the tracebacks of all that did."""


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, timeout_seconds: float = 120.0
) -> list[Any]:
    """Call ``function(*args)`` on every rank of a gloo world and return what each returned.

    Args:
        world_size: number of ranks.
        function: finds its rank through torch.distributed.
        *args: handed to every rank.
        timeout_seconds: after which all ranks are killed.

    Returns:
        One (pickled) result a rank.

    Raises:
        RankFailure: if a rank raised, died or did not end in time.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_rank_main, args=(rank, world_size, folder, function, args))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        deadline = time.monotonic() + timeout_seconds
        while any(p.is_alive() for p in ranks) and time.monotonic() < deadline:
            if any(p.exitcode not in (0, None) for p in ranks):
                deadline = min(deadline, time.monotonic() + 5.0)
            time.sleep(0.02)
        late = [rank for rank, process in enumerate(ranks) if process.is_alive()]
        for process in ranks:
            process.kill()
            process.join()
        return _collect(Path(folder), world_size, late)


@contextmanager
def group_of_one() -> Iterator[None]:
    """A default process group with this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _collect(folder: Path, world_size: int, late: list[int]) -> list[Any]:
    results, failures = [], []
    for rank in range(world_size):
        file = folder / f"result_{rank}"
        if not file.exists():
            failures.append(f"rank {rank}: {'killed' if rank in late else 'died'} without a result")
            continue
        succeeded, value = pickle.loads(file.read_bytes())
        if succeeded:
            results.append(value)
        else:
            failures.append(f"rank {rank}:\n{value}")
    if failures:
        raise RankFailure("\n".join(failures))
    return results


def _rank_main(
    rank: int, world_size: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    try:
        store = dist.FileStore(f"{folder}/store", world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        outcome = (True, function(*args))
    except BaseException:
        outcome = (False, traceback.format_exc())
    temporary = Path(folder, f"unfinished_{rank}")
    temporary.write_bytes(pickle.dumps(outcome))
    temporary.rename(Path(folder, f"result_{rank}"))
    # skip atexit handlers and destructors of the forked parent's objects
    os._exit(0 if outcome[0] else 1)
