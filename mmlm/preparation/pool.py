"""One function over many items, in several processes."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from mmlm.errors import DataError

Item = TypeVar("Item")
Result = TypeVar("Result")


def default_workers() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0))


def map_unordered(
    function: Callable[[Item], Result], items: Sequence[Item], *, workers: int
) -> Iterator[Result]:
    """Yield the result of each item as it is ready.

    Args:
        function: of a module, so that processes find it.
        items: large enough that a process is worth it; each goes to a process on its own.
        workers: processes; with 1, or one item, all is done in this one.

    Raises:
        DataError: a process died; also whatever ``function`` raises.
    """
    num_processes = min(workers, len(items))
    if num_processes < 2:
        yield from map(function, items)
        return
    # Spawned: a fork would copy the threads of whatever imported this.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, mp_context=context) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            raise DataError(
                "a process was killed (out of memory?); lower --workers from "
                f"{workers} and run the same command again: it continues"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
