"""Builds the length indexes of all sets: in parallel, and from where a killed build got to.

Every picture is decoded as well, so that broken data is known before training starts. The result
does not depend on the number of processes.
"""

import multiprocessing
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mmlm.data.annotation import AnnotationSet, file_stamp, scan_lines
from mmlm.data.index_progress import ProgressFile
from mmlm.data.ledger import LedgerEntry
from mmlm.data.length_index import (
    INDEX_DTYPE,
    Rows,
    SetIndex,
    index_path,
    load_index,
    write_index,
)
from mmlm.data.measuring import Chunk, Measured, measure_chunk, start_worker
from mmlm.data.rejection import Reason
from mmlm.data.sample import SampleSettings
from mmlm.data.tokenizer import Tokenizer
from mmlm.errors import DataError
from mmlm.log import get_logger

_CHUNK = 64
_AHEAD = 3  # chunks a process that are handed out, so that none waits for the next
_MIN_RECORDS_PER_PROCESS = 512  # below this, starting a process costs more than it saves

RESUME_HOURS = 6
"""What was measured by a build that stopped longer ago is not taken when all is asked for again:
pictures may have changed since."""


@dataclass(frozen=True, kw_only=True)
class Build:
    """The indexes of all sets, and what a build that was stopped has given to them."""

    indexes: list[SetIndex]
    """In the order of the sets."""
    num_resumed: int
    """Records that were not measured now, but by a build that was stopped."""
    stopped_at: float | None
    """When that one stopped, the earliest if there are several, seconds since 1970."""


def build_indexes(
    sets: Sequence[AnnotationSet],
    tokenizer: Tokenizer,
    settings: SampleSettings,
    cache_dir: Path,
    *,
    num_workers: int = 1,
    again: bool = False,
) -> list[SetIndex]:
    """Return the kept index of each set, or measure its records and keep the result.

    What a killed build has measured is kept as well, and not measured again. Records that were
    left out because of a picture are always looked at again, since mending a picture does not
    change the annotation file. Called by one process at a time.

    Args:
        sets: in the order of the result.
        tokenizer: of the language model.
        settings: lengths and sizes.
        cache_dir: where indexes are kept; made if missing.
        num_workers: processes that measure.
        again: measure everything, also where there is an index. What a killed build has
            measured is then taken only if it stopped in the last `RESUME_HOURS`.

    Raises:
        DataError: a set has no record, an annotation file changed meanwhile, a process was killed,
            or the cache cannot be written.
    """
    return run_build(
        sets, tokenizer, settings, cache_dir, num_workers=num_workers, again=again
    ).indexes


def run_build(
    sets: Sequence[AnnotationSet],
    tokenizer: Tokenizer,
    settings: SampleSettings,
    cache_dir: Path,
    *,
    num_workers: int,
    again: bool,
) -> Build:
    """As `build_indexes`; says as well what was taken from a build that was stopped."""
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        jobs = [_Job(entry, tokenizer, settings, cache_dir, again=again) for entry in sets]
        _do(jobs, tokenizer, num_workers)
        stops = [job.stopped_at for job in jobs if job.stopped_at is not None]
        return Build(
            indexes=[job.finish() for job in jobs],
            num_resumed=sum(job.num_resumed for job in jobs),
            stopped_at=min(stops, default=None),
        )
    except OSError as error:
        raise DataError(
            f"{error.filename or cache_dir}: cannot keep the length index ({error.strerror}); "
            "free the disk, or set data.cache_dir to another folder"
        ) from error


def build_index(
    annotation_set: AnnotationSet,
    tokenizer: Tokenizer,
    settings: SampleSettings,
    cache_dir: Path,
    *,
    num_workers: int = 1,
    again: bool = False,
) -> SetIndex:
    """Return the index of one set; as `build_indexes`."""
    return build_indexes(
        [annotation_set], tokenizer, settings, cache_dir, num_workers=num_workers, again=again
    )[0]


def _do(jobs: Sequence["_Job"], tokenizer: Tokenizer, num_workers: int) -> None:
    """Measure what the jobs lack."""
    owners = [(job, chunk) for job in jobs for chunk in job.chunks()]
    if not owners:
        return
    chunks = [chunk for _, chunk in owners]
    total = sum(job.num_records for job in {job for job, _ in owners})
    left = sum(len(chunk.rows) for chunk in chunks)
    with tqdm(total=total, initial=total - left, desc="measure", unit="sample") as bar:
        for number, measured in _measure_all(chunks, tokenizer, num_workers):
            job = owners[number][0]
            job.take(measured)
            bar.set_postfix_str(job.annotation_set.name, refresh=False)
            bar.update(len(measured.rows))


