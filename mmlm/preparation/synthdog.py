"""Stage ``synthdog``: SynthDoG-EN's parquet files into ``data/synthdog-en/images/*.jpg``.

A row's picture is named after the number of the row, counted from 0 through the files in the order
of their names: ``00000000.jpg``. Names and encoding (Pillow's own JPEG quality) are those of the
published converter, so that the published ``synthdog_en.jsonl`` fits.
"""

from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import Any

from tqdm import tqdm

from mmlm.errors import ConfigError, DataError
from mmlm.log import get_logger
from mmlm.preparation.jpeg import encode_jpeg, write_image
from mmlm.preparation.layout import Playground
from mmlm.preparation.pool import map_unordered
from mmlm.preparation.sources import PUBLISHED_SETS, SYNTHDOG_FOLDER

NUM_PICTURES = next(one.num_samples for one in PUBLISHED_SETS if one.name == "synthdog_en")
"""Rows of the five files."""

_QUALITY = 75  # Pillow's default
_BATCH = 32  # rows in memory at a time, about 80 kB each


@dataclass(frozen=True, kw_only=True)
class _RowGroup:
    """Work of one process for some seconds."""

    file: Path
    number: int
    first_row: int
    num_rows: int
    folder: Path


def convert_parquet(playground: Playground, source: Path, *, workers: int) -> int:
    """Write the pictures of all parquet files of a folder; those that are there stay.

    Args:
        playground: the folders.
        source: folder with ``*.parquet``, looked through with what is below it.
        workers: processes; each works on one row group at a time.

    Returns:
        The number of pictures that are there afterwards; 0 without a parquet file.

    Raises:
        ConfigError: pyarrow is not installed.
        DataError: a file is damaged or has no column ``image``, or a picture does not decode.
    """
    files = sorted(source.rglob("*.parquet"), key=lambda path: path.name)
    if not files:
        return 0
    folder = playground.data / SYNTHDOG_FOLDER
    counts = [_row_groups(file) for file in files]
    starts = [0, *accumulate(sum(groups) for groups in counts)]
    tasks = [
        _RowGroup(file=file, number=number, first_row=first, num_rows=rows, folder=folder)
        for file, groups, start in zip(files, counts, starts[:-1], strict=True)
        for number, (first, rows) in enumerate(
            zip(accumulate([start, *groups[:-1]]), groups, strict=True)
        )
    ]
    if starts[-1] != NUM_PICTURES:
        get_logger(__name__).warning(
            "%s: %d rows in %d parquet files, but the published annotations were made from %d in 5 "
            "files; is the download complete?",
            source,
            starts[-1],
            len(files),
            NUM_PICTURES,
        )
    waiting = [task for task in tasks if not _is_written(task)]
    with tqdm(desc="synthdog-en", total=starts[-1], unit="picture") as bar:
        bar.update(starts[-1] - sum(task.num_rows for task in waiting))
        for written in map_unordered(_convert, waiting, workers=workers):
            bar.update(written)
    return starts[-1]


def _target(task: _RowGroup, row: int) -> Path:
    return task.folder / f"{task.first_row + row:08d}.jpg"


def _is_written(task: _RowGroup) -> bool:
    return all(_target(task, row).is_file() for row in range(task.num_rows))


def _convert(task: _RowGroup) -> int:
    """Write the pictures of a row group; runs in a process of the pool."""
    parquet = _pyarrow_parquet()
    row = 0
    with parquet.ParquetFile(task.file, pre_buffer=False) as opened:
        batches = opened.iter_batches(_BATCH, row_groups=[task.number], columns=["image"])
        for batch in _readable(task.file, batches):
            for value in batch.column(0).to_pylist():
                target = _target(task, row)
                if not target.is_file():
                    name = f"{task.file}: row {row} of row group {task.number}"
                    data = value["bytes"] if isinstance(value, dict) else value
                    if not data:
                        raise DataError(f"{name}: the picture is empty; download the file again")
                    write_image(target, encode_jpeg(data, name=name, quality=_QUALITY))
                row += 1
    return row


def _readable(file: Path, batches: Any) -> Any:
    while True:
        try:
            batch = next(batches, None)
        except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
            raise _damaged(file, error) from error
        if batch is None:
            return
        yield batch


def _row_groups(file: Path) -> list[int]:
    """Rows of each row group, after a look at the columns."""
    parquet = _pyarrow_parquet()
    try:
        with parquet.ParquetFile(file) as opened:
            schema = opened.schema_arrow
            meta = opened.metadata
            rows = [meta.row_group(number).num_rows for number in range(meta.num_row_groups)]
    except (OSError, ValueError) as error:
        raise _damaged(file, error) from error
    types = {field.name: str(field.type) for field in schema}
    kind = types.get("image", "")
    if kind not in ("binary", "large_binary") and not kind.startswith("struct<bytes: "):
        columns = ", ".join(f"{name}: {type_}" for name, type_ in types.items())
        raise DataError(
            f"{file}: needs a column 'image' of bytes, or with a field 'bytes', but has {columns}; "
            "is it one of SynthDoG-EN's files?"
        )
    return rows


def _damaged(file: Path, error: Exception) -> DataError:
    return DataError(
        f"{file}: not a complete parquet file ({error}); delete it and download it again"
    )


def _pyarrow_parquet() -> ModuleType:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(
            "parquet files need pyarrow, which is not installed: pip install 'mmlm[data]'"
        ) from error
    module: ModuleType = pyarrow.parquet
    return module
