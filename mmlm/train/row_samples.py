"""Whose rows they are: from rows of a layer's tensor to the samples of the microbatch.

Legend: r rows of the tensor (its first dimension), t tokens, k supervised positions.
"""

import re
from itertools import accumulate, pairwise
from typing import Literal

import torch
from torch import Tensor

from mmlm.config.model import ModelConfig
from mmlm.data.collate import Batch
from mmlm.data.sample import MAX_IMAGES_PER_SAMPLE
from mmlm.train.forward_step import label_positions

Unit = Literal["picture", "patch", "embedding", "token", "label"]
"""What a row of a tensor is: a whole picture, a token of the vision tower, an image embedding, a
token of the text stream, or a supervised position."""

_UNITS: tuple[tuple[re.Pattern[str], Unit], ...] = (
    (re.compile(r"pixel_values|vision_model\.patch_embedding"), "picture"),
    (re.compile(r"vision_model\.decoder\.layers\.\d+"), "patch"),
    (re.compile(r"vision_projection\.\w+"), "embedding"),
    (re.compile(r"language_model\.embedding"), "token"),
    (re.compile(r"language_model\.decoder\.(layers\.\d+|final_layernorm)"), "token"),
    (re.compile(r"language_model\.output_layer"), "label"),
)
_SHARED: tuple[Unit, ...] = ("patch", "token")  # between the TP ranks, with sequence parallelism


def row_unit(layer: str) -> Unit | None:
    """Return what the rows of a layer's output are; None where they are not told apart.

    Inside a layer they may be some of the rows only (drop path) or those of other TP ranks as well
    (sequence parallelism); whatever is wrong there is in the layer's output too.

    Args:
        layer: global name of a module, or ``pixel_values``.
    """
    return next((unit for pattern, unit in _UNITS if pattern.fullmatch(layer)), None)


def token_owners(batch: Batch) -> Tensor:
    """Return the sample of each token, int64 [t]; -1 in padding."""
    owners = torch.full((len(batch.input_ids),), -1, dtype=torch.int64)
    samples = iter(batch.sample_ids)
    for start, end in pairwise([0, *accumulate(batch.segment_lengths)]):
        # every sample has a supervised token and padding has none
        if bool((batch.loss_mask[start:end] > 0).any()):
            owners[start:end] = next(samples)
    return owners


def samples_of_rows(
    bad: Tensor,
    unit: Unit,
    batch: Batch,
    model: ModelConfig,
    *,
    sequence_parallel_rank: int | None = None,
) -> tuple[int, ...]:
    """Return the global ids of the samples that some rows belong to, ascending.

    Args:
        bad: bool [r] on the CPU, which rows are meant.
        unit: what a row is.
        batch: the microbatch.
        model: sizes.
        sequence_parallel_rank: the TP rank, where the TP ranks share tokens; otherwise None.
    """
    of_image = batch.image_ids // MAX_IMAGES_PER_SAMPLE
    if unit == "picture":
        owners = of_image
    elif unit == "patch":
        owners = of_image.repeat_interleave(model.vision.tokens_per_image)
    elif unit == "embedding":
        owners = of_image.repeat_interleave(model.vision.embeddings_per_image)
    elif unit == "token":
        owners = token_owners(batch)
    else:
        owners = token_owners(batch)[label_positions(batch)]
    start = 0
    if sequence_parallel_rank is not None and unit in _SHARED:
        start = sequence_parallel_rank * len(bad)
    owners = owners[start : start + len(bad)]
    # what follows the images is padding, or the inert stream where there are none
    found = owners[bad[: len(owners)]]
    return tuple(found[found >= 0].unique().tolist())
