"""Checkpoints of a training: written beside it, published when all ranks have written.

A save that fails, on a full disk say, is said loudly and costs the run nothing but that checkpoint;
the last one of a run must succeed.
"""

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mmlm.checkpoint.manifest import Manifest, iterations
from mmlm.checkpoint.optimizer_state import KEY_PREFIX
from mmlm.checkpoint.save_load import PendingCheckpoint
from mmlm.config.schema import CheckpointConfig
from mmlm.errors import MmlmError
from mmlm.log import get_logger


class Saver:
    """Saves a run; every method is collective.

    Args:
        root: folder of the run's checkpoints.
        settings: whether to write beside the training, and how many checkpoints stay.
        assets: HuggingFace configs and tokenizer files, file name -> content.
        group: all ranks over gloo.
        say: prints a line for the user.
        note_stall: is told the iteration of a checkpoint and for how many seconds the training
            stood still for it, on this rank.
    """

    def __init__(
        self,
        root: Path,
        settings: CheckpointConfig,
        *,
        assets: Mapping[str, bytes],
        group: dist.ProcessGroup,
        say: Callable[[str], None],
        note_stall: Callable[[int, float], None],
    ) -> None:
        self._root, self._settings, self._assets, self._group = root, settings, assets, group
        self._say, self._note_stall = say, note_stall
        self._pending: PendingCheckpoint | None = None
        self._thread: threading.Thread | None = None
        self._published = -1  # the iteration of the last one that is complete
        self._started = 0.0
        self._stall_seconds = 0.0

    def save(
        self, manifest: Manifest, describe: Callable[[], dict[str, Any]], *, is_last: bool
    ) -> None:
        """Save, after the previous checkpoint is complete.

        Args:
            manifest: what is saved.
            describe: makes this rank's sharded state, and may be collective.
            is_last: whether nothing follows: the checkpoint is complete on return.

        Raises:
            MmlmError: on all ranks, when the last checkpoint could not be written.
        """
        self.settle()
        self._started, self._stall_seconds = time.perf_counter(), 0.0
        try:
            self._pending = PendingCheckpoint(
                self._root,
                describe(),
                manifest,
                assets=self._assets,
                # the optimizer's state was brought together for this save and changes no more
                copies=_is_live if self._settings.async_save else None,
                group=self._group,
            )
        except MmlmError as error:
            self._failed(manifest.iteration, error, must_succeed=is_last)
            return
        if self._settings.async_save:
            self._thread = threading.Thread(
                target=self._pending.write, name="mmlm-save", daemon=True
            )
            self._thread.start()
        else:
            self._pending.write()
        self._stall_seconds = time.perf_counter() - self._started
        if is_last or not self._settings.async_save:
            self._finish(must_succeed=is_last)

    def holds(self, iteration: int) -> bool:
        """Whether the checkpoint of an iteration was saved here and is complete or being written.

        Not collective, and the same on every rank. `close` raises where one being written fails.
        """
        pending = None if self._pending is None else self._pending.iteration
        return iteration in (pending, self._published)

    def finish_ready(self) -> bool:
        """Publish the checkpoint that is being written, if all ranks have written it.

        Costs nothing where none is pending, and otherwise one small all-reduce.

        Returns:
            Whether it took time: a checkpoint was published, or failed.
        """
        if self._pending is None:
            return False
        is_written = self._thread is None or not self._thread.is_alive()
        everywhere = torch.tensor(int(is_written))
        dist.all_reduce(everywhere, op=dist.ReduceOp.MIN, group=self._group)
        if everywhere == 0:
            return False
        self._finish(must_succeed=False)
        return True

    def settle(self) -> None:
        """Wait until no checkpoint is being written; that it failed costs only that checkpoint."""
        self._finish(must_succeed=False)

    def close(self) -> None:
        """Wait until the last checkpoint is complete.

        Raises:
            MmlmError: on all ranks, when it could not be written.
        """
        self._finish(must_succeed=True)

    def _finish(self, *, must_succeed: bool) -> None:
        """Wait for the pending checkpoint, if there is one, and publish it."""
        if self._pending is None:
            return
        waiting = time.perf_counter()
        if self._thread is not None:
            self._thread.join()
        pending, self._pending, self._thread = self._pending, None, None
        try:
            path = pending.publish(self._settings.save_total_limit)
        except MmlmError as error:
            self._failed(pending.iteration, error, must_succeed=must_succeed)
            return
        self._published = pending.iteration
        now = time.perf_counter()
        self._stall_seconds += now - waiting
        self._say(
            f"saved {path}; the training stood still for {self._stall_seconds:.2f} of "
            f"{now - self._started:.2f} s"
        )
        self._note_stall(pending.iteration, self._stall_seconds)

    def _failed(self, iteration: int, error: MmlmError, *, must_succeed: bool) -> None:
        if must_succeed:
            raise error
        if dist.get_rank() == 0:
            newest = iterations(self._root)
            get_logger().error(
                f"CHECKPOINT NOT SAVED after {iteration} iterations: {error}. The run goes on; "
                f"its newest checkpoint is {newest[-1].name if newest else 'none'}. Free some room "
                f"on the disk of {self._root} (or mend what is named above): the next save is "
                "tried after checkpoint.save_interval iterations"
            )


def _is_live(key: str) -> bool:
    """Whether a tensor is the model's own, which the next iteration changes."""
    return not key.startswith(KEY_PREFIX)
