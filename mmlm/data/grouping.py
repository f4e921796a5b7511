"""Orders that bring samples of similar length together, for comparison with packing. All pure.

Without packing a microbatch is padded to its longest sample, so who meets whom decides what is
wasted. `group_by_length` does what HuggingFace's LengthGroupedSampler does
(transformers/trainer_pt_utils.py, get_length_grouped_indices); `even_chunks` what InternVL put in
its place (internvl/patch/train_sampler_patch.py, after LLaVA).
"""

import numpy as np

from mmlm.data.annotation import IntArray
from mmlm.data.packing import deal

_MAX_BATCHES = 50
"""Batches of a megabatch, as HuggingFace has it."""


def group_by_length(order: IntArray, lengths: IntArray, batch_size: int) -> IntArray:
    """Sort the order of an epoch by length, longest first, within megabatches of 50 batches.

    HuggingFace's batch is what one rank trains on in an iteration; here it is the global batch, so
    that the order depends on no layout.

    Args:
        order: of the epoch's samples, int64.
        lengths: tokens of each sample, by sample.
        batch_size: samples of a batch.

    Returns:
        The same samples in another order; the longest of all comes first.
    """
    megabatch = max(1, min(len(order) // (batch_size * 4), _MAX_BATCHES)) * batch_size
    numbers = np.arange(len(order)) // megabatch
    grouped = order[np.lexsort((-lengths[order], numbers))]
    longest = int(np.argmax(lengths[grouped[::megabatch]])) * megabatch
    grouped[[0, longest]] = grouped[[longest, 0]]
    return grouped


def even_chunks(samples: IntArray, lengths: IntArray, chunk_size: int) -> IntArray:
    """Deal the samples of a global batch into chunks of about equal length in all.

    Each chunk, which is one rank's micro-batch, so gets one of the longest samples.

    Args:
        samples: of the global batch, int64.
        lengths: tokens of each of them.
        chunk_size: samples of a chunk.

    Returns:
        The samples, chunk by chunk.
    """
    num_chunks = -(-len(samples) // chunk_size)
    if len(samples) % num_chunks:
        by_length = samples[np.argsort(-lengths, kind="stable")]
        return np.concatenate([by_length[chunk::num_chunks] for chunk in range(num_chunks)])
    return samples[np.concatenate(deal(lengths.tolist(), num_chunks))]
