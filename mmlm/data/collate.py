"""From packed rows of samples to the tensors of one microbatch.

Letters: t tokens of the microbatch (all rows one after the other), n images, S pixels a side.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from mmlm.data.annotation import IntArray
from mmlm.data.sample import IGNORE, Sample


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One microbatch of one data-parallel rank, as a flat stream of tokens."""

    input_ids: torch.Tensor
    """int64 [t]; padding is 0."""
    labels: torch.Tensor
    """int64 [t], shifted; 0 where `loss_mask` is 0."""
    loss_mask: torch.Tensor
    """float32 [t]: final weight of each token; the loss of an iteration is the plain sum of
    ``loss_mask * cross_entropy`` over all microbatches and data-parallel ranks."""
    position_ids: torch.Tensor
    """int64 [t], from 0 in each segment."""
    segment_lengths: tuple[int, ...]
    """Lengths of the samples (and padding) in order; their sum is t. Attention stays inside."""
    pixel_values: torch.Tensor | None
    """float32 [n, 3, S, S]; None on ranks that need no pixels."""
    image_ids: torch.Tensor
    """int64 [n]: global image ids."""
    image_positions: torch.Tensor
    """int64 [n * embeddings_per_image]: where in the stream the embeddings go, in order."""
    sample_ids: tuple[int, ...]
    """Samples in order; padding segments have none."""

    def pin_memory(self) -> "Batch":
        """Return the batch in page-locked memory, from which copies to a GPU are asynchronous."""
        tensors: dict[str, Any] = {
            name: value.pin_memory()
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor)
        }
        return replace(self, **tensors)


def collate(
    rows: Sequence[Sequence[Sample]],
    token_weights: Mapping[int, float],
    *,
    image_size: int,
    with_pixels: bool = True,
    pad_to_multiple_of: int = 1,
    min_length: int = 1,
    pad_rows: bool = False,
) -> Batch:
    """Lay the rows of a microbatch one after the other.

    A row without samples gives one inert padding token; the stream's end is padded, as a segment of
    its own, to the asked length. Padding has weight 0 and no image, and is computed like any token.

    Args:
        rows: samples of each packed row.
        token_weights: sample id to the final weight of each of its supervised tokens.
        image_size: S, so that a microbatch without images still has a shape.
        with_pixels: whether the samples carry pixels; otherwise ``pixel_values`` is None.
        pad_to_multiple_of: t is a multiple of this (sequence parallelism needs TP).
        min_length: t is at least this.
        pad_rows: pad each row, by a segment of its own, to the longest: the cost of batches that
            are not packed.

    Returns:
        The batch, on the CPU.
    """
    segments: list[Sample | int] = []  # an int is that many padding tokens
    longest = max((sum(map(_length, row)) for row in rows), default=0)
    for row in rows:
        padding = longest - sum(map(_length, row)) if pad_rows else 0 if row else 1
        segments += [*row, padding] if padding else row
    length = sum(_length(segment) for segment in segments)
    wanted = max(length, min_length, 1)
    wanted += -wanted % pad_to_multiple_of
    if wanted > length:
        segments.append(wanted - length)

    input_ids = np.zeros(wanted, dtype=np.int64)
    labels = np.zeros(wanted, dtype=np.int64)
    loss_mask = np.zeros(wanted, dtype=np.float32)
    position_ids = np.empty(wanted, dtype=np.int64)
    image_positions: list[IntArray] = []
    start = 0
    for segment in segments:
        end = start + _length(segment)
        position_ids[start:end] = np.arange(end - start)
        if not isinstance(segment, int):
            supervised = segment.labels != IGNORE
            input_ids[start:end] = segment.input_ids
            labels[start:end] = np.where(supervised, segment.labels, 0)
            loss_mask[start:end] = supervised * np.float32(token_weights[segment.sample_id])
            image_positions.append(segment.image_positions + start)
        start = end

    samples = [segment for segment in segments if not isinstance(segment, int)]
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        loss_mask=torch.from_numpy(loss_mask),
        position_ids=torch.from_numpy(position_ids),
        segment_lengths=tuple(_length(segment) for segment in segments),
        pixel_values=_pixels(samples, image_size) if with_pixels else None,
        image_ids=torch.from_numpy(_join([sample.image_ids for sample in samples])),
        image_positions=torch.from_numpy(_join(image_positions)),
        sample_ids=tuple(sample.sample_id for sample in samples),
    )


def _length(segment: Sample | int) -> int:
    return segment if isinstance(segment, int) else len(segment.input_ids)


def _join(arrays: Sequence[IntArray]) -> IntArray:
    return np.concatenate([np.empty(0, dtype=np.int64), *arrays])


def _pixels(samples: Sequence[Sample], image_size: int) -> torch.Tensor:
    blocks = [np.empty((0, 3, image_size, image_size), dtype=np.float32)]
    for sample in samples:
        assert sample.pixel_values is not None, "the loader asked for pixels"
        blocks.append(sample.pixel_values)
    return torch.from_numpy(np.concatenate(blocks))
