"""The length index of a set: where its records stand and how long they are, kept and mapped.

The index is one memory-mapped ``.npy`` file under a name that changes with anything that could
change a length or a judgement: the annotation file (path, size, time), the set's entry in the meta
json, the tokenizer, the settings. Beside it lies the set's ledger. `mmlm.data.index_build` makes
both.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mmlm.data.annotation import AnnotationSet, FileStamp, IntArray, file_stamp
from mmlm.data.ledger import LedgerEntry, read_ledger, temporary_path, write_ledger
from mmlm.data.rejection import Action
from mmlm.data.sample import SampleSettings
from mmlm.data.tokenizer import Tokenizer
from mmlm.errors import DataError

FORMAT_VERSION = 3
"""Part of the fingerprint: an index of another version is not found, and so measured again."""

INDEX_DTYPE = np.dtype(
    [
        ("offset", "<i8"),  # of the line, bytes
        ("identity", "<u8"),  # `identity_hash` of the record's id
        ("line", "<i4"),  # from 1
        ("num_tokens", "<i4"),  # after the cut
        ("num_tokens_uncut", "<i4"),  # before it
        ("num_supervised_tokens", "<i4"),  # after the cut
        ("num_images", "u1"),  # after the cut
        ("usable", "u1"),  # 0 or 1; all sizes of a record that is left out are 0
    ]
)
"""One record of the index, 34 bytes."""

Rows = npt.NDArray[np.void]


@dataclass(frozen=True, kw_only=True, eq=False)
class SetIndex:
    """Sizes and places of the used records of one set, not repeated.

    Only the path travels when it is pickled; the other process maps the file itself.
    """

    annotation_set: AnnotationSet
    """The set."""
    path: Path
    """The index file."""
    stamp: FileStamp
    """Size and time of the annotation file that was measured."""
    rows: Rows = field(init=False, repr=False)
    """`INDEX_DTYPE` [records], memory-mapped."""

    def __post_init__(self) -> None:
        """Map the file.

        Raises:
            DataError: it is damaged.
        """
        try:
            rows = np.load(self.path, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise DataError(
                f"{self.path}: the length index cannot be read ({error}); remove the file to have "
                "the set measured again"
            ) from error
        object.__setattr__(self, "rows", rows)

    def __reduce__(self) -> tuple[Any, ...]:
        return _map_index, (self.annotation_set, self.path, self.stamp)

    def column(self, name: str) -> IntArray:
        """Return a field of `INDEX_DTYPE`: a strided view of the file, [records]."""
        column: IntArray = self.rows[name]
        return column

    @property
    def num_records(self) -> int:
        """Used records, before repeating."""
        return len(self.rows)

    @property
    def num_usable(self) -> int:
        """Records that are trained on, before repeating."""
        return int(np.count_nonzero(self.rows["usable"]))

    @property
    def ledger_path(self) -> Path:
        """The set's own ledger."""
        return self.path.with_suffix(".jsonl")

    def ledger(self) -> tuple[LedgerEntry, ...]:
        """Read what is said of the records, in the order of the lines."""
        return read_ledger(self.ledger_path)

    def exclusions(self) -> tuple[LedgerEntry, ...]:
        """Records that cannot be used; reads the ledger only where there are some."""
        if self.num_usable == self.num_records:
            return ()
        return tuple(entry for entry in self.ledger() if entry.action == Action.EXCLUDED)


def _map_index(annotation_set: AnnotationSet, path: Path, stamp: FileStamp) -> SetIndex:
    return SetIndex(annotation_set=annotation_set, path=path, stamp=stamp)


def identity_hash(identity: str) -> int:
    """Return 64 bits of a record's id, so that doubles can be found; 0 for a record without."""
    if not identity:
        return 0
    digest = hashlib.blake2b(identity.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def index_path(
    annotation_set: AnnotationSet, tokenizer: Tokenizer, settings: SampleSettings, cache_dir: Path
) -> Path:
    """Return where the index of a set is kept; the name is a fingerprint of all it depends on.

    Raises:
        DataError: the annotation file is gone.
    """
    return _path_of(
        annotation_set, tokenizer, settings, cache_dir, file_stamp(annotation_set.annotation)
    )


def _path_of(
    annotation_set: AnnotationSet,
    tokenizer: Tokenizer,
    settings: SampleSettings,
    cache_dir: Path,
    stamp: FileStamp,
) -> Path:
    file = annotation_set.annotation
    source = {
        "version": FORMAT_VERSION,
        "name": annotation_set.name,
        "annotation": [str(file.resolve()), *stamp],
        "root": str(annotation_set.root.resolve()),
        "data_augment": annotation_set.data_augment,
        "share": min(1, annotation_set.repeat_time),
        "tokenizer": tokenizer.fingerprint,
        "settings": asdict(settings),
    }
    digest = hashlib.sha256(json.dumps(source, sort_keys=True).encode()).hexdigest()
    return cache_dir / f"{file.stem}-{digest[:16]}.npy"


def load_index(
    annotation_set: AnnotationSet, tokenizer: Tokenizer, settings: SampleSettings, cache_dir: Path
) -> SetIndex | None:
    """Map the kept index of a set; None where there is none for the file as it is now.

    Raises:
        DataError: the annotation file is gone, or the index is damaged.
    """
    stamp = file_stamp(annotation_set.annotation)
    path = _path_of(annotation_set, tokenizer, settings, cache_dir, stamp)
    if not path.is_file():
        return None
    return SetIndex(annotation_set=annotation_set, path=path, stamp=stamp)


def write_index(path: Path, rows: Rows, entries: Sequence[LedgerEntry]) -> None:
    """Keep an index and its ledger.

    Args:
        path: from `index_path`.
        rows: `INDEX_DTYPE` [records].
        entries: the ledger, in the order of the lines.
    """
    write_ledger(path.with_suffix(".jsonl"), entries)
    temporary = temporary_path(path)  # ends in .npy as well, or numpy would add that
    np.save(temporary, rows)
    temporary.replace(path)  # its presence means that both are complete
