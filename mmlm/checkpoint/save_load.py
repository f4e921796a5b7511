"""Save one iteration: tensors, manifest and assets, in an order that a kill cannot break."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mmlm.checkpoint.assets import write_assets
from mmlm.checkpoint.manifest import ASSETS_DIR, Manifest, prune, publish, temporary_dir
from mmlm.checkpoint.storage import save_sharded
from mmlm.parallel.agreement import on_rank_zero


def save_checkpoint(
    root: Path,
    sharded_state: dict[str, Any],
    manifest: Manifest,
    *,
    assets: Mapping[str, bytes],
    keep: int,
    control_group: dist.ProcessGroup | None = None,
) -> Path:
    """Write a checkpoint under a temporary name, then publish it; collective.

    Args:
        root: folder of the checkpoints, on a file system that all ranks share.
        sharded_state: this rank's part.
        manifest: what it is.
        assets: HuggingFace configs and tokenizer files, file name -> content; may be empty.
        keep: newest checkpoints that stay; 0 for all.
        control_group: all ranks, for small messages.

    Returns:
        Its directory.

    Raises:
        MmlmError: on all ranks, if writing failed on any; the previous checkpoint is intact.
    """
    unfinished = temporary_dir(root, manifest.iteration)

    def clean() -> None:
        if unfinished.exists():
            shutil.rmtree(unfinished)

    def complete() -> Path:
        manifest.write(unfinished)
        if assets:
            write_assets(unfinished / ASSETS_DIR, assets)
        final = publish(unfinished, root, manifest.iteration)
        prune(root, keep)
        return final

    on_rank_zero(clean, control_group)
    save_sharded(sharded_state, unfinished)
    return on_rank_zero(complete, control_group)
