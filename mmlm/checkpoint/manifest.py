"""What a checkpoint is, beside its tensors, and where it lies.

```
ROOT/latest                    text: the newest complete iteration, e.g. iter_0000200
ROOT/iter_0000200/mmlm.json    the manifest
ROOT/iter_0000200/integrity.json   sizes and checksums of all files, see integrity.py
ROOT/iter_0000200/hf_assets/   tokenizer and config.json files of the HuggingFace parts
ROOT/iter_0000200/...          tensors, see storage.py
```
A checkpoint is written under a temporary name and renamed when complete; `latest` is replaced
last. A process killed at any moment leaves the previous checkpoint usable.
"""

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmlm.checkpoint.patient import read_patiently
from mmlm.config.load import from_json
from mmlm.config.model import ModelConfig
from mmlm.errors import CheckpointError, ConfigError

MANIFEST_FILE = "mmlm.json"
LATEST_FILE = "latest"
ASSETS_DIR = "hf_assets"
FORMAT_VERSION = 1
_ITERATION = re.compile(r"iter_(\d{7,})")


class UnknownFormatError(CheckpointError):
    """A manifest that is not damaged, but of another version of mmlm."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything about a checkpoint that is not a tensor."""

    iteration: int
    """Iterations done; 0 for converted weights."""
    consumed_samples: int
    """Samples used so far, from which the data order continues."""
    dtype: str
    """Of the model's tensors: bf16, fp16, fp32, or mixed."""
    model: ModelConfig
    """Sizes of the model."""
    run_config: dict[str, Any] | None
    """The resolved configuration of the run as JSON; None for converted weights."""
    data: dict[str, Any] | None = None
    """What the run trains on, for comparison on resume: usable samples of each set, and tokens."""
    nonfinite_iterations: int = 0
    """Of `iteration`, those that changed nothing because loss or gradient norm was not finite."""
    nonfinite_in_a_row: int = 0
    """The last ones of them without a good iteration between."""
    has_optimizer: bool
    """Whether a training can be resumed exactly, or only started from the weights."""
    format_version: int = FORMAT_VERSION
    """Version of this layout."""

    def write(self, directory: Path) -> None:
        """Write the manifest of an iteration's directory."""
        write_manifest_json(directory, asdict(self))

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """Read the manifest of an iteration's directory.

        Raises:
            CheckpointError: when it is missing, damaged, or of a newer format.
        """
        file = directory / MANIFEST_FILE
        content = read_manifest_json(directory)
        if "part" in content:
            raise CheckpointError(
                f"{file}: holds the {content['part']} alone, and a whole model is needed; convert "
                "all three parts into one checkpoint"
            )
        try:
            return cls(**{**content, "model": from_json(ModelConfig, content["model"])})
        except (KeyError, TypeError, ConfigError) as error:
            raise CheckpointError(f"{file}: damaged: {error}") from error


def read_manifest_json(directory: Path) -> dict[str, Any]:
    """Read the json of a manifest, of a whole model or of one part; errors as `Manifest.read`."""
    file = directory / MANIFEST_FILE
    try:
        content = json.loads(read_patiently(Path.read_bytes, file))
    except FileNotFoundError:
        raise CheckpointError(f"{file}: missing; not a checkpoint of mmlm") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: damaged: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: damaged: not an object, so format_version is None")
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise UnknownFormatError(
            f"{file}: format_version is {version!r}, this version of mmlm reads {FORMAT_VERSION}"
        )
    return dict(content)


