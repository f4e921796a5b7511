"""Processes that decode pictures for one rank.

Spawned, not forked: the trainer's process has threads (gloo, CUDA) that a fork would break. They
import neither torch nor megatron, so each starts in a second and holds some 60 MB. Pictures come
back as bytes and are normalised by whoever lays them out: a quarter of the traffic. They travel
through a pipe, sent by a thread of the worker while it decodes the next; nothing is kept in
/dev/shm, which is small in containers.
"""

import multiprocessing
import os
import queue
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection

import numpy as np

from mmlm.data.dataset import Dataset
from mmlm.data.image import ByteArray
from mmlm.data.sample import load_images, place_of
from mmlm.errors import DataError, MmlmError

_MAX_SENT = 4
"""Samples that a worker is asked about before it has answered; the rest wait in this process."""


_TRAINERS_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Ctrl-C and requests to stop are the trainer's to handle; it ends its workers by SIGKILL."""

Pictures = tuple[ByteArray, ...]
"""uint8 [S, S, 3] each: the pictures of a sample before normalising."""

_Job = tuple[int, int, int, int]
"""Sample id, pictures, seed, epoch."""


def decode(dataset: Dataset, sample_id: int, num_images: int, seed: int, epoch: int) -> Pictures:
    """Decode, augment and squash the pictures of a sample.

    Args:
        dataset: where it comes from; its table is not looked at.
        sample_id: which.
        num_images: how many of its pictures are left after the cut, as the plan was made with.
        seed: seed of the run, for augmentation.
        epoch: from 0, for augmentation.

    Raises:
        DataError: a picture does not decode; names set, file and line.
    """
    return load_images(
        dataset.record(sample_id),
        dataset.annotation_set(sample_id),
        num_images,
        dataset.settings.image_size,
        sample_id=sample_id,
        seed=seed,
        epoch=epoch,
    )


class WorkerPool:
    """Processes that decode the pictures of samples.

    Args:
        dataset: where samples come from; each process opens the same files.
        num_workers: processes.

    Raises:
        DataError: the machine has no room for them.
    """

    def __init__(self, dataset: Dataset, num_workers: int) -> None:
        self._workers: list[_Worker] = []
        self._num_submitted = 0
        for number in range(num_workers):
            try:
                self._workers.append(_Worker(dataset, number))
            except OSError as error:
                self.close()
                raise DataError(
                    f"cannot start {num_workers} data workers ({error.strerror}): lower "
                    "data.num_workers, or set it to 0 to decode in the trainer's process"
                ) from error

    def submit(self, sample_id: int, num_images: int, seed: int, epoch: int) -> Future[Pictures]:
        """Ask the next worker for the pictures of a sample.

        Args:
            sample_id: which.
            num_images: see `decode`.
            seed: seed of the run, for augmentation.
            epoch: from 0, for augmentation.

        Returns:
            The pictures to be; a DataError where one does not decode or the worker died of it.
        """
        worker = self._workers[self._num_submitted % len(self._workers)]
        self._num_submitted += 1
        return worker.submit((sample_id, num_images, seed, epoch))

    def close(self) -> None:
        """End the processes at once; what they had to do is dropped."""
        for worker in self._workers:
            worker.close()


