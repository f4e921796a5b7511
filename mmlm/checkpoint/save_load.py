"""Save one iteration: tensors, manifest and assets, in an order that a kill cannot break."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mmlm.checkpoint.assets import write_assets
from mmlm.checkpoint.integrity import WrittenFile, write_integrity
from mmlm.checkpoint.manifest import (
    ASSETS_DIR,
    Manifest,
    prune,
    publish,
    remove_directory,
    temporary_dir,
)
from mmlm.checkpoint.shard_writer import plan_shards
from mmlm.checkpoint.storage import readable_errors
from mmlm.errors import CheckpointError, MmlmError
from mmlm.log import get_logger
from mmlm.parallel.agreement import on_rank_zero


class PendingCheckpoint:
    """A checkpoint that is planned and not published; its methods are called in this order.

    Args:
        root: folder of the checkpoints, on a file system that all ranks share.
        sharded_state: this rank's part.
        manifest: what it is.
        assets: HuggingFace configs and tokenizer files, file name -> content; may be empty.
        copies: which keys are copied to host memory at once, since their tensors change before
            `write`; None for no key.
        group: all ranks, for small messages.

    Raises:
        MmlmError: on all ranks, when the folder cannot be made.
    """

    def __init__(
        self,
        root: Path,
        sharded_state: dict[str, Any],
        manifest: Manifest,
        *,
        assets: Mapping[str, bytes],
        copies: Callable[[str], bool] | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self._root, self._manifest, self._assets, self._group = root, manifest, assets, group
        self._unfinished = temporary_dir(root, manifest.iteration)
        on_rank_zero(lambda: remove_directory(self._unfinished), group)
        with _nothing_left(self._unfinished), readable_errors(f"{root}: cannot be saved to"):
            self._shards = plan_shards(sharded_state, self._unfinished, copies=copies, group=group)

    @property
    def iteration(self) -> int:
        """Iterations done."""
        return self._manifest.iteration

    def write(self) -> None:
        """Write this rank's tensors, in any thread; not collective and never an error."""
        self._shards.write()

    def publish(self, save_total_limit: int) -> Path:
        """Write the rest and give the checkpoint its name, when all have written; collective.

        Args:
            save_total_limit: newest checkpoints that stay; 0 for all.

        Returns:
            Its directory.

        Raises:
            MmlmError: on all ranks, if writing failed on any; nothing of it is left and the
                previous checkpoint is intact.
        """
        with _nothing_left(self._unfinished):
            written = self._shards.finish(self._group)
            final = on_rank_zero(lambda: self._complete(written), self._group)
        on_rank_zero(lambda: _prune(self._root, save_total_limit), self._group)
        return final

    def _complete(self, written: Mapping[str, WrittenFile]) -> Path:
        folder = self._unfinished
        try:
            self._manifest.write(folder)
            if self._assets:
                write_assets(folder / ASSETS_DIR, self._assets)
            write_integrity(folder, written)
            return publish(folder, self._root, self._manifest.iteration)
        except OSError as error:
            if error.filename is not None:
                raise
            # what a write into an open file raises does not name it
            raise CheckpointError(f"{folder}: {error.strerror or error}") from error


@contextmanager
def _nothing_left(folder: Path) -> Iterator[None]:
    """Remove a folder, on rank 0, when the block ends with an error that all ranks have."""
    try:
        yield
    except MmlmError:
        if dist.get_rank() == 0:
            try:
                remove_directory(folder)
            except OSError as error:
                get_logger().error(f"{folder}: could not be removed: {error}")
        raise


def save_checkpoint(
    root: Path,
    sharded_state: dict[str, Any],
    manifest: Manifest,
    *,
    assets: Mapping[str, bytes],
    save_total_limit: int,
    control_group: dist.ProcessGroup | None = None,
) -> Path:
    """Write a checkpoint under a temporary name, then publish it; collective.

    Args:
        root: folder of the checkpoints, on a file system that all ranks share.
        sharded_state: this rank's part.
        manifest: what it is.
        assets: HuggingFace configs and tokenizer files, file name -> content; may be empty.
        save_total_limit: newest checkpoints that stay; 0 for all.
        control_group: all ranks, for small messages.

    Returns:
        Its directory.

    Raises:
        MmlmError: on all ranks, if writing failed on any or rank 0 does not find what another has
            written; the previous checkpoint is intact.
    """
    pending = PendingCheckpoint(root, sharded_state, manifest, assets=assets, group=control_group)
    pending.write()
    return pending.publish(save_total_limit)


def _prune(root: Path, save_total_limit: int) -> None:
    """Delete old checkpoints; that one cannot be deleted is no reason to lose a training."""
    try:
        prune(root, save_total_limit)
    except OSError as error:
        get_logger().warning(f"{root}: an old checkpoint could not be deleted: {error}")