def write_manifest_json(directory: Path, content: dict[str, Any]) -> None:
    """Write the json of a manifest."""
    text = json.dumps(content, indent=2, ensure_ascii=False)
    (directory / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")


def iteration_name(iteration: int) -> str:
    """Name of an iteration's directory, e.g. ``iter_0000200``."""
    return f"iter_{iteration:07d}"


def temporary_dir(root: Path, iteration: int) -> Path:
    """Where a checkpoint is written before `publish`; on the same file system as its final place.

    What an interrupted save left there must be removed first (by one rank).
    """
    return root / f".{iteration_name(iteration)}.tmp"


def resolve(path: Path) -> Path:
    """Find the iteration's directory that a path means.

    Args:
        path: a folder with a ``latest`` file, or an iteration's directory.

    Raises:
        CheckpointError: when neither is there.
    """
    path = Path(path)
    if (path / MANIFEST_FILE).is_file():
        return path
    latest = path / LATEST_FILE
    if not latest.is_file() and iterations(path):
        return iterations(path)[-1]  # killed between the first checkpoint and naming it
    if not latest.is_file():
        found = "does not exist" if not path.exists() else "holds neither"
        raise CheckpointError(
            f"{path}: {found}; a checkpoint is a folder with a '{LATEST_FILE}' file, or one of its "
            f"iter_* folders with {MANIFEST_FILE}"
        )
    name = latest.read_text(encoding="utf-8").strip()
    if not _ITERATION.fullmatch(name):
        raise CheckpointError(f"{latest}: says {name!r}, which is not the name of an iteration")
    # A kill while `publish` replaces an iteration leaves the old one under its second name.
    for candidate in (path / name, _aside(path, name)):
        if (candidate / MANIFEST_FILE).is_file():
            return candidate
    raise CheckpointError(
        f"{latest}: names {name}, but {path / name} is missing or incomplete; give one of "
        f"{[found.name for found in iterations(path)]} itself"
    )


def iterations(root: Path) -> list[Path]:
    """Complete checkpoints of a folder, oldest first."""
    found = [
        (int(match.group(1)), each)
        for each in (root.iterdir() if root.is_dir() else ())
        if (match := _ITERATION.fullmatch(each.name)) and (each / MANIFEST_FILE).is_file()
    ]
    return [each for _, each in sorted(found)]


def publish(tmp_dir: Path, root: Path, iteration: int) -> Path:
    """Make a complete checkpoint visible: to disk, renamed, then named by ``latest``.

    Called by one rank, after all ranks have written. A checkpoint of the same iteration is
    replaced. What needs room on the disk is done before anything is renamed; when renaming fails,
    the earlier checkpoint of that iteration has its name again.

    Returns:
        The iteration's directory.
    """
    _fsync_tree(tmp_dir)
    final = root / iteration_name(iteration)
    aside = _aside(root, final.name)
    try:
        unfinished = _write_name(final)
        if final.exists():
            _remove(aside)
            final.rename(aside)
        tmp_dir.rename(final)
    except OSError:
        if not final.exists() and aside.exists():
            aside.rename(final)
        (root / f".{LATEST_FILE}.tmp").unlink(missing_ok=True)
        raise
    _fsync(root)
    os.replace(unfinished, root / LATEST_FILE)
    _fsync(root)
    _remove(aside)
    return final


def name_latest(directory: Path) -> None:
    """Have ``latest`` name one of the checkpoints beside it; called by one rank."""
    os.replace(_write_name(directory), directory.parent / LATEST_FILE)
    _fsync(directory.parent)


def prune(root: Path, save_total_limit: int) -> list[Path]:
    """Delete the oldest checkpoints; called by one rank, after `publish`.

    Args:
        root: folder of the checkpoints.
        save_total_limit: how many of the newest stay; 0 keeps all. The newest is the one that
            ``latest`` names; what lies above it neither counts nor is deleted.

    Returns:
        What was deleted.
    """
    if save_total_limit == 0:
        return []
    current = _number(resolve(root))
    old = [each for each in iterations(root) if _number(each) <= current][:-save_total_limit]
    for each in old:
        doomed = root / f".{each.name}.deleted"  # a kill leaves no half of it under its name
        remove_directory(doomed)
        each.rename(doomed)
        remove_directory(doomed)
    return old


def tidy(root: Path) -> None:
    """Remove what killed saves have left; called by one rank of the only run on this folder.

    A checkpoint that was being replaced, with nothing in its place, gets its name back. One that
    had its name when a kill came, but was not yet named by ``latest``, is named.
    """
    for each in sorted(root.glob(".iter_*")) if root.is_dir() else ():
        name, _, kind = each.name.removeprefix(".").partition(".")
        if not _ITERATION.fullmatch(name):
            continue
        if kind == "replaced" and not (root / name).exists() and (each / MANIFEST_FILE).is_file():
            each.rename(root / name)
        elif kind in ("replaced", "tmp", "deleted"):
            remove_directory(each)
    unfinished = root / f".{LATEST_FILE}.tmp"
    if _is_newer_name(unfinished, root / LATEST_FILE):
        os.replace(unfinished, root / LATEST_FILE)
        _fsync(root)
    unfinished.unlink(missing_ok=True)


def _is_newer_name(unfinished: Path, latest: Path) -> bool:
    """Whether a killed `publish` had come to the naming, and nobody has gone back since."""
    if not unfinished.is_file():
        return False
    name = unfinished.read_text(encoding="utf-8", errors="replace").strip()
    if not _ITERATION.fullmatch(name) or not (latest.parent / name / MANIFEST_FILE).is_file():
        return False
    return not latest.exists() or unfinished.stat().st_mtime_ns > latest.stat().st_mtime_ns


def named_iterations(root: Path) -> list[Path]:
    """Every directory with the name of an iteration, complete or not, in the order of trust.

    The one that ``latest`` names comes first, also when it is not there; then those before it, from
    the newest to the oldest. Those above it are not among them, see `above_latest`.
    """
    newest_first = _all_named(root)
    latest = _named_by_latest(root)
    if latest is None:
        return newest_first
    return [latest, *(each for each in newest_first if _number(each) < _number(latest))]


def above_latest(root: Path) -> list[Path]:
    """Directories of iterations above the one that ``latest`` names, from the newest.

    Somebody has gone back before them; what a kill kept out of ``latest`` is put there by `tidy`.
    """
    latest = _named_by_latest(root)
    if latest is None:
        return []
    return [each for each in _all_named(root) if _number(each) > _number(latest)]


def _all_named(root: Path) -> list[Path]:
    found = [
        (int(match.group(1)), each)
        for each in (root.iterdir() if root.is_dir() else ())
        if (match := _ITERATION.fullmatch(each.name)) and each.is_dir()
    ]
    return [each for _, each in sorted(found, reverse=True)]


def _named_by_latest(root: Path) -> Path | None:
    latest = root / LATEST_FILE
    name = latest.read_text(encoding="utf-8", errors="replace").strip() if latest.is_file() else ""
    return root / name if _ITERATION.fullmatch(name) else None


def _number(directory: Path) -> int:
    """Iteration of a directory with such a name, also under the second one of `_aside`."""
    match = _ITERATION.search(directory.name)
    assert match is not None, directory
    return int(match.group(1))


def remove_directory(directory: Path) -> None:
    """Delete a directory that nothing takes for a checkpoint; nothing if it is not there."""
    if directory.exists():
        shutil.rmtree(directory)


def _write_name(directory: Path) -> Path:
    """The next ``latest`` under a temporary name."""
    file = directory.parent / f".{LATEST_FILE}.tmp"
    file.write_text(directory.name + "\n", encoding="utf-8")
    _fsync(file)
    return file


def _aside(root: Path, name: str) -> Path:
    return root / f".{name}.replaced"


def _remove(directory: Path) -> None:
    """Delete a directory in such a way that no half of it can be taken for a checkpoint."""
    if directory.exists():
        (directory / MANIFEST_FILE).unlink(missing_ok=True)
        shutil.rmtree(directory)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fsync_tree(directory: Path) -> None:
    for parent, _, files in os.walk(directory):
        for name in files:
            _fsync(Path(parent) / name)
        _fsync(Path(parent))
