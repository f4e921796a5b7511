"""Compares weights with weights, bit by bit: HuggingFace folders and checkpoints of any layout.

Everything is compared under HuggingFace names, a few rows at a time, so that memory does not grow
with the model. What differs is told with names, positions and values.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from mmlm.conversion.comparable import Weights
from mmlm.conversion.rules import Shape
from mmlm.conversion.vocabulary import VocabularyPlan, mean_of_rows, new_embedding_rows
from mmlm.data.tokenizer import NEW_TOKENS

EMBEDDING_SUFFIX = "model.embed_tokens.weight"
HEAD_SUFFIX = "lm_head.weight"

_CHUNK_BYTES = 4 * 2**20
"""What is compared at a time, of each side; larger blocks are mapped anew each time."""


@dataclass(kw_only=True)
class Comparison:
    """What was found."""

    differences: list[str] = field(default_factory=list)
    """A line each; empty when the weights are the same."""
    notes: list[str] = field(default_factory=list)
    """What is not the same and is as it should be."""
    num_equal: int = 0
    """Tensors that are the same to the bit."""
    checksum: str = ""
    """SHA-256 of names, shapes, dtypes and bits of the first side; the order does not matter."""


def compare(
    first: Weights,
    second: Weights,
    *,
    seed: int,
    max_positions: int = 3,
    on_bytes: Callable[[int], object] = lambda num_bytes: None,
) -> Comparison:
    """Compare every tensor.

    Where one side has at most nine rows more of the embedding and of the head, those must be what a
    conversion makes for the added tokens.

    Args:
        first: one side.
        second: the other.
        seed: that new embedding rows were made with.
        max_positions: elements of a tensor that are told when they differ.
        on_bytes: called with the bytes of the first side that were compared.
    """
    found = Comparison()
    for here, there in ((first, second), (second, first)):
        for name, shape in here.shapes.items():
            if name not in there.shapes:
                found.differences.append(f"{name} {list(shape)}: missing from {there.where}")
    digests = {}
    for name in first.shapes:
        if name in second.shapes:
            pair = _Pair(name, first, second, seed, max_positions)
            pair.compare(found, on_bytes)
            digests[name] = pair.digest
        else:
            digests[name] = _Pair(name, first, first, seed, 0).digest_alone(on_bytes)
    whole = hashlib.sha256()
    for name in sorted(digests):
        whole.update(f"{name} {list(first.shapes[name])} {first.dtypes[name]} ".encode())
        whole.update(digests[name])
    found.checksum = whole.hexdigest()
    return found


class _Pair:
    """One name on both sides."""

    def __init__(
        self, name: str, first: Weights, second: Weights, seed: int, max_positions: int
    ) -> None:
        self._name, self._first, self._second, self._seed = name, first, second, seed
        self._max_positions = max_positions
        self._hash = hashlib.sha256()

    @property
    def digest(self) -> bytes:
        """Of the first side's bits, once they were compared."""
        return self._hash.digest()

    def digest_alone(self, on_bytes: Callable[[int], object]) -> bytes:
        """Of a tensor that only the first side has."""
        for _, rows in self._rows():
            self._take(rows, on_bytes)
        return self.digest

    def compare(self, found: Comparison, on_bytes: Callable[[int], object]) -> None:
        """Compare the two and note what was found."""
        name = self._name
        shapes = self._first.shapes[name], self._second.shapes[name]
        dtypes = self._first.dtypes[name], self._second.dtypes[name]
        grown = _is_grown(name, *shapes)
        if shapes[0] != shapes[1] and not grown:
            found.differences.append(f"{name}: {list(shapes[0])} against {list(shapes[1])}")
            self.digest_alone(on_bytes)
            return
        shared = min(shapes[0][0], shapes[1][0])
        count = 0
        positions: list[str] = []
        for start, rows in self._rows():
            self._take(rows, on_bytes)
            mine = rows[: max(0, shared - start)]
            other = self._second.read_rows(name, start, start + len(mine)) if len(mine) else mine
            differs = _differs(mine, other)
            if differs is None:
                continue
            count += int(differs.sum())
            for place in differs.nonzero()[: self._max_positions - len(positions)].tolist():
                position = [place[0] + start, *place[1:]]
                values = (_value(each[tuple(place)]) for each in (mine, other))
                positions.append(f"{position} {' against '.join(values)}")
        lines = []
        if dtypes[0] != dtypes[1]:
            same = "" if count else ", equal values"
            lines.append(f"{_dtype(dtypes[0])} against {_dtype(dtypes[1])}{same}")
        if count:
            many = f"{count} of {prod(shapes[0])} elements differ"
            lines.append(f"{many}, first at {'; '.join(positions)}")
        if grown:
            self._judge_new_rows(shared, lines, found.notes)
        found.differences += [f"{name}: {line}" for line in lines]
        found.num_equal += not lines

    def _judge_new_rows(self, shared: int, lines: list[str], notes: list[str]) -> None:
        """Rows that one side has more: those of the added tokens, or a difference."""
        larger = max(self._first, self._second, key=lambda side: side.shapes[self._name][0])
        smaller = self._first if larger is self._second else self._second
        rows, width = larger.shapes[self._name]
        made = larger.read_rows(self._name, shared, rows)
        if self._name.endswith(HEAD_SUFFIX):
            mean = mean_of_rows(lambda part: _part(smaller, self._name, part), shared)
            wanted, rule = mean.to(made.dtype).expand(rows - shared, -1), "the mean of the old rows"
        else:
            plan = VocabularyPlan(old_size=shared, new_size=rows, added_tokens={}, new_tokens={})
            wanted = new_embedding_rows(plan, width, self._seed).to(made.dtype)
            rule = f"drawn with seed {self._seed}"
        which = f"rows {shared} to {rows - 1}, which only {larger.where} has,"
        if _differs(made, wanted) is None:
            notes.append(f"{self._name}: {which} are those of added tokens: {rule}")
        else:
            lines.append(f"{which} are not {rule}")

    def _rows(self) -> Iterator[tuple[int, Tensor]]:
        """The tensor of the first side, some rows at a time, each with its first row."""
        side, name = self._first, self._name
        num_rows, *others = side.shapes[name]
        step = max(1, _CHUNK_BYTES // (prod(others) * side.dtypes[name].itemsize))
        for start in range(0, num_rows, step):
            yield start, side.read_rows(name, start, min(start + step, num_rows))

    def _take(self, rows: Tensor, on_bytes: Callable[[int], object]) -> None:
        self._hash.update(_bits(rows).numpy().data)
        on_bytes(rows.nbytes)


def _part(side: Weights, name: str, rows: slice) -> Tensor:
    return side.read_rows(name, rows.start, rows.stop)


def _is_grown(name: str, first: Shape, second: Shape) -> bool:
    """Whether one side may have rows for added tokens that the other lacks."""
    return (
        name.endswith((EMBEDDING_SUFFIX, HEAD_SUFFIX))
        and first[1:] == second[1:]
        and 0 < abs(first[0] - second[0]) <= len(NEW_TOKENS)
    )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _differs(first: Tensor, second: Tensor) -> Tensor | None:
    """Which elements differ, None if none: in bits, or in value where the types differ."""
    if first.dtype != second.dtype:
        wide = torch.promote_types(first.dtype, second.dtype)
        first, second = first.to(wide), second.to(wide)
    if torch.equal(_bits(first), _bits(second)):
        return None
    size = first.dtype.itemsize
    rows = _bits(first).view(-1, size) != _bits(second).view(-1, size)
    return rows.any(dim=1).view(first.shape)


def _value(element: Tensor) -> str:
    bits = bytes(reversed(_bits(element).tolist())).hex()
    return f"{element.item():.9g} (0x{bits})"


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
