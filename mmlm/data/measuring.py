"""Measures a stretch of a set: every line parsed and tokenized, every picture decoded.

Runs in the building process or in one of its workers; what comes back depends on the files alone.
"""

import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import connection, parent_process
from pathlib import Path

from mmlm.data.annotation import (
    AnnotationSet,
    FileStamp,
    Record,
    file_stamp,
    parse_record,
)
from mmlm.data.image import verify_image
from mmlm.data.ledger import LedgerEntry
from mmlm.data.length_index import Rows, identity_hash
from mmlm.data.rejection import Reason
from mmlm.data.sample import Measure, SampleSettings, image_paths, measure
from mmlm.data.tokenizer import Tokenizer
from mmlm.errors import DataError


@dataclass(frozen=True, kw_only=True, eq=False)
class Chunk:
    """Some records of a set that are to be measured."""

    annotation_set: AnnotationSet
    """The set."""
    stamp: FileStamp
    """Of the annotation file when its lines were found."""
    tokenizer_folder: Path
    """Where a worker reads the tokenizer from."""
    settings: SampleSettings
    """Lengths and sizes."""
    rows: Rows
    """`INDEX_DTYPE` [records], with offset and line."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """What was found."""

    rows: Rows
    """`INDEX_DTYPE` [records], complete."""
    entries: tuple[LedgerEntry, ...]
    """For the ledger, in the order of the records."""


def start_worker() -> None:
    """Prepare a process of a pool: it leaves Ctrl-C to its parent, and ends when that is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None, "only for the processes of a pool"

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@lru_cache(maxsize=1)
def _tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer(folder)


def measure_chunk(chunk: Chunk, tokenizer: Tokenizer | None = None) -> Measured:
    """Measure the records of a chunk.

    Args:
        chunk: which.
        tokenizer: where the caller has it at hand; otherwise it is read once a process.

    Raises:
        DataError: the annotation file is gone or was edited meanwhile.
    """
    tokenizer = tokenizer or _tokenizer(chunk.tokenizer_folder)
    path = chunk.annotation_set.annotation
    if file_stamp(path) != chunk.stamp:
        raise DataError(f"{path}: the annotation file changed while it was measured; start again")
    rows, entries = chunk.rows.copy(), []
    with path.open("rb") as file:
        for row in rows:
            file.seek(int(row["offset"]))
            line = int(row["line"])
            identity, found = _measure_record(file.readline(), line, chunk, tokenizer)
            row["identity"] = identity_hash(identity)
            row["num_tokens"] = found.num_tokens
            row["num_tokens_uncut"] = found.num_tokens_uncut
            row["num_images"] = found.num_images
            row["num_supervised_tokens"] = found.num_supervised_tokens
            row["usable"] = found.rejection is None
            remarks = found.remarks if found.rejection is None else (found.rejection,)
            entries += [
                LedgerEntry(
                    set_name=chunk.annotation_set.name,
                    file=str(path),
                    line=line,
                    identity=identity,
                    reason=remark.reason,
                    detail=remark.detail,
                )
                for remark in remarks
            ]
    return Measured(rows=rows, entries=tuple(entries))


def _measure_record(
    text: bytes, line: int, chunk: Chunk, tokenizer: Tokenizer
) -> tuple[str, Measure]:
    file = chunk.annotation_set.annotation
    try:
        record = parse_record(text, file=file, line=line)
    except DataError as error:
        detail = str(error).removeprefix(f"{file}:{line}: ")
        return "", Measure.rejected(Reason.MALFORMED_RECORD, detail)
    found = measure(record, tokenizer, chunk.settings)
    # pictures after the cut are not used; where the text is at fault, all of them should be known
    wanted = found.num_images if found.rejection is None else len(record.images)
    problems = _broken_images(record, chunk.annotation_set, wanted)
    if not problems:
        return record.identity, found
    if found.rejection is None:
        return record.identity, Measure.rejected(Reason.IMAGE_UNREADABLE, "; ".join(problems))
    detail = "; also ".join([found.rejection.detail, *problems])
    return record.identity, Measure.rejected(found.rejection.reason, detail)


def _broken_images(record: Record, entry: AnnotationSet, wanted: int) -> Sequence[str]:
    problems = []
    for path in image_paths(record, entry.root)[:wanted]:
        try:
            verify_image(path, augmented=entry.data_augment)
        except DataError as error:
            problems.append(str(error))
    return problems
