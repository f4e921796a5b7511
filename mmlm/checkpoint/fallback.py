"""Which of a run's own checkpoints it continues: the newest, or where that is damaged an older."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch.distributed as dist

from mmlm.checkpoint.integrity import find_damage
from mmlm.checkpoint.manifest import (
    Manifest,
    UnknownFormatError,
    above_latest,
    name_latest,
    named_iterations,
    tidy,
)
from mmlm.checkpoint.metadata import read_metadata
from mmlm.checkpoint.patient import UnreachableFileError, size_of
from mmlm.errors import CheckpointError
from mmlm.log import get_logger
from mmlm.parallel.agreement import on_rank_zero

DAMAGED_SUFFIX = ".damaged"
ABANDONED_SUFFIX = ".abandoned"


@dataclass(frozen=True, kw_only=True)
class IntactCheckpoint:
    """Where a run can go on."""

    path: Path
    """One iteration's directory."""
    damaged: dict[Path, str]
    """What would have come before it -> what is wrong with it, naming the file."""
    abandoned: tuple[Path, ...] = ()
    """What lies above the iteration that ``latest`` names, from which the run has been led away."""


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
        CheckpointError: on all ranks, when there are some and none is intact, when one is of
            another version of mmlm, or when a file cannot be read for a reason that may pass.
    """

    def look() -> tuple[list[Path], tuple[Path, ...]]:
        tidy(root)
        return named_iterations(root), tuple(above_latest(root))

    damaged: dict[Path, str] = {}
    candidates, abandoned = on_rank_zero(look, group)
    for candidate in candidates:
        damage = on_rank_zero(partial(_unreadable, candidate), group)
        if damage is None:
            damage = find_damage(candidate, checksums=checksums, group=group)
        if damage is None:
            return IntactCheckpoint(path=candidate, damaged=damaged, abandoned=abandoned)
        damaged[candidate] = damage
    if damaged:
        not_tried = ", ".join(each.name for each in abandoned)
        raise CheckpointError(
            f"{root}: none of {len(damaged)} checkpoints is intact, so the run cannot go on: "
            + "; ".join(damaged.values())
            + (f"; above what `latest` names, so not tried: {not_tried}" if not_tried else "")
            + ". Bring one back from a copy, or start a new run in another output_dir"
        )
    return None


def set_damaged_aside(found: IntactCheckpoint) -> None:
    """Say loudly that a run goes back, and take the damaged names away; called by one rank.

    A damaged checkpoint is renamed to ``iter_XXXXXXX.damaged``, where nothing counts or deletes it;
    where that name is taken, to ``iter_XXXXXXX.damaged.2`` and so on. So is what lies above the
    iteration that ``latest`` names, to ``iter_XXXXXXX.abandoned``: the run is about to do these
    iterations again, and nothing could tell the two branches apart later.
    """
    for path in found.abandoned:
        kept = _free_name(path, ABANDONED_SUFFIX)
        path.rename(kept)
        get_logger().warning(
            f"{path.name} is newer than what `latest` names, and the run goes on from "
            f"{found.path.name}: it is kept as {kept.name}, which nothing counts or deletes"
        )
    if found.damaged:
        name_latest(found.path)  # before the one that it named is gone
    for path, damage in found.damaged.items():
        kept = _free_name(path, DAMAGED_SUFFIX)
        if path.exists():
            path.rename(kept)
        get_logger().error(
            f"DAMAGED CHECKPOINT {path.name}: {damage}. The run goes back to {found.path.name} and "
            f"does again what came after it; the damaged one is kept as {kept.name}"
        )


def _unreadable(directory: Path) -> str | None:
    """What is wrong before files are compared; None if the manifest is one and all is there."""
    try:
        Manifest.read(directory)
        places = read_metadata(directory).storage_data or {}
    except UnknownFormatError:
        raise  # going back would not help: the others are as new
    except UnreachableFileError:
        raise
    except CheckpointError as error:
        return str(error)
    # also of what has no record, or one of files that not all nodes could see
    for name in sorted({place.relative_path for place in places.values()}):
        try:
            size_of(directory / name)
        except OSError as error:
            what = "missing" if isinstance(error, FileNotFoundError) else error.strerror
            return f"{directory / name}: {what}, and .metadata names it"
    return None


def _free_name(path: Path, suffix: str) -> Path:
    """The first of NAME.suffix, NAME.suffix.2, ... that is not taken."""
    name, number = path.with_name(path.name + suffix), 1
    while name.exists():
        number += 1
        name = path.with_name(f"{path.name}{suffix}.{number}")
    return name
