"""Processes that read, decode and tokenize samples for one rank.

Spawned, not forked: the trainer's process has threads (gloo, CUDA) that a fork would break. They
import neither torch nor megatron, so each starts in a second and holds some 60 MB. Pictures come
back as bytes and are normalised by whoever lays them out: a quarter of the traffic.
"""

import multiprocessing
import os
import signal
import threading
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

from mmlm.data.dataset import Dataset
from mmlm.data.image import ByteArray
from mmlm.data.sample import Sample, load_images, place_of
from mmlm.errors import DataError


@dataclass(frozen=True, kw_only=True)
class UnfinishedSample:
    """A sample whose pictures are not normalised yet."""

    sample: Sample
    """Without pixels."""
    images: ByteArray | None
    """uint8 [k, S, S, 3]; None where pixels are not wanted."""


def build_unfinished(
    dataset: Dataset, sample_id: int, *, seed: int, epoch: int, with_pixels: bool
) -> UnfinishedSample:
    """Do all of a sample that takes long.

    Args:
        dataset: where it comes from.
        sample_id: which.
        seed: seed of the run, for augmentation.
        epoch: from 0, for augmentation.
        with_pixels: decode the pictures.

    Raises:
        DataError: the sample cannot be built; names its place.
    """
    sample = dataset.sample(sample_id, seed=seed, epoch=epoch, with_pixels=False)
    images = None
    if with_pixels:
        images = load_images(
            dataset.record(sample_id),
            dataset.annotation_set(sample_id),
            len(sample.image_ids),
            dataset.settings.image_size,
            sample_id=sample_id,
            seed=seed,
            epoch=epoch,
        )
    return UnfinishedSample(sample=sample, images=images)


class WorkerPool:
    """Processes that build samples, each with its own queue so that a dead one is known by name.

    Args:
        dataset: where samples come from; each process opens the same files.
        num_workers: processes.

    Raises:
        DataError: the machine has no room for their queues.
    """

    def __init__(self, dataset: Dataset, num_workers: int) -> None:
        self._dataset = dataset
        self._workers: list[ProcessPoolExecutor] = []
        self._num_submitted = 0
        context = multiprocessing.get_context("spawn")
        for _ in range(num_workers):
            try:
                worker = ProcessPoolExecutor(
                    1, mp_context=context, initializer=_start, initargs=(dataset,)
                )
            except OSError as error:
                self.close()
                raise DataError(
                    f"cannot start {num_workers} data workers ({error.strerror}): their queues "
                    "need a little of /dev/shm; free some, or set data.num_workers=0"
                ) from error
            self._workers.append(worker)

    def submit(self, sample_id: int, *, seed: int, epoch: int) -> "PendingSample":
        """Hand a sample, with its pictures, to the next worker.

        Args:
            sample_id: which.
            seed: seed of the run, for augmentation.
            epoch: from 0, for augmentation.
        """
        number = self._num_submitted % len(self._workers)
        self._num_submitted += 1
        try:
            future = self._workers[number].submit(_build, sample_id, seed, epoch)
        except BrokenProcessPool as error:
            future = Future()
            future.set_exception(error)
        return PendingSample(self._dataset, sample_id, number, future)

    def close(self) -> None:
        """Drop what is waiting and end the processes."""
        for worker in self._workers:
            worker.shutdown(wait=True, cancel_futures=True)


@dataclass(frozen=True)
class PendingSample:
    """A sample that a worker has been asked for."""

    dataset: Dataset
    sample_id: int
    worker: int
    future: Future[UnfinishedSample]

    def result(self) -> UnfinishedSample:
        """Wait for it.

        Raises:
            DataError: the sample cannot be built, or the worker died of it; names its place.
        """
        try:
            return self.future.result()
        except BrokenProcessPool as error:
            # a worker takes its samples in turn: of those it lost, the first asked for killed it
            record = self.dataset.record(self.sample_id)
            place = place_of(record, self.dataset.annotation_set(self.sample_id))
            raise DataError(
                f"{place}: data worker {self.worker} was killed while it built this sample "
                f"(images {list(record.images)}); if memory ran out, lower data.num_workers or "
                "data.prefetch_iterations, otherwise look at the images"
            ) from error


_own_dataset: list[Dataset] = []
"""The dataset of a worker: put here once, in its own process."""


def _start(dataset: Dataset) -> None:
    """First call in a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's to handle
    parent = multiprocessing.parent_process()
    assert parent is not None, "it was spawned"

    def follow() -> None:
        parent.join()  # also when it was killed and could say nothing
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    _own_dataset.append(dataset)


def _build(sample_id: int, seed: int, epoch: int) -> UnfinishedSample:
    return build_unfinished(_own_dataset[0], sample_id, seed=seed, epoch=epoch, with_pixels=True)
