"""All sets of a meta json as one list of samples.

Sample ids count through the sets in the order of the meta's keys, repeated lists included and
excluded records too, so an id does not change when a broken record is mended.
"""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mmlm.data.annotation import AnnotationSet, IntArray, Record, parse_record, read_line, read_meta
from mmlm.data.index_build import build_indexes
from mmlm.data.ledger import LEDGER_FILE, LedgerEntry, strict_error, write_ledger
from mmlm.data.length_index import SetIndex, index_path, load_index
from mmlm.data.sample import Sample, SampleSettings, build_sample
from mmlm.data.step_plan import SampleTable
from mmlm.data.tokenizer import Tokenizer
from mmlm.errors import DataError
from mmlm.log import get_logger


class Dataset:
    """Random access to samples; safe to use from several threads, and cheap to pickle.

    Attributes:
        indexes: one a set, in the order of the meta's keys.
        tokenizer: of the language model.
        settings: lengths and sizes.
        ledger_file: where all that is said of the records is written.
    """

    def __init__(
        self,
        indexes: Sequence[SetIndex],
        tokenizer: Tokenizer,
        settings: SampleSettings,
        ledger_file: Path | None = None,
    ) -> None:
        """Concatenate sets; `open_dataset` is the usual way in.

        Args:
            indexes: one a set.
            tokenizer: of the language model.
            settings: lengths and sizes.
            ledger_file: for messages.
        """
        self.indexes = tuple(indexes)
        self.tokenizer = tokenizer
        self.settings = settings
        self.ledger_file = ledger_file
        counts = [index.num_records * index.annotation_set.repeats for index in self.indexes]
        self._starts = np.cumsum([0, *counts])

    @cached_property
    def table(self) -> SampleTable:
        """Sizes of all samples, for the step plan; processes that only decode never make it."""
        return SampleTable(
            num_tokens=self._concatenate("num_tokens"),
            num_images=self._concatenate("num_images"),
            num_supervised_tokens=self._concatenate("num_supervised_tokens"),
            usable=np.flatnonzero(self._concatenate("usable")),
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process maps the same files, instead of being sent megabytes."""
        return Dataset, (self.indexes, self.tokenizer, self.settings, self.ledger_file)

    def _concatenate(self, name: str) -> IntArray:
        """A column of all sets, int32 [samples]: the narrowest that arithmetic is safe in."""
        column = np.empty(self._starts[-1], dtype=np.int32)
        for index, start in zip(self.indexes, self._starts.tolist(), strict=False):
            end = start + index.num_records * index.annotation_set.repeats
            # one row a repeat; what is assigned is stretched over all of them
            column[start:end].reshape(-1, index.num_records)[:] = index.column(name)
        return column

    @property
    def exclusions(self) -> tuple[LedgerEntry, ...]:
        """Records that are left out, in the order of the sets; reads the ledgers."""
        return tuple(entry for index in self.indexes for entry in index.exclusions())

    def ledger(self) -> tuple[LedgerEntry, ...]:
        """Records that are not used as they stand, in the order of the sets; reads the ledgers."""
        return tuple(entry for index in self.indexes for entry in index.ledger())

    def annotation_set(self, sample_id: int) -> AnnotationSet:
        """Return the set that a sample belongs to."""
        return self._locate(sample_id)[0].annotation_set

    def record(self, sample_id: int) -> Record:
        """Read the annotation record of a sample (one seek).

        Raises:
            DataError: the file is gone or was edited, or the line is not a record.
        """
        index, place = self._locate(sample_id)
        file, row = index.annotation_set.annotation, index.rows[place]
        text = read_line(file, int(row["offset"]), index.stamp)
        return parse_record(text, file=file, line=int(row["line"]))

    def sample(self, sample_id: int, *, seed: int, epoch: int, with_pixels: bool) -> Sample:
        """Build one sample.

        Args:
            sample_id: from 0, through all sets.
            seed: seed of the run, for augmentation.
            epoch: from 0, for augmentation.
            with_pixels: decode the pictures.

        Raises:
            DataError: the sample cannot be built, or is not what was measured; names its place.
        """
        record = self.record(sample_id)
        sample = build_sample(
            record,
            self.annotation_set(sample_id),
            self.tokenizer,
            self.settings,
            sample_id=sample_id,
            seed=seed,
            epoch=epoch,
            with_pixels=with_pixels,
        )
        if len(sample.input_ids) != self.table.num_tokens[sample_id]:
            raise DataError(
                f"{record.place}: {len(sample.input_ids)} tokens where the length index has "
                f"{self.table.num_tokens[sample_id]}; the annotation file changed during the run, "
                "start again"
            )
        return sample

    def _locate(self, sample_id: int) -> tuple[SetIndex, int]:
        number = int(np.searchsorted(self._starts, sample_id, side="right")) - 1
        index = self.indexes[number]
        return index, int(sample_id - self._starts[number]) % index.num_records


def cache_folder(cache_dir: str | Path, meta: str | Path) -> Path:
    """Return where the indexes of a meta json are kept below ``data.cache_dir``."""
    name = hashlib.sha256(str(Path(meta).resolve()).encode()).hexdigest()[:8]
    return Path(cache_dir) / f"{Path(meta).stem}-{name}"


def open_dataset(
    meta: str | Path,
    tokenizer: Tokenizer,
    settings: SampleSettings,
    *,
    cache_dir: str | Path,
    policy: Literal["strict", "skip"] = "strict",
    num_workers: int = 1,
    build: bool = True,
) -> Dataset:
    """Read the meta json and the length index of each set.

    One process calls this with ``build=True``; when it is done, the others call it with
    ``build=False``. The builder writes what is left out, cut or changed to
    ``cache_dir/data_ledger.jsonl``.

    Args:
        meta: the meta json.
        tokenizer: of the language model.
        settings: lengths and sizes.
        cache_dir: where indexes and the ledger are kept.
        policy: ``strict`` refuses data with a broken record; ``skip`` leaves it out.
        num_workers: processes that measure.
        build: measure what is not in the cache.

    Raises:
        DataError: a file is missing; a record is broken (strict); nothing is left (skip).
    """
    cache_dir = Path(cache_dir)
    sets = read_meta(meta)
    if build:
        indexes = build_indexes(sets, tokenizer, settings, cache_dir, num_workers=num_workers)
    else:
        indexes = [_kept_index(entry, tokenizer, settings, cache_dir) for entry in sets]
    dataset = Dataset(indexes, tokenizer, settings, cache_dir / LEDGER_FILE)
    if build:
        keep_ledger(dataset, cache_dir / LEDGER_FILE)
    exclusions = dataset.exclusions
    if exclusions and (policy == "strict" or not len(dataset.table.usable)):
        num_records = sum(index.num_records for index in indexes)
        raise strict_error(exclusions, num_records, cache_dir / LEDGER_FILE)
    if exclusions and build:
        get_logger(__name__).warning(
            "%d records are left out (data.policy=skip); see %s",
            len(exclusions),
            cache_dir / LEDGER_FILE,
        )
    return dataset


def _kept_index(
    entry: AnnotationSet, tokenizer: Tokenizer, settings: SampleSettings, cache_dir: Path
) -> SetIndex:
    index = load_index(entry, tokenizer, settings, cache_dir)
    if index is None:
        raise DataError(
            f"{index_path(entry, tokenizer, settings, cache_dir)}: the length index of set "
            f"'{entry.name}' is missing; data.cache_dir must be shared by all ranks"
        )
    return index


def keep_ledger(dataset: Dataset, path: Path) -> None:
    """Write the ledgers of all sets as one file.

    Raises:
        DataError: the disk is full or the folder cannot be written.
    """
    try:
        write_ledger(path, dataset.ledger())
    except OSError as error:
        raise DataError(
            f"{path}: cannot write the ledger ({error.strerror}); free the disk, or set "
            "data.cache_dir to another folder"
        ) from error
