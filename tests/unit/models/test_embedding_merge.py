"""Image embeddings in the text: order, gradients, and a microbatch without images."""

import torch

from mmlm.models.embedding_merge import merge_image_embeddings


def test_rows_and_gradients_by_hand() -> None:
    text = torch.randn(6, 1, 4, requires_grad=True)
    images = torch.randn(3, 1, 4, requires_grad=True)
    upstream = torch.randn(6, 1, 4)
    positions = torch.tensor([1, 2, 4])
    merged = merge_image_embeddings(text, images, positions)
    expected = [text[0], images[0], images[1], text[3], images[2], text[5]]
    assert torch.equal(merged, torch.stack(expected))
    (merged * upstream).sum().backward()
    assert torch.equal(images.grad, upstream[positions])
    # the replaced rows get exactly nothing, so <IMG_CONTEXT> in the table gets nothing
    assert not text.grad[positions].any()
    assert torch.equal(text.grad[[0, 3, 5]], upstream[[0, 3, 5]])


def test_inert_image_rows_are_in_the_graph_with_zero_gradient() -> None:
    text = torch.randn(3, 1, 4, requires_grad=True)
    inert = torch.randn(1, 1, 4, requires_grad=True)
    merged = merge_image_embeddings(text, inert, torch.empty(0, dtype=torch.int64))
    assert torch.equal(merged, text)
    merged.sum().backward()
    assert inert.grad is not None and not inert.grad.any()
