"""The pixel shuffle of the released weights, by hand and against the reference's patch lists."""

import pytest
import torch

from mmlm.models.pixel_shuffle import pixel_shuffle
from tests.parity.reference_vision import shuffled_patches


def tokens(grid: int, version: str) -> list[list[int]]:
    """Which patches each token is made of: channel c of patch p holds 10 p + c."""
    patches = 10 * torch.arange(grid * grid).view(1, grid, grid, 1) + torch.arange(3)
    out = pixel_shuffle(patches, version)
    assert out.shape == (1, grid // 2, grid // 2, 12)
    of_token = out.reshape(-1, 4, 3)  # channels patch by patch
    assert torch.equal(of_token % 10, torch.arange(3).expand_as(of_token))
    return (of_token[..., 0] // 10).tolist()


def test_four_by_four_by_hand() -> None:
    assert tokens(4, "v1") == [[0, 1, 4, 5], [8, 9, 12, 13], [2, 3, 6, 7], [10, 11, 14, 15]]
    assert tokens(4, "v2") == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_larger_grid_against_the_reference(version: str) -> None:
    assert tokens(8, version) == shuffled_patches(8, 2, version)


def test_images_do_not_mix() -> None:
    x = torch.randn(3, 4, 4, 2)
    together = pixel_shuffle(x, "v1")
    assert torch.equal(together, torch.cat([pixel_shuffle(image[None], "v1") for image in x]))
