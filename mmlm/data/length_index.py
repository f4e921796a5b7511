"""Sizes of every record of a set, measured once and kept.

The index of a set is one memory-mapped ``.npy`` file under a name that changes with anything that
could change a length: the annotation file (path, size, time), the tokenizer, the settings. Building
it also decodes every picture, so that broken data is known before training starts.
"""

import hashlib
import json
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mmlm.data.annotation import AnnotationSet, IntArray, parse_record, scan_lines
from mmlm.data.image import verify_image
from mmlm.data.ledger import Exclusion, read_ledger, write_ledger
from mmlm.data.rejection import Reason, Rejection
from mmlm.data.sample import Measure, SampleSettings, image_paths, measure
from mmlm.data.tokenizer import Tokenizer
from mmlm.errors import DataError
from mmlm.log import get_logger

_FORMAT_VERSION = 1
_COLUMNS = ("offset", "line", "num_tokens", "num_images", "num_supervised_tokens", "usable")
_CHUNK = 256
_MIN_RECORDS_PER_PROCESS = 2048  # below this, starting a process costs more than it saves


@dataclass(frozen=True, kw_only=True, eq=False)
class SetIndex:
    """Sizes and places of the used records of one set, not repeated."""

    annotation_set: AnnotationSet
    """The set."""
    columns: IntArray
    """int64 [6, records], memory-mapped."""
    exclusions: tuple[Exclusion, ...]
    """Records that cannot be used."""

    def column(self, name: str) -> IntArray:
        """Return ``offset``, ``line``, ``num_tokens``, ``num_images``, ``num_supervised_tokens``
        or ``usable`` (0 or 1), int64 [records]."""
        column: IntArray = self.columns[_COLUMNS.index(name)]
        return column

    @property
    def num_records(self) -> int:
        """Used records, before repeating."""
        return len(self.column("line"))


@dataclass(frozen=True, kw_only=True, eq=False)
class _Chunk:
    """Work of one process for a few seconds."""

    annotation_set: AnnotationSet
    tokenizer_folder: Path
    settings: SampleSettings
    offsets: IntArray
    lines: IntArray


def index_path(
    annotation_set: AnnotationSet, tokenizer: Tokenizer, settings: SampleSettings, cache_dir: Path
) -> Path:
    """Return where the index of a set is kept; the name is a fingerprint of all it depends on."""
    file = annotation_set.annotation
    status = file.stat()
    share = min(1, annotation_set.repeat_time)
    source = {
        "version": _FORMAT_VERSION,
        "name": annotation_set.name,
        "annotation": [str(file.resolve()), status.st_size, status.st_mtime_ns],
        "root": str(annotation_set.root.resolve()),
        "share": share,
        "tokenizer": tokenizer.fingerprint,
        "settings": asdict(settings),
    }
    digest = hashlib.sha256(json.dumps(source, sort_keys=True).encode()).hexdigest()
    return cache_dir / f"{file.stem}-{digest[:16]}.npy"


def load_index(
    annotation_set: AnnotationSet, tokenizer: Tokenizer, settings: SampleSettings, cache_dir: Path
) -> SetIndex | None:
    """Map the kept index of a set; None where there is none."""
    path = index_path(annotation_set, tokenizer, settings, cache_dir)
    if not path.is_file():
        return None
    return SetIndex(
        annotation_set=annotation_set,
        columns=np.load(path, mmap_mode="r"),
        exclusions=read_ledger(path.with_suffix(".jsonl")),
    )


def build_index(
    annotation_set: AnnotationSet,
    tokenizer: Tokenizer,
    settings: SampleSettings,
    cache_dir: Path,
    *,
    num_workers: int = 1,
) -> SetIndex:
    """Return the kept index of a set, or measure all its records and keep the result.

    Records that were excluded because of a picture are looked at again, since mending a picture
    does not change the annotation file. Called by one process at a time.

    Args:
        annotation_set: the set.
        tokenizer: of the language model.
        settings: lengths and sizes.
        cache_dir: where indexes are kept; made if missing.
        num_workers: processes that measure.

    Raises:
        DataError: the set has no record, or a process was killed.
    """
    cache_dir.mkdir(parents=True, exist_ok=True)
    path = index_path(annotation_set, tokenizer, settings, cache_dir)
    kept = load_index(annotation_set, tokenizer, settings, cache_dir)
    if kept is None:
        offsets, lines = _used_lines(annotation_set)
        columns = np.zeros((len(_COLUMNS), len(offsets)), dtype=np.int64)
        columns[:2] = offsets, lines
        places = np.arange(len(offsets))
        exclusions: list[Exclusion] = []
    else:
        broken = [e.line for e in kept.exclusions if e.rejection.reason == Reason.IMAGE_UNREADABLE]
        if not broken:
            return kept
        columns = np.array(kept.columns)
        places = np.flatnonzero(np.isin(kept.column("line"), broken))
        exclusions = [exclusion for exclusion in kept.exclusions if exclusion.line not in broken]
    chunks = [
        _Chunk(
            annotation_set=annotation_set,
            tokenizer_folder=tokenizer.folder,
            settings=settings,
            offsets=columns[0, part],
            lines=columns[1, part],
        )
        for part in (places[start : start + _CHUNK] for start in range(0, len(places), _CHUNK))
    ]
    sizes: list[IntArray] = []
    with tqdm(total=len(places), desc=f"index {annotation_set.name}", unit="sample") as bar:
        for measured, excluded in _measure_all(chunks, tokenizer, num_workers):
            sizes.append(measured)
            exclusions += excluded
            bar.update(measured.shape[1])
    columns[2:, places] = np.concatenate(sizes, axis=1)
    exclusions.sort(key=lambda exclusion: exclusion.line)
    _keep(path, columns, exclusions)
    index = load_index(annotation_set, tokenizer, settings, cache_dir)
    assert index is not None, "it was just written"
    return index