class _Job:
    """The index of one set while it is made."""

    def __init__(
        self,
        annotation_set: AnnotationSet,
        tokenizer: Tokenizer,
        settings: SampleSettings,
        cache_dir: Path,
        *,
        again: bool,
    ) -> None:
        self.annotation_set = annotation_set
        self._tokenizer, self._settings, self._cache_dir = tokenizer, settings, cache_dir
        self._stamp = file_stamp(annotation_set.annotation)
        self._path = index_path(annotation_set, tokenizer, settings, cache_dir)
        self._progress = ProgressFile(self._path.with_suffix(".partial"))
        kept = None if again else load_index(annotation_set, tokenizer, settings, cache_dir)
        if kept is None:
            self._rows = _used_lines(annotation_set)
            self._pending = np.ones(len(self._rows), dtype=np.bool_)
            self._entries: list[LedgerEntry] = []
        else:
            broken = _lines_with_broken_images(kept.exclusions())
            self._rows = kept.rows.copy() if broken else kept.rows
            self._pending = np.isin(self._rows["line"], broken)
            others = set(broken)
            self._entries = [e for e in kept.ledger() if e.line not in others] if broken else []
        self.num_resumed = 0
        self.stopped_at: float | None = None
        if not self._pending.any():
            return
        self._resume(again=again)
        if not self._pending.any():  # killed after the last chunk
            self._keep()

    def _resume(self, *, again: bool) -> None:
        """Take what a build that was stopped has measured."""
        stopped_at = self._progress.stopped_at()
        if stopped_at is None:
            return
        if again and time.time() - stopped_at > RESUME_HOURS * 3600:
            self._progress.remove()
            return
        num_pending = np.count_nonzero(self._pending)
        for measured in self._progress.read():
            self._put(measured, skip=_lines_with_broken_images(measured.entries))
        self.num_resumed = int(num_pending - np.count_nonzero(self._pending))
        self.stopped_at = stopped_at if self.num_resumed else None

    @property
    def num_records(self) -> int:
        """Records of the set."""
        return len(self._rows)

    def chunks(self) -> list[Chunk]:
        """What is left to do."""
        places = np.flatnonzero(self._pending)
        return [
            Chunk(
                annotation_set=self.annotation_set,
                stamp=self._stamp,
                tokenizer_folder=self._tokenizer.folder,
                settings=self._settings,
                rows=self._rows[places[start : start + _CHUNK]],
            )
            for start in range(0, len(places), _CHUNK)
        ]

    def take(self, measured: Measured) -> None:
        """Put a chunk in its place and on the disk; keep the index when it was the last."""
        self._progress.append(measured)
        self._put(measured)
        if not self._pending.any():
            self._keep()

    def finish(self) -> SetIndex:
        """Return the complete index."""
        index = load_index(self.annotation_set, self._tokenizer, self._settings, self._cache_dir)
        if index is None:
            raise DataError(
                f"{self.annotation_set.annotation}: the annotation file changed while it was "
                "measured; start again"
            )
        return index

    def _put(self, measured: Measured, skip: Sequence[int] = ()) -> None:
        rows = measured.rows[~np.isin(measured.rows["line"], skip)]
        places = np.searchsorted(self._rows["line"], rows["line"])
        wanted = self._pending[places]
        rows, places = rows[wanted], places[wanted]
        self._rows[places] = rows
        self._pending[places] = False
        lines = set(rows["line"].tolist())
        self._entries += [entry for entry in measured.entries if entry.line in lines]

    def _keep(self) -> None:
        self._entries.sort(key=lambda entry: entry.line)
        write_index(self._path, self._rows, self._entries)
        self._progress.remove()


def _used_lines(annotation_set: AnnotationSet) -> Rows:
    offsets, lines = scan_lines(annotation_set.annotation)
    used = annotation_set.num_used(len(offsets))
    if used == 0:
        raise DataError(
            f"{annotation_set.annotation}: set '{annotation_set.name}' gives no record "
            f"({len(offsets)} in the file, repeat_time {annotation_set.repeat_time}); fill it or "
            "remove the set from the meta json"
        )
    promised = annotation_set.length
    if promised is not None and promised not in (len(offsets), used):
        get_logger(__name__).warning(
            "%s: %d records, but the meta json promises %d for set '%s'; is the download complete?",
            annotation_set.annotation,
            len(offsets),
            promised,
            annotation_set.name,
        )
    rows: Rows = np.zeros(used, dtype=INDEX_DTYPE)
    rows["offset"], rows["line"] = offsets[:used], lines[:used]
    return rows


def _lines_with_broken_images(entries: Iterable[LedgerEntry]) -> list[int]:
    return [entry.line for entry in entries if entry.reason == Reason.IMAGE_UNREADABLE]


def _measure_all(
    chunks: Sequence[Chunk], tokenizer: Tokenizer, num_workers: int
) -> Iterator[tuple[int, Measured]]:
    """Yield the number of each chunk and what was found, in the order in which they are done."""
    num_records = sum(len(chunk.rows) for chunk in chunks)
    num_processes = min(num_workers, num_records // _MIN_RECORDS_PER_PROCESS)
    if num_processes < 2:
        for number, chunk in enumerate(chunks):
            yield number, measure_chunk(chunk, tokenizer)
        return
    # Spawned, not forked: the trainer's process has threads (gloo, CUDA) that a fork would break.
    context = multiprocessing.get_context("spawn")
    running: dict[Future[Measured], int] = {}
    todo = iter(range(len(chunks)))
    try:
        with ProcessPoolExecutor(num_processes, context, start_worker) as pool:
            while True:
                free = num_processes * _AHEAD - len(running)
                running |= {
                    pool.submit(measure_chunk, chunks[number]): number
                    for number in islice(todo, free)
                }
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    measured = future.result()
                    yield running.pop(future), measured
    except BrokenProcessPool as error:
        first = chunks[min(running.values())]
        lines = first.rows["line"]
        raise DataError(
            f"a process that measured set '{first.annotation_set.name}' was killed (out of "
            f"memory?), at or soon after {first.annotation_set.annotation}:{lines[0]}; lower "
            f"data.num_workers from {num_workers}; what was measured before is kept"
        ) from error
