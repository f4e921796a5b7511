"""The picture of a row: every pixel's colour says what its token is."""

import numpy as np
import pytest
from PIL import Image

from mmlm.data.sample import IGNORE, TokenizedSample
from mmlm.data.strip import (
    EMBEDDING,
    FREE,
    READ,
    TRAINED,
    WIDTH,
    Segment,
    draw_row,
    token_colours,
)

LEFT, SEGMENTS, TOKENS, PICTURES = 16, 60, 104, 130
"""Where the bands lie, in pixels from the corner; the middle of each band."""


def segment(sample_id: int, kinds: str, size: int = 8) -> Segment:
    """A sample written as r (read), t (trained on), i (image); two embeddings an image."""
    labels = np.full(len(kinds), IGNORE, dtype=np.int64)
    labels[[place - 1 for place, kind in enumerate(kinds) if kind == "t"]] = 7
    positions = np.array([place for place, kind in enumerate(kinds) if kind == "i"], dtype=np.int64)
    num_images = len(positions) // 2
    tokens = TokenizedSample(
        input_ids=np.zeros(len(kinds), dtype=np.int64),
        labels=labels,
        image_positions=positions,
        num_images=num_images,
        num_tokens_uncut=len(kinds),
        remarks=(),
    )
    images = [np.full((size, size, 3), (250, 0, 120), dtype=np.uint8)] * num_images
    return Segment(sample_id=sample_id, tokens=tokens, images=images, weight=0.25)


def row_of_colours(image: Image.Image, seq_length: int) -> list[tuple[int, ...]]:
    scale = WIDTH / seq_length
    middles = [LEFT + int((place + 0.5) * scale) for place in range(seq_length)]
    return [image.getpixel((x, TOKENS)) for x in middles]  # type: ignore[misc]


def test_every_token_has_the_colour_of_its_kind() -> None:
    colours = {"r": READ, "t": TRAINED, "i": EMBEDDING, ".": FREE}
    kinds = ("rriirt", "rrtt")
    image = draw_row("title", [segment(n, each) for n, each in enumerate(kinds)], 16)
    expected = [colours[kind] for kind in "".join(kinds) + "......"]
    assert row_of_colours(image, 16) == expected
    assert image.width == WIDTH + 2 * LEFT


def test_a_token_is_marked_where_it_stands_and_not_where_it_is_predicted() -> None:
    colours = token_colours(segment(0, "rrtr").tokens)
    assert [tuple(colour) for colour in colours.tolist()] == [READ, READ, TRAINED, READ]


def test_segments_differ_from_their_neighbours_and_end_where_they_end() -> None:
    image = draw_row("", [segment(n, "rt") for n in range(3)], 8)
    scale = WIDTH // 8
    bands = [image.getpixel((LEFT + int((place + 0.7) * scale), SEGMENTS)) for place in range(8)]
    assert bands[0] == bands[1] and bands[2] == bands[3]
    assert len({bands[0], bands[2], bands[4]}) == 3
    assert bands[6] == bands[7] == (245, 245, 245)


@pytest.mark.parametrize("seq_length", [16, 2048, 4096])
def test_pictures_stand_below_their_blocks(seq_length: int) -> None:
    kinds = ("rrii" + "r" * (seq_length // 2 - 4), "riir")
    image = draw_row("", [segment(n, each) for n, each in enumerate(kinds)], seq_length)
    scale = WIDTH / seq_length
    for place in (2, seq_length // 2 + 1):
        pixel = image.getpixel((LEFT + int(place * scale) + 3, PICTURES + 3))
        assert pixel == (250, 0, 120)
    assert image.getpixel((LEFT + int(scale / 2) - 1, PICTURES + 3)) == (245, 245, 245)


def test_close_pictures_do_not_cover_each_other() -> None:
    first, second = segment(0, "iirr"), segment(1, "iirr")
    second.images[0][:] = 9
    image = draw_row("", [first, second], 64)
    scale = WIDTH // 64
    colours = [image.getpixel((LEFT + x, PICTURES + 3)) for x in range(8 * scale)]
    assert colours.count((250, 0, 120)) == 4 * scale - 2
    assert colours[4 * scale] == (9, 9, 9)


def test_a_row_without_pictures_needs_no_room_for_them() -> None:
    with_picture = draw_row("", [segment(0, "iit")], 8)
    assert draw_row("", [segment(0, "rrt")], 8).height < with_picture.height
