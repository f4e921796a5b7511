"""The grid of positions is resized as published."""

import pytest
import torch
import torch.nn.functional as F

from mmlm.conversion.positions import resize_positions


def published(pos_emb: torch.Tensor, old_grid: int, new_grid: int) -> torch.Tensor:
    """InternVisionModel.resize_pos_embeddings, written down anew step by step."""
    embed_dim = pos_emb.shape[-1]
    cls_emb = pos_emb[:, :1, :]
    patches = pos_emb[:, 1:, :].reshape(1, old_grid, old_grid, -1).permute(0, 3, 1, 2)
    patches = F.interpolate(patches.float(), size=new_grid, mode="bicubic", align_corners=False)
    patches = patches.to(cls_emb.dtype).reshape(1, embed_dim, -1).permute(0, 2, 1)
    return torch.cat([cls_emb, patches], dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("old", "new"), [(4, 8), (16, 32), (8, 6), (32, 16)])
def test_it_is_the_published_interpolation(old: int, new: int, dtype: torch.dtype):
    weight = torch.randn(1, 1 + old * old, 6).to(dtype)
    found = resize_positions(weight, 1 + new * new)
    assert found.shape == (1, 1 + new * new, 6)
    assert found.dtype == dtype
    assert torch.equal(found[:, 0], weight[:, 0])
    assert torch.equal(found, published(weight, old, new))


def test_rows_stay_rows_and_columns_stay_columns():
    """A grid whose value is its row keeps it along each row, and grows downwards."""
    grid = torch.arange(4.0)[:, None].expand(4, 4).reshape(1, 16, 1)
    weight = torch.cat((torch.full((1, 1, 1), 9.0), grid), dim=1)
    found = resize_positions(weight, 1 + 64)[0, 1:, 0].view(8, 8)
    assert torch.equal(found, found[:, :1].expand(8, 8))
    assert bool((found[1:, 0] > found[:-1, 0]).all())


def test_the_same_grid_is_left_alone():
    weight = torch.randn(1, 17, 3)
    assert resize_positions(weight, 17) is weight
