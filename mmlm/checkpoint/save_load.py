"""Save and load one iteration: tensors, manifest, HuggingFace assets, in an order that a kill
cannot break."""

import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mmlm.checkpoint.manifest import ASSETS_DIR, Manifest, prune, publish, temporary_dir
from mmlm.checkpoint.storage import save_sharded
from mmlm.errors import CheckpointError


def save_checkpoint(
    root: Path,
    sharded_state: dict[str, Any],
    manifest: Manifest,
    *,
    assets: Path | None,
    keep: int,
) -> Path:
    """Write a checkpoint under a temporary name, then publish it; collective.

    Args:
        root: folder of the checkpoints, on a file system that all ranks share.
        sharded_state: this rank's part.
        manifest: what it is.
        assets: folder with the HuggingFace configs and tokenizer files, copied along; or None.
        keep: newest checkpoints that stay; 0 for all.

    Returns:
        Its directory.

    Raises:
        CheckpointError: on all ranks, if writing failed on any; the previous checkpoint is intact.
    """
    rank = dist.get_rank()
    unfinished = temporary_dir(root, manifest.iteration)
    if rank == 0 and unfinished.exists():
        shutil.rmtree(unfinished)
    dist.barrier()
    save_sharded(sharded_state, unfinished)
    outcome: list[Any] = [None]
    if rank == 0:
        try:
            manifest.write(unfinished)
            if assets is not None:
                shutil.copytree(assets, unfinished / ASSETS_DIR)
            outcome[0] = publish(unfinished, root, manifest.iteration)
            prune(root, keep)
        except OSError as error:
            outcome[0] = f"{root}: the checkpoint could not be completed: {error}"
    dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], str):
        raise CheckpointError(outcome[0])
    return outcome[0]
