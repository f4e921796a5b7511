"""Samples in an ``.npz`` file, exactly as they reach the model, for comparing implementations.

Entries are written one after the other, so a thousand samples never sit in memory together; the
file appears under its name when it is complete.
"""

import shutil
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmlm.data.image import normalise
from mmlm.data.ledger import temporary_path
from mmlm.data.lookup import Look
from mmlm.data.sample import MAX_IMAGES_PER_SAMPLE
from mmlm.errors import ConfigError, DataError

# Every entry bears the same time, so that the same samples give the same bytes.
_TIME = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True, kw_only=True)
class DumpReport:
    """What was written."""

    num_samples: int
    """Samples that were asked for."""
    invalid: tuple[tuple[int, str], ...]
    """Sample and reason of those that cannot be used."""
    num_bytes: int
    """Size of the file."""


def dump(
    output: Path,
    sample_ids: Sequence[int],
    look: Callable[[int], Look],
    *,
    image_size: int,
    metadata: dict[str, Any],
    with_pixels: bool = True,
) -> DumpReport:
    """Write samples to a file.

    Args:
        output: the file; its name is taken when all is written.
        sample_ids: which, in their order.
        look: makes one.
        image_size: S, pixels, that it is made with.
        metadata: settings that decide the content: numbers and texts.
        with_pixels: write ``pixel_values``.

    Raises:
        DataError: there is no such sample, or the file cannot be written.
    """
    temporary = temporary_path(output)
    invalid = []
    try:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            write_array(archive, "sample_ids", np.array(sample_ids, dtype=np.int64))
            for key, value in metadata.items():
                write_array(archive, f"metadata/{key}", np.array(value))
            for sample_id in sample_ids:
                found = look(sample_id)
                for name, array in arrays_of(found, image_size, with_pixels=with_pixels):
                    write_array(archive, f"{sample_id}/{name}", array)
                if found.rejection is not None:
                    invalid.append((sample_id, str(found.rejection)))
        num_bytes = temporary.stat().st_size
        temporary.replace(output)
    except OSError as error:
        raise DataError(
            f"{output}: cannot be written ({error.strerror}); free the disk or name another folder"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return DumpReport(num_samples=len(sample_ids), invalid=tuple(invalid), num_bytes=num_bytes)


def arrays_of(
    look: Look, image_size: int, *, with_pixels: bool = True
) -> Iterable[tuple[str, np.ndarray]]:
    """Yield what is written of a sample, by name; of an invalid one only why and where."""
    place, tokens = look.place, look.tokens
    yield "reason", np.array("" if look.rejection is None else str(look.rejection))
    yield "set", np.array(place.annotation_set.name)
    yield "place", np.array(str(place))
    yield "id", np.array("" if look.record is None else look.record.identity)
    if look.rejection is not None or tokens is None:
        return
    first = place.sample_id * MAX_IMAGES_PER_SAMPLE
    yield "input_ids", tokens.input_ids
    yield "labels", tokens.labels
    yield "image_positions", tokens.image_positions
    yield "image_ids", first + np.arange(tokens.num_images, dtype=np.int64)
    if with_pixels:
        assert look.images is not None, "looked at with pixels"
        pixels = np.empty((tokens.num_images, 3, image_size, image_size), dtype=np.float32)
        for slot, image in enumerate(look.images):
            normalise(image, out=pixels[slot])
        yield "pixel_values", pixels


def write_array(archive: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    """Append one array to an ``.npz`` that is being written."""
    entry = zipfile.ZipInfo(f"{name}.npy", date_time=_TIME)
    with archive.open(entry, "w", force_zip64=True) as file:
        np.lib.format.write_array(file, np.asarray(array), allow_pickle=False)


def check_output(output: Path, *, overwrite: bool, num_bytes: int = 0) -> None:
    """Refuse, before anything is made, a file that cannot be written.

    Args:
        output: the file.
        overwrite: whether it may be there already.
        num_bytes: what it will hold at most.

    Raises:
        ConfigError: it is a folder, is there already, or does not fit on the disk.
    """
    if output.is_dir():
        raise ConfigError(f"{output}: is a folder; name a file in it")
    if output.exists() and not overwrite:
        raise ConfigError(f"{output}: exists already; give another name or --overwrite")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(output.parent).free
    except OSError as error:
        raise ConfigError(f"{output}: {error.strerror}") from error
    if num_bytes > free:
        raise ConfigError(
            f"{output}: may take {num_bytes / 1e9:.1f} GB where {free / 1e9:.1f} GB are free; ask "
            "for fewer samples (--ids, --limit) or none of their pixels (--no-pixels)"
        )
