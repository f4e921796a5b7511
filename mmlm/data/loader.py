"""Batches of one data-parallel rank, made ahead of the training."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from types import TracebackType

import numpy as np
import torch

from mmlm.data.collate import Batch, collate
from mmlm.data.dataset import Dataset
from mmlm.data.image import ByteArray, normalise
from mmlm.data.planners import Planner
from mmlm.data.sample import Sample
from mmlm.data.step_plan import Microbatch, StepPlan
from mmlm.data.workers import Pictures, WorkerPool, decode
from mmlm.errors import DataError


class BatchLoader:
    """Gives the microbatches of an iteration and prepares the next ones meanwhile.

    Every rank that shares a data-parallel rank gets the same batches; ranks without the vision
    embedding ask for ``with_pixels=False``, decode nothing and need no processes. Worker processes
    decode and resize pictures, nearly all of the work; threads of this process tokenize, normalise
    and lay out, and decode as well where there are no workers.
    """

    def __init__(
        self,
        dataset: Dataset,
        planner: Planner,
        *,
        data_parallel_rank: int,
        end_iteration: int,
        seed: int = 0,
        with_pixels: bool = True,
        num_workers: int = 0,
        prefetch_iterations: int = 1,
        pad_to_multiple_of: int = 1,
        min_length: int = 1,
        pin_memory: bool = False,
    ) -> None:
        """Start threads and processes; nothing is read yet.

        Args:
            dataset: where samples come from.
            planner: what each iteration contains; the same on every rank.
            data_parallel_rank: whose microbatches are made.
            end_iteration: the first iteration that is not wanted, so that none is prepared in vain.
            seed: seed of the run, for augmentation.
            with_pixels: decode pictures.
            num_workers: processes that do; 0: a thread does.
            prefetch_iterations: how many iterations are prepared ahead.
            pad_to_multiple_of: see `collate`.
            min_length: see `collate`.
            pin_memory: put the batches into page-locked memory, for a GPU.

        Raises:
            DataError: the processes cannot be started.
        """
        self._dataset = dataset
        self._planner = planner
        self._rank = data_parallel_rank
        self._end = end_iteration
        self._seed = seed
        self._with_pixels = with_pixels
        self._ahead = prefetch_iterations
        self._pad_to_multiple_of = pad_to_multiple_of
        self._min_length = min_length
        self._pin_memory = pin_memory
        self._pending: dict[int, tuple[StepPlan, list[Future[Batch]]]] = {}
        self._workers = (
            WorkerPool(dataset, num_workers) if with_pixels and num_workers > 0 else None
        )
        # 2.4 ms a sample (benchmarks.loader): two threads keep up with some four workers; without
        # any, one thread is as much as there was
        num_threads = 1 if self._workers is None else 2
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="mmlm-data")

    def batches(self, iteration: int) -> tuple[StepPlan, list[Batch]]:
        """Return the plan of an iteration and this rank's microbatches; wait where not ready.

        Args:
            iteration: from 0; any order, but one after the other is prepared ahead.

        Raises:
            DataError: a sample cannot be built; names set, file, line and picture.
        """
        wanted = range(iteration, min(iteration + self._ahead + 1, max(self._end, iteration + 1)))
        for other in self._pending.keys() - set(wanted):
            for future in self._pending.pop(other)[1]:
                future.cancel()
        for number in wanted:
            if number not in self._pending:
                self._pending[number] = self._submit(number)
        plan, futures = self._pending.pop(iteration)
        return plan, [future.result() for future in futures]

    def close(self) -> None:
        """Drop what is being prepared and end threads and processes."""
        self._pending.clear()
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self._workers is not None:
            self._workers.close()
        self._threads.shutdown(wait=True)

    def __enter__(self) -> "BatchLoader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _submit(self, iteration: int) -> tuple[StepPlan, list[Future[Batch]]]:
        plan = self._planner.plan(iteration)
        return plan, [
            self._threads.submit(self._make, plan, rows, self._pictures(plan, rows))
            for rows in plan.microbatches[self._rank]
        ]

    def _pictures(self, plan: StepPlan, rows: Microbatch) -> dict[int, Callable[[], Pictures]]:
        """Ask the workers for the pictures of a microbatch; without them, say how to get each."""
        if not self._with_pixels:
            return {}
        num_images = self._dataset.table.num_images
        samples = {number for row in rows for number in row if num_images[number] > 0}
        jobs = {
            number: (number, int(num_images[number]), self._seed, plan.epoch)
            for number in sorted(samples)
        }
        if self._workers is None:
            return {number: partial(decode, self._dataset, *jobs[number]) for number in jobs}
        return {number: self._workers.submit(*jobs[number]).result for number in jobs}

    def _make(
        self, plan: StepPlan, rows: Microbatch, pictures: dict[int, Callable[[], Pictures]]
    ) -> Batch:
        """Build the samples of a microbatch and lay them out; runs in a thread."""
        samples: dict[int, Sample] = {}
        images: list[ByteArray] = []
        for sample_id in (sample_id for row in rows for sample_id in row):
            sample = self._dataset.sample(
                sample_id, seed=self._seed, epoch=plan.epoch, with_pixels=False
            )
            if self._with_pixels:
                found = pictures[sample_id]() if sample_id in pictures else ()
                if len(found) != len(sample.image_ids):
                    raise DataError(
                        f"{self._dataset.record(sample_id).place}: {len(found)} pictures for "
                        f"{len(sample.image_ids)} image blocks; the data changed during the run, "
                        "start again"
                    )
                images += found
            samples[sample_id] = sample
        batch = collate(
            [[samples[sample_id] for sample_id in row] for row in rows],
            plan.token_weights,
            image_size=self._dataset.settings.image_size,
            with_pixels=False,
            pad_to_multiple_of=self._pad_to_multiple_of,
            min_length=self._min_length,
            pad_rows=plan.pads_rows,
        )
        if self._with_pixels:
            batch = replace(batch, pixel_values=self._normalised(images))
        return batch.pin_memory() if self._pin_memory else batch

    def _normalised(self, images: list[ByteArray]) -> torch.Tensor:
        """Write each picture where the batch has it: a copy of them all would cost as much."""
        size = self._dataset.settings.image_size
        pixels = np.empty((len(images), 3, size, size), dtype=np.float32)
        for slot, image in enumerate(images):
            normalise(image, out=pixels[slot])
        return torch.from_numpy(pixels)
