"""Single samples by their number, straight from the annotation files: no length index is needed.

For looking at data and dumping it. Numbers count as `mmlm.data.dataset` counts them: from 0 through
all sets in the order of the meta's keys, repeated lists and unusable records included.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmlm.data.annotation import (
    AnnotationSet,
    IntArray,
    Record,
    parse_record,
    read_line,
    read_meta,
    scan_lines,
)
from mmlm.data.image import ByteArray
from mmlm.data.rejection import Reason, Rejection
from mmlm.data.sample import (
    SampleSettings,
    TokenizedSample,
    load_images,
    place_of,
    tokenize,
)
from mmlm.data.tokenizer import Tokenizer
from mmlm.errors import DataError


@dataclass(frozen=True, kw_only=True, eq=False)
class Place:
    """Where a sample stands."""

    sample_id: int
    """From 0, through all sets."""
    annotation_set: AnnotationSet
    """Its set."""
    offset: int
    """Byte of the annotation file at which its line starts."""
    line: int
    """Line number, from 1."""

    def __str__(self) -> str:
        return f"{self.annotation_set.annotation}:{self.line}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Look:
    """A sample as the model sees it, or why it does not."""

    place: Place
    """Where it stands."""
    record: Record | None
    """Its line; None where that cannot be parsed."""
    tokens: TokenizedSample | None
    """Ids and labels; None where the text cannot be used."""
    images: Sequence[ByteArray] | None
    """Squashed, uint8 [S, S, 3] each; None where one cannot be used or none was asked for."""
    rejection: Rejection | None = None
    """The rule that it breaks, if it does."""


class Lookup:
    """The samples of a meta json.

    Attributes:
        num_samples: of all sets together.
    """

    def __init__(self, meta: str | Path) -> None:
        """Find the lines of every set; nothing is parsed yet.

        Raises:
            DataError: the meta json or an annotation file cannot be read.
        """
        self._sets: list[tuple[AnnotationSet, IntArray, IntArray]] = []
        self.num_samples = 0
        for entry in read_meta(meta):
            offsets, lines = scan_lines(entry.annotation)
            used = entry.num_used(len(lines))
            self._sets.append((entry, offsets[:used], lines[:used]))
            self.num_samples += used * entry.repeats

    def place(self, sample_id: int) -> Place:
        """Return where a sample stands.

        Raises:
            DataError: there is no such sample.
        """
        start = sample_id
        for entry, offsets, lines in self._sets:
            count = len(lines) * entry.repeats
            if 0 <= start < count:
                row = start % len(lines)
                return Place(
                    sample_id=sample_id,
                    annotation_set=entry,
                    offset=int(offsets[row]),
                    line=int(lines[row]),
                )
            start -= count
        raise DataError(
            f"sample {sample_id} does not exist; the sets have {self.num_samples} samples, "
            f"numbered from 0 to {self.num_samples - 1}"
        )

    def record(self, place: Place) -> Record:
        """Read and parse the line of a sample.

        Raises:
            DataError: the line is not a record.
        """
        file = place.annotation_set.annotation
        return parse_record(read_line(file, place.offset), file=file, line=place.line)

    def num_images(self, sample_id: int) -> int:
        """Return how many pictures the record of a sample names; 0 where it cannot be parsed."""
        try:
            return len(self.record(self.place(sample_id)).images)
        except DataError:
            return 0

    def look(
        self,
        sample_id: int,
        tokenizer: Tokenizer,
        settings: SampleSettings,
        *,
        seed: int = 42,
        epoch: int = 0,
        with_pixels: bool = True,
    ) -> Look:
        """Make a sample; what is wrong with it is a value.

        Args:
            sample_id: from 0, through all sets.
            tokenizer: of the language model.
            settings: lengths and sizes.
            seed: seed of the run, for augmentation.
            epoch: from 0, for augmentation.
            with_pixels: decode its pictures.

        Raises:
            DataError: there is no such sample.
        """
        place = self.place(sample_id)
        try:
            record = self.record(place)
        except DataError as error:
            rejection = _rejection(Reason.MALFORMED_RECORD, error, f"{place}: ")
            return Look(place=place, record=None, tokens=None, images=None, rejection=rejection)
        tokens = tokenize(record, tokenizer, settings)
        if isinstance(tokens, Rejection):
            return Look(place=place, record=record, tokens=None, images=None, rejection=tokens)
        if not with_pixels:
            return Look(place=place, record=record, tokens=tokens, images=None)
        try:
            images = tuple(
                load_images(
                    record,
                    place.annotation_set,
                    tokens.num_images,
                    settings.image_size,
                    sample_id=sample_id,
                    seed=seed,
                    epoch=epoch,
                )
            )
        except DataError as error:
            prefix = f"{place_of(record, place.annotation_set)}: "
            rejection = _rejection(Reason.IMAGE_UNREADABLE, error, prefix)
            return Look(place=place, record=record, tokens=tokens, images=None, rejection=rejection)
        return Look(place=place, record=record, tokens=tokens, images=images)


def _rejection(reason: Reason, error: DataError, prefix: str) -> Rejection:
    """The message without the place, which is said beside it."""
    return Rejection(reason=reason, detail=str(error).removeprefix(prefix))
