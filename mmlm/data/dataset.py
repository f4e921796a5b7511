"""All sets of a meta json as one list of samples.

Sample ids count through the sets in the order of the meta's keys, repeated lists included and
excluded records too, so an id does not change when a broken record is mended.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from mmlm.data.annotation import AnnotationSet, Record, parse_record, read_line, read_meta
from mmlm.data.ledger import Exclusion, strict_error, write_ledger
from mmlm.data.length_index import SetIndex, build_index, index_path, load_index
from mmlm.data.sample import Sample, SampleSettings, build_sample
from mmlm.data.step_plan import SampleTable
from mmlm.data.tokenizer import Tokenizer
from mmlm.errors import DataError
from mmlm.log import get_logger


class Dataset:
    """Random access to samples; safe to use from several threads.

    Attributes:
        indexes: one a set, in the order of the meta's keys.
        tokenizer: of the language model.
        settings: lengths and sizes.
        table: sizes of all samples, for the step plan.
    """

    def __init__(
        self, indexes: Sequence[SetIndex], tokenizer: Tokenizer, settings: SampleSettings
    ) -> None:
        """Concatenate sets; `open_dataset` is the usual way in.

        Args:
            indexes: one a set.
            tokenizer: of the language model.
            settings: lengths and sizes.
        """
        self.indexes = tuple(indexes)
        self.tokenizer = tokenizer
        self.settings = settings
        counts = [index.num_records * index.annotation_set.repeats for index in self.indexes]
        self._starts = np.cumsum([0, *counts])
        columns = {
            name: np.concatenate(
                [
                    np.tile(index.column(name), index.annotation_set.repeats)
                    for index in self.indexes
                ]
            )
            for name in ("num_tokens", "num_images", "num_supervised_tokens", "usable")
        }
        self.table = SampleTable(
            num_tokens=columns["num_tokens"],
            num_images=columns["num_images"],
            num_supervised_tokens=columns["num_supervised_tokens"],
            usable=np.flatnonzero(columns["usable"]).astype(np.int64, copy=False),
        )

    @property
    def exclusions(self) -> tuple[Exclusion, ...]:
        """Records that are left out, in the order of the sets."""
        return tuple(exclusion for index in self.indexes for exclusion in index.exclusions)

    def annotation_set(self, sample_id: int) -> AnnotationSet:
        """Return the set that a sample belongs to."""
        return self._locate(sample_id)[0].annotation_set

    def record(self, sample_id: int) -> Record:
        """Read the annotation record of a sample (one seek).

        Raises:
            DataError: the file is gone, or the line is not a record any more.
        """
        index, place = self._locate(sample_id)
        file = index.annotation_set.annotation
        text = read_line(file, int(index.column("offset")[place]))
        return parse_record(text, file=file, line=int(index.column("line")[place]))

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
    ``build=False``. The builder writes all exclusions to ``cache_dir/data_ledger.jsonl``.

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
    ledger = cache_dir / "data_ledger.jsonl"
    indexes = []
    for entry in read_meta(meta):
        if build:
            index = build_index(entry, tokenizer, settings, cache_dir, num_workers=num_workers)
        else:
            kept = load_index(entry, tokenizer, settings, cache_dir)
            if kept is None:
                raise DataError(
                    f"{index_path(entry, tokenizer, settings, cache_dir)}: the length index of set "
                    f"'{entry.name}' is missing; data.cache_dir must be shared by all ranks"
                )
            index = kept
        indexes.append(index)
    dataset = Dataset(indexes, tokenizer, settings)
    exclusions = dataset.exclusions
    if build:
        write_ledger(ledger, exclusions)
    if exclusions and (policy == "strict" or not len(dataset.table.usable)):
        raise strict_error(exclusions, sum(index.num_records for index in indexes), ledger)
    if exclusions and build:
        get_logger(__name__).warning(
            "%d records are left out (data.policy=skip); see %s", len(exclusions), ledger
        )
    return dataset
