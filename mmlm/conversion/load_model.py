"""Fills a model straight from HuggingFace's files, at any layout."""

from collections.abc import Sequence

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from tqdm import tqdm

from mmlm.conversion.hf_weights import HFWeights
from mmlm.models.internvl_model import InternVLModel
from mmlm.models.model_provider import parameter_blocks


@torch.no_grad()
def load_hf_weights(
    chunks: Sequence[InternVLModel],
    groups: ProcessGroupCollection,
    weights: HFWeights,
    *,
    progress: bool = False,
) -> int:
    """Fill a model straight from HuggingFace's files.

    Every rank reads the blocks that it holds, and no more of the files.

    Args:
        chunks: this rank's model.
        groups: its process groups.
        weights: of the model's sizes.
        progress: show a bar of this rank's bytes.

    Returns:
        Bytes that this rank has read.
    """
    reader = weights.blocks()
    shards = parameter_blocks(chunks, groups)
    total = sum(shard.data.nbytes for shard in shards)
    with tqdm(
        total=total, desc="reading weights", unit="B", unit_scale=True, disable=not progress
    ) as bar:
        for shard in shards:
            shard.data.copy_(reader.read(shard.key, shard.global_slice()))
            bar.update(shard.data.nbytes)
    weights.reader.check.warn()
    return reader.bytes_read
