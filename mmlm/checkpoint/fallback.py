"""Which of a run's own checkpoints it continues: the newest, or where that is damaged an older."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch.distributed as dist

from mmlm.checkpoint.integrity import find_damage
from mmlm.checkpoint.manifest import (
    Manifest,
    UnknownFormatError,
    name_latest,
    named_iterations,
    remove_directory,
    tidy,
)
from mmlm.checkpoint.metadata import tensor_infos
from mmlm.errors import CheckpointError
from mmlm.log import get_logger
from mmlm.parallel.agreement import on_rank_zero

DAMAGED_SUFFIX = ".damaged"


@dataclass(frozen=True, kw_only=True)
class IntactCheckpoint:
    """Where a run can go on."""

    path: Path
    """One iteration's directory."""
    damaged: dict[Path, str]
    """What would have come before it -> what is wrong with it, naming the file."""


def find_intact(
    root: Path, *, checksums: bool, group: dist.ProcessGroup | None = None
) -> IntactCheckpoint | None:
    """Find the newest checkpoint of a run that is as it was written; collective.

    Leftovers of killed saves are removed, so nobody else may be saving there.

    Args:
        root: folder of the run's checkpoints.
        checksums: whether to read and compare all bytes; otherwise names and sizes.
        group: all ranks, for small messages.

    Returns:
        None when there is none at all, damaged or not.

    Raises:
        CheckpointError: on all ranks, when there are some and none is intact, or when one is of
            another version of mmlm.
    """

    def candidates() -> list[Path]:
        tidy(root)
        return named_iterations(root)

    damaged: dict[Path, str] = {}
    for candidate in on_rank_zero(candidates, group):
        damage = on_rank_zero(partial(_unreadable, candidate), group)
        if damage is None:
            damage = find_damage(candidate, checksums=checksums, group=group)
        if damage is None:
            return IntactCheckpoint(path=candidate, damaged=damaged)
        damaged[candidate] = damage
    if damaged:
        raise CheckpointError(
            f"{root}: none of {len(damaged)} checkpoints is intact, so the run cannot go on: "
            + "; ".join(damaged.values())
            + ". Bring one back from a copy, or start a new run in another output_dir"
        )
    return None


def set_damaged_aside(found: IntactCheckpoint) -> None:
    """Say loudly that a run goes back, and take the damaged names away; called by one rank.

    A damaged checkpoint is renamed to ``iter_XXXXXXX.damaged``, where nothing counts or deletes it.
    """
    if found.damaged:
        name_latest(found.path)  # before the one that it named is gone
    for path, damage in found.damaged.items():
        kept = path.with_name(path.name + DAMAGED_SUFFIX)
        if path.exists():
            remove_directory(kept)
            path.rename(kept)
        get_logger().error(
            f"DAMAGED CHECKPOINT {path.name}: {damage}. The run goes back to {found.path.name} and "
            f"does again what came after it; the damaged one is kept as {kept.name}"
        )


def _unreadable(directory: Path) -> str | None:
    """What is wrong before any file is compared; None when manifest and metadata can be read."""
    try:
        Manifest.read(directory)
        tensor_infos(directory)
    except UnknownFormatError:
        raise  # going back would not help: the others are as new
    except CheckpointError as error:
        return str(error)
    return None