class _Worker:
    """One process, and the thread here that receives what it sends; answers come in order."""

    def __init__(self, dataset: Dataset, number: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._dataset = dataset
        self._number = number
        self._lock = threading.Lock()
        self._asked: deque[tuple[_Job, Future[Pictures]]] = deque()
        self._num_sent = 0  # of those asked
        self._is_dead = False
        self._at_work_on: int | None = None  # the sample that was begun last, as far as is known
        self._begun, theirs_begun = context.Pipe(duplex=False)
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, theirs_begun, dataset), daemon=True
        )
        with _signals_held_back():  # torchrun sends its own to the whole group of processes
            self._process.start()
        theirs.close()  # so that its death is the end of the pipe
        theirs_begun.close()
        self._thread = threading.Thread(target=self._receive, daemon=True)
        self._thread.start()

    def submit(self, job: _Job) -> Future[Pictures]:
        future: Future[Pictures] = Future()
        with self._lock:
            if self._is_dead:
                future.set_exception(self._obituary())
            else:
                self._asked.append((job, future))
                self._send()
        return future

    def close(self) -> None:
        self._process.kill()
        self._process.join()
        self._thread.join()
        self._connection.close()
        self._begun.close()

    def _send(self) -> None:
        while self._num_sent < min(_MAX_SENT, len(self._asked)):
            try:
                self._connection.send(self._asked[self._num_sent][0])
            except OSError:
                return  # it is dead: the receiver will notice
            self._num_sent += 1

    def _receive(self) -> None:
        """Hand on what the process sends, until it ends; nobody is left waiting, whatever fails."""
        failure: BaseException | None = None
        try:
            while True:
                self._receive_one()
        except (EOFError, OSError):  # the process ended
            self._process.join()
            self._look_what_was_begun()
        except BaseException as error:
            failure = error
            self._process.kill()
        finally:
            with self._lock:
                self._is_dead = True
                asked, self._asked = self._asked, deque()
            for _, future in asked:
                future.set_exception(failure or self._obituary())

    def _receive_one(self) -> None:
        outcome = self._connection.recv()
        self._look_what_was_begun()
        if not isinstance(outcome, BaseException):
            outcome = tuple(self._receive_image(shape) for shape in outcome)
        with self._lock:
            _, future = self._asked.popleft()
            self._num_sent -= 1
            self._send()
        if isinstance(outcome, BaseException):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)

    def _receive_image(self, shape: tuple[int, ...]) -> ByteArray:
        return np.frombuffer(self._connection.recv_bytes(), dtype=np.uint8).reshape(shape)

    def _look_what_was_begun(self) -> None:
        try:
            while self._begun.poll():
                self._at_work_on = self._begun.recv()
        except (EOFError, OSError):
            return  # it has ended, and all that it said was read

    def _obituary(self) -> DataError:
        """What a rank that waits for a picture is told of the death of its worker."""
        how = f"data worker {self._number} ended ({_reason(self._process.exitcode)})"
        sample_id = self._at_work_on
        if sample_id is None:
            return DataError(f"{how} before its first sample; lower data.num_workers")
        try:
            record = self._dataset.record(sample_id)
            place = place_of(record, self._dataset.annotation_set(sample_id))
            images = f"images {list(record.images)}"
        except DataError as error:
            place, images = f"sample {sample_id}", str(error)
        return DataError(
            f"{place}: {how} at or after this sample, the last that it began ({images}); if memory "
            "ran out, lower data.num_workers or data.prefetch_iterations, otherwise look at the "
            "images"
        )


def _reason(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        return f"killed by {signal.Signals(-exitcode).name}"
    return f"exit code {exitcode}"


def _serve(connection: Connection, begun: Connection, dataset: Dataset) -> None:
    """What a worker does: decode one sample after the other until it is ended.

    Args:
        connection: jobs come in, pictures go out.
        begun: the id of each sample goes out when it is begun; pictures may be late, this is not.
        dataset: where samples come from.
    """
    for number in _TRAINERS_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _TRAINERS_SIGNALS)
    _in_a_thread(_follow_parent)
    outbox: queue.SimpleQueue[Pictures | BaseException] = queue.SimpleQueue()
    _in_a_thread(partial(_send_all, connection, outbox))
    while True:
        job = connection.recv()
        sample_id = job[0]
        begun.send(sample_id)
        try:
            outbox.put(decode(dataset, *job))
        except MmlmError as error:
            outbox.put(error)  # raised again where the sample is waited for
        except Exception:  # ours, and perhaps of a type that does not travel
            outbox.put(RuntimeError(f"sample {sample_id}:\n{traceback.format_exc()}"))


def _send_all(
    connection: Connection, outbox: "queue.SimpleQueue[Pictures | BaseException]"
) -> None:
    """Send shapes, then each picture as it lies in memory."""
    while True:
        outcome = outbox.get()
        if isinstance(outcome, BaseException):
            connection.send(outcome)
            continue
        connection.send([image.shape for image in outcome])
        for image in outcome:
            connection.send_bytes(image.data.cast("B"))


def _follow_parent() -> None:
    """End with the trainer, also when it was killed and could say nothing."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "it was spawned"
    parent.join()
    os._exit(1)


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """A process that is started in the block has them blocked, so that none ends its start."""
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, _TRAINERS_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)


def _in_a_thread(function: Callable[[], None]) -> None:
    threading.Thread(target=function, daemon=True).start()
