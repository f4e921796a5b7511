"""Batches of one data-parallel rank, made ahead of the training in threads."""

from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from mmlm.data.collate import Batch, collate
from mmlm.data.dataset import Dataset
from mmlm.data.planners import Planner
from mmlm.data.step_plan import Microbatch, StepPlan


class BatchLoader:
    """Gives the microbatches of an iteration and prepares the next iteration meanwhile.

    Every rank that shares a data-parallel rank gets the same batches; ranks without the vision
    embedding ask for ``with_pixels=False`` and decode nothing. Threads suffice: Pillow and numpy
    let go of the interpreter lock while they decode and resize.
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
        num_workers: int = 2,
        pad_to_multiple_of: int = 1,
        min_length: int = 1,
        pin_memory: bool = False,
    ) -> None:
        """Start the threads; nothing is read yet.

        Args:
            dataset: where samples come from.
            planner: what each iteration contains; the same on every rank.
            data_parallel_rank: whose microbatches are made.
            end_iteration: the first iteration that is not wanted, so that none is prepared in vain.
            seed: seed of the run, for augmentation.
            with_pixels: decode pictures.
            num_workers: threads.
            pad_to_multiple_of: see `collate`.
            min_length: see `collate`.
            pin_memory: put the batches into page-locked memory, for a GPU.
        """
        self._dataset = dataset
        self._planner = planner
        self._rank = data_parallel_rank
        self._end = end_iteration
        self._seed = seed
        self._with_pixels = with_pixels
        self._pad_to_multiple_of = pad_to_multiple_of
        self._min_length = min_length
        self._pin_memory = pin_memory
        self._pool = ThreadPoolExecutor(num_workers, thread_name_prefix="mmlm-data")
        self._pending: dict[int, tuple[StepPlan, list[Future[Batch]]]] = {}

    def batches(self, iteration: int) -> tuple[StepPlan, list[Batch]]:
        """Return the plan of an iteration and this rank's microbatches; wait where not ready.

        Args:
            iteration: from 0; any order, but one after the other is prepared ahead.

        Raises:
            DataError: a sample cannot be built; names set, file, line and picture.
        """
        for other in [number for number in self._pending if number != iteration]:
            for future in self._pending.pop(other)[1]:
                future.cancel()
        plan, futures = self._pending.get(iteration) or self._submit(iteration)
        self._pending.clear()
        if iteration + 1 < self._end:
            self._pending[iteration + 1] = self._submit(iteration + 1)
        return plan, [future.result() for future in futures]

    def close(self) -> None:
        """Drop what is being prepared and end the threads."""
        self._pending.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)

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
        microbatches = plan.microbatches[self._rank]
        return plan, [self._pool.submit(self._make, plan, rows) for rows in microbatches]

    def _make(self, plan: StepPlan, rows: Microbatch) -> Batch:
        samples = [
            [
                self._dataset.sample(
                    sample_id,
                    seed=self._seed,
                    epoch=plan.epoch,
                    with_pixels=self._with_pixels,
                )
                for sample_id in row
            ]
            for row in rows
        ]
        batch = collate(
            samples,
            plan.token_weights,
            image_size=self._dataset.settings.image_size,
            with_pixels=self._with_pixels,
            pad_to_multiple_of=self._pad_to_multiple_of,
            min_length=self._min_length,
        )
        return batch.pin_memory() if self._pin_memory else batch