def _used_lines(annotation_set: AnnotationSet) -> tuple[IntArray, IntArray]:
    offsets, lines = scan_lines(annotation_set.annotation)
    used = annotation_set.num_used(len(offsets))
    if used == 0:
        raise DataError(
            f"{annotation_set.annotation}: set '{annotation_set.name}' gives no record "
            f"({len(offsets)} in the file, repeat_time {annotation_set.repeat_time}); fill it or "
            "remove the set from the meta json"
        )
    promised = annotation_set.length
    if promised is not None and promised not in (len(offsets), used):
        get_logger(__name__).warning(
            "%s: %d records, but the meta json promises %d for set '%s'; is the download complete?",
            annotation_set.annotation,
            len(offsets),
            promised,
            annotation_set.name,
        )
    return offsets[:used], lines[:used]


def _keep(path: Path, columns: IntArray, exclusions: Sequence[Exclusion]) -> None:
    write_ledger(path.with_suffix(".jsonl"), exclusions)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.npy")
    np.save(temporary, columns)
    temporary.replace(path)  # its presence means that the index is complete


def _measure_all(
    chunks: Sequence[_Chunk], tokenizer: Tokenizer, num_workers: int
) -> Iterator[tuple[IntArray, list[Exclusion]]]:
    num_records = sum(len(chunk.offsets) for chunk in chunks)
    num_processes = min(num_workers, num_records // _MIN_RECORDS_PER_PROCESS)
    if num_processes < 2:
        for chunk in chunks:
            yield _measure_chunk(chunk, tokenizer)
        return
    # Spawned, not forked: the trainer's process has threads (gloo, CUDA) that a fork would break.
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(num_processes, mp_context=context) as pool:
            yield from pool.map(_measure_chunk, chunks)
    except BrokenProcessPool as error:
        raise DataError(
            f"a process that measured set '{chunks[0].annotation_set.name}' was killed (out of "
            f"memory?); lower data.num_workers from {num_workers}"
        ) from error


def _measure_chunk(
    chunk: _Chunk, tokenizer: Tokenizer | None = None
) -> tuple[IntArray, list[Exclusion]]:
    """Return the last four columns of a chunk and its exclusions; runs in a process of the pool."""
    tokenizer = tokenizer or Tokenizer(chunk.tokenizer_folder)
    sizes = np.zeros((len(_COLUMNS) - 2, len(chunk.offsets)), dtype=np.int64)
    exclusions = []
    with chunk.annotation_set.annotation.open("rb") as file:
        for place, (offset, line) in enumerate(
            zip(chunk.offsets.tolist(), chunk.lines.tolist(), strict=True)
        ):
            file.seek(offset)
            identity, found = _measure_record(file.readline(), line, chunk, tokenizer)
            if found.rejection is None:
                sizes[:, place] = (
                    found.num_tokens,
                    found.num_images,
                    found.num_supervised_tokens,
                    1,
                )
            else:
                exclusions.append(
                    Exclusion(
                        set_name=chunk.annotation_set.name,
                        file=str(chunk.annotation_set.annotation),
                        line=line,
                        identity=identity,
                        rejection=found.rejection,
                    )
                )
    return sizes, exclusions


def _measure_record(
    text: bytes, line: int, chunk: _Chunk, tokenizer: Tokenizer
) -> tuple[str, Measure]:
    file = chunk.annotation_set.annotation
    try:
        record = parse_record(text, file=file, line=line)
    except DataError as error:
        detail = str(error).removeprefix(f"{file}:{line}: ")
        return "", _rejected(Reason.MALFORMED_RECORD, detail)
    found = measure(record, tokenizer, chunk.settings)
    paths = image_paths(record, chunk.annotation_set.root)
    for path in paths[: found.num_images]:
        try:
            verify_image(path)
        except DataError as error:
            return record.identity, _rejected(Reason.IMAGE_UNREADABLE, str(error))
    return record.identity, found


def _rejected(reason: Reason, detail: str) -> Measure:
    return Measure(
        num_tokens=0,
        num_images=0,
        num_supervised_tokens=0,
        rejection=Rejection(reason=reason, detail=detail),
    )
