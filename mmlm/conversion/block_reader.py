"""Reads single blocks of Megatron's tensors out of HuggingFace's files, and no more of them.

A rank that holds a quarter of a matrix reads a quarter of its bytes. The values are those of
`entry_reader`, to the bit.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from mmlm.conversion.dtypes import cast
from mmlm.conversion.finite import FiniteCheck
from mmlm.conversion.hf_source import HFTensors
from mmlm.conversion.name_map import Entry
from mmlm.conversion.positions import POSITIONS, resize_positions
from mmlm.conversion.vocabulary import (
    EMBEDDING,
    HEAD,
    VocabularyPlan,
    mean_of_rows,
    new_embedding_rows,
)

Place = tuple[slice, ...]
"""A block: rows, columns, ...; one slice with a start and a stop a dimension."""


class BlockReader:
    """Makes blocks of the Megatron tensors of one model.

    Args:
        source: the files.
        entries: every tensor of the model, new rows of the vocabulary included.
        dtypes: Megatron name -> element type.
        plan: which rows are new.
        seed: of new embedding rows.
        check: looks at what is read; by default a new one.

    Attributes:
        bytes_read: bytes of the files that were asked for until now.
    """

    def __init__(
        self,
        source: HFTensors,
        entries: tuple[Entry, ...],
        dtypes: Mapping[str, torch.dtype],
        plan: VocabularyPlan,
        seed: int,
        check: FiniteCheck | None = None,
    ) -> None:
        self._source, self._dtypes, self._plan, self._seed = source, dtypes, plan, seed
        self._check = check or FiniteCheck()
        self._made: dict[str, Tensor] = {}
        self.bytes_read = 0
        self._entries = {entry.megatron_name: entry for entry in entries}

    def read(self, name: str, place: Place) -> Tensor:
        """One block of a tensor.

        Args:
            name: global name.
            place: where the block lies in the true shape.

        Returns:
            On the CPU, in the tensor's dtype; maybe a view of a file.
        """
        entry = self._entries[name]
        if name == POSITIONS and self._source.shapes_of(entry) != entry.hf_shapes:
            return self._once(entry, self._resized_positions)[place]
        if name not in (EMBEDDING, HEAD):
            return self._read(entry, place)
        old_rows, columns = self._plan.old_size, place[1]
        rows, new = place[0], slice(max(place[0].start, old_rows), place[0].stop)
        if new.start >= new.stop:
            return self._read(entry, place)
        made = self._once(entry, self._new_rows)
        made = made[new.start - old_rows : new.stop - old_rows, columns]
        if rows.start >= old_rows:
            return made
        return torch.cat((self._read(entry, (slice(rows.start, old_rows), columns)), made))

    def _read(self, entry: Entry, place: Place) -> Tensor:
        """A block of rows that are in the files."""
        dtype = self._dtypes[entry.megatron_name]
        rows, *rest = place
        runs = []
        for number, of_hf in entry.rule.row_runs(rows.start, rows.stop, entry.hf_shapes):
            hf_name = entry.hf_names[number]
            if all(
                columns == slice(0, size)
                for columns, size in zip(rest, entry.megatron_shape[1:], strict=True)
            ):
                block = self._source.read_rows(hf_name, of_hf.start, of_hf.stop)
            else:
                block = self._source.read_block(hf_name, (of_hf, *rest))
            self._check.look(block, hf_name, self._source.file(hf_name))
            runs.append(cast(block, dtype, hf_name))
            self.bytes_read += block.nbytes
        return runs[0] if len(runs) == 1 else torch.cat(runs)

    def _once(self, entry: Entry, make: Callable[[Entry], Tensor]) -> Tensor:
        """A small tensor that is made and not read, kept for the next block."""
        name = entry.megatron_name
        if name not in self._made:
            self._made[name] = make(entry)
        return self._made[name]

    def _resized_positions(self, entry: Entry) -> Tensor:
        (hf_name,) = entry.hf_names
        weight = self._source.read_rows(hf_name, 0, 1)
        self._check.look(weight, hf_name, self._source.file(hf_name))
        self.bytes_read += weight.nbytes
        resized = resize_positions(weight, entry.hf_shapes[0][1])
        return cast(resized, self._dtypes[entry.megatron_name], hf_name)

    def _new_rows(self, entry: Entry) -> Tensor:
        """The rows that the vocabulary has grown by, [new, h]."""
        dtype, width = self._dtypes[entry.megatron_name], entry.megatron_shape[1]
        if entry.megatron_name == EMBEDDING:
            return new_embedding_rows(self._plan, width, self._seed).to(dtype)
        columns = slice(0, width)
        mean = mean_of_rows(lambda rows: self._read(entry, (rows, columns)), self._plan.old_size)
        return mean.to(dtype).expand(self._plan.num_new_rows, -1)
