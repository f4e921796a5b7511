"""Put image embeddings where the text has ``<IMG_CONTEXT>``. A pure function."""

from torch import Tensor


def merge_image_embeddings(
    text: Tensor, image_embeddings: Tensor, image_positions: Tensor
) -> Tensor:
    """Replace rows of the text embedding by image embeddings, in order.

    The replaced rows get no gradient, so neither does the ``<IMG_CONTEXT>`` row of the table. With
    no positions nothing is replaced, but the graph is the same: inert image embeddings then get a
    gradient of exactly zero.

    Args:
        text: [t, 1, h].
        image_embeddings: [m, 1, h] with m >= the number of positions.
        image_positions: int64 [k], rows of ``text``.

    Returns:
        [t, 1, h].
    """
    return text.index_put((image_positions,), image_embeddings[: image_positions.shape[0]])
