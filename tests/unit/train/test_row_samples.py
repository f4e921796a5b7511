"""From rows of a tensor to samples: each kind of row, padding, and sequence parallelism."""

import pytest
import torch

from mmlm.config.presets import tiny
from mmlm.data.collate import Batch
from mmlm.data.sample import MAX_IMAGES_PER_SAMPLE
from mmlm.train.row_samples import Unit, row_unit, samples_of_rows, token_owners

MODEL = tiny()
PATCHES, EMBEDDINGS = MODEL.vision.tokens_per_image, MODEL.vision.embeddings_per_image


def batch() -> Batch:
    """Samples 7 (4 tokens, two pictures), padding (2), 3 (3 tokens) and 9 (3 tokens, a picture)."""
    mask = torch.tensor([0, 0, 1, 1, 0, 0, 0, 1, 1, 0, 0, 1], dtype=torch.float32)
    first = MAX_IMAGES_PER_SAMPLE
    return Batch(
        input_ids=torch.zeros(12, dtype=torch.int64),
        labels=torch.zeros(12, dtype=torch.int64),
        loss_mask=mask,
        position_ids=torch.zeros(12, dtype=torch.int64),
        segment_lengths=(4, 2, 3, 3),
        pixel_values=None,
        image_ids=torch.tensor([7 * first, 7 * first + 1, 9 * first]),
        image_positions=torch.zeros(3 * EMBEDDINGS, dtype=torch.int64),
        sample_ids=(7, 3, 9),
    )


@pytest.mark.parametrize(
    ("layer", "unit"),
    [
        ("pixel_values", "picture"),
        ("vision_model.patch_embedding", "picture"),
        ("vision_model.decoder.layers.44", "patch"),
        ("vision_model.decoder.layers.44.mlp", None),
        ("vision_projection.linear_fc1", "embedding"),
        ("language_model.embedding", "token"),
        ("language_model.embedding.word_embeddings", None),
        ("language_model.decoder.layers.3", "token"),
        ("language_model.decoder.layers.3.self_attention.linear_qkv", None),
        ("language_model.decoder.final_layernorm", "token"),
        ("language_model.output_layer", "label"),
    ],
)
def test_units(layer: str, unit: Unit | None) -> None:
    assert row_unit(layer) == unit


def test_owners_of_tokens() -> None:
    assert token_owners(batch()).tolist() == [7] * 4 + [-1] * 2 + [3] * 3 + [9] * 3


@pytest.mark.parametrize(
    ("unit", "rows", "length", "samples"),
    [
        ("token", [3], 12, (7,)),
        ("token", [6, 4, 11], 12, (3, 9)),
        ("token", [4, 5], 12, ()),
        ("picture", [1], 3, (7,)),
        ("patch", [2 * PATCHES], 3 * PATCHES + 4, (9,)),
        ("patch", [2 * PATCHES - 1, 3 * PATCHES], 3 * PATCHES + 4, (7,)),
        ("embedding", [2 * EMBEDDINGS], 3 * EMBEDDINGS, (9,)),
        ("label", [0, 3], 5, (3, 7)),
        ("label", [4], 5, (9,)),
    ],
)
def test_samples(unit: Unit, rows: list[int], length: int, samples: tuple[int, ...]) -> None:
    bad = torch.zeros(length, dtype=torch.bool)
    bad[rows] = True
    assert samples_of_rows(bad, unit, batch(), MODEL) == samples


def test_sequence_parallel_ranks_hold_their_part_of_the_stream() -> None:
    bad = torch.zeros(6, dtype=torch.bool)
    bad[1] = True
    found = [
        samples_of_rows(bad, "token", batch(), MODEL, sequence_parallel_rank=rank)
        for rank in range(2)
    ]
    assert found == [(7,), (3,)]
    # logits are outside of the region: every rank has them all
    bad = torch.tensor([True, False, False, False, False])
    assert samples_of_rows(bad, "label", batch(), MODEL, sequence_parallel_rank=1) == (7,)
