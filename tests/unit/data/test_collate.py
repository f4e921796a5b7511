"""The flat stream, written out by hand."""

import numpy as np
import pytest
import torch

from mmlm.data.collate import Batch, collate
from mmlm.data.sample import Sample


def sample(sample_id: int, length: int, num_images: int = 0, *, pixels: bool = True) -> Sample:
    """A sample of ids 10 * sample_id + i whose last two tokens are supervised."""
    ids = 10 * sample_id + np.arange(length)
    labels = np.full(length, -100)
    labels[-3:-1] = ids[-2:]
    return Sample(
        sample_id=sample_id,
        input_ids=ids,
        labels=labels,
        image_positions=np.arange(1, 1 + 2 * num_images),
        image_ids=64 * sample_id + np.arange(num_images),
        pixel_values=np.full((num_images, 3, 4, 4), sample_id, np.float32) if pixels else None,
    )


def make(*rows: list[Sample], **options: int) -> Batch:
    weights = {number: 0.1 * number for number in range(10)}
    return collate(rows, weights, image_size=4, **options)


def test_two_rows_by_hand() -> None:
    batch = make([sample(1, 4), sample(2, 5, 1)], [sample(3, 3, 1)], pad_to_multiple_of=8)
    assert batch.segment_lengths == (4, 5, 3, 4)
    assert batch.input_ids.tolist() == [
        *[10, 11, 12, 13],
        *[20, 21, 22, 23, 24],
        *[30, 31, 32],
        *[0, 0, 0, 0],
    ]
    assert batch.labels.tolist() == [
        *[0, 12, 13, 0],
        *[0, 0, 23, 24, 0],
        *[31, 32, 0],
        *[0, 0, 0, 0],
    ]
    torch.testing.assert_close(
        batch.loss_mask,
        torch.tensor([0, 0.1, 0.1, 0, 0, 0, 0.2, 0.2, 0, 0.3, 0.3, 0, 0, 0, 0, 0]),
    )
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3]
    assert batch.image_positions.tolist() == [5, 6, 10, 11]
    assert batch.image_ids.tolist() == [128, 192]
    assert batch.sample_ids == (1, 2, 3)
    assert batch.pixel_values is not None and batch.pixel_values.shape == (2, 3, 4, 4)
    assert batch.pixel_values[:, 0, 0, 0].tolist() == [2.0, 3.0]


def test_types_are_what_the_model_expects() -> None:
    batch = make([sample(1, 4, 1)])
    for name in ("input_ids", "labels", "position_ids", "image_ids", "image_positions"):
        assert getattr(batch, name).dtype == torch.int64
    assert batch.loss_mask.dtype == torch.float32
    assert batch.pixel_values is not None and batch.pixel_values.dtype == torch.float32


def test_no_label_predicts_across_a_boundary() -> None:
    batch = make([sample(1, 4), sample(2, 5)])
    ends = np.cumsum(batch.segment_lengths) - 1
    assert batch.loss_mask[ends].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("options", "segments"),
    [
        ({}, (1,)),
        ({"pad_to_multiple_of": 4}, (1, 3)),
        ({"min_length": 6}, (1, 5)),
        ({"min_length": 6, "pad_to_multiple_of": 4}, (1, 7)),
    ],
)
def test_a_microbatch_without_samples_is_inert(
    options: dict[str, int], segments: tuple[int, ...]
) -> None:
    batch = make([], **options)
    assert batch.segment_lengths == segments
    assert batch.loss_mask.sum() == 0 and batch.input_ids.sum() == 0
    assert batch.sample_ids == () and batch.image_positions.shape == batch.image_ids.shape == (0,)
    assert batch.pixel_values is not None and batch.pixel_values.shape == (0, 3, 4, 4)


def test_an_empty_row_among_others_is_a_padding_segment() -> None:
    assert make([sample(1, 4)], []).segment_lengths == (4, 1)


def test_rows_are_padded_to_the_longest_where_asked() -> None:
    batch = make([sample(1, 4)], [sample(2, 7, 1)], [], [sample(3, 7)], pad_rows=True)
    assert batch.segment_lengths == (4, 3, 7, 7, 7)
    assert batch.position_ids.tolist()[4:7] == [0, 1, 2]
    assert batch.image_positions.tolist() == [8, 9]
    packed = make([sample(1, 4)], [sample(2, 7, 1)], [sample(3, 7)])
    for name in ("labels", "loss_mask"):
        padded, plain = getattr(batch, name), getattr(packed, name)
        assert torch.equal(padded[padded != 0], plain[plain != 0]), name
    assert make([], [], pad_rows=True).segment_lengths == (1,)


def test_ranks_without_pixels_get_none_but_all_positions() -> None:
    batch = make([sample(2, 5, 1, pixels=False)], with_pixels=False)
    assert batch.pixel_values is None
    assert batch.image_positions.tolist() == [1, 2] and batch.image_ids.tolist() == [128]


def test_pinning_takes_every_tensor_and_keeps_everything_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without a GPU nothing can be pinned: what torch would be asked for is recorded."""
    pinned: list[torch.Tensor] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor)
        return tensor + 1

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    for pixels in (True, False):
        batch = make([sample(2, 5, 1, pixels=pixels)], with_pixels=pixels)
        copy = batch.pin_memory()
        assert len(pinned) == (7 if pixels else 6)
        for name, value in vars(batch).items():
            if isinstance(value, torch.Tensor):
                assert any(value is tensor for tensor in pinned), name
                assert torch.equal(getattr(copy, name), value + 1), name
            else:
                assert getattr(copy, name) == value, name
        pinned.clear()
