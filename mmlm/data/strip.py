"""A packed row as a picture: its segments, what is trained on, and the pictures themselves.

From top to bottom: a title; a band of segments in alternating colours with the numbers of their
samples; a band of tokens (grey: read, green: trained on, blue: image embeddings, white: room that
is left); the pictures as the model gets them, each below its block; a scale. Pillow only.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mmlm.data.image import ByteArray
from mmlm.data.sample import IGNORE, TokenizedSample

WIDTH = 2048
"""Pixels of the band; a token takes a whole number of them where it can."""

READ, TRAINED, EMBEDDING, FREE = (176, 176, 176), (34, 139, 34), (70, 130, 220), (255, 255, 255)
_SEGMENTS = ((230, 159, 0), (86, 130, 160), (204, 121, 167), (120, 150, 60))
_INK = (20, 20, 20)
_MARGIN, _TITLE, _BAND, _GAP, _SCALE = 16, 28, 36, 6, 40
_MIN_THUMBNAIL, _MAX_THUMBNAIL = 16, 160


@dataclass(frozen=True, kw_only=True, eq=False)
class Segment:
    """A sample of a row."""

    sample_id: int
    """From 0, through all sets."""
    tokens: TokenizedSample
    """Ids and labels."""
    images: Sequence[ByteArray]
    """Its pictures, squashed: uint8 [S, S, 3] each."""
    weight: float
    """Of each of its supervised tokens in the loss of the iteration."""


def draw_row(title: str, segments: Sequence[Segment], seq_length: int) -> Image.Image:
    """Draw a packed row.

    Args:
        title: one line of text above it.
        segments: in their order; together at most ``seq_length`` tokens.
        seq_length: tokens that the row can hold.
    """
    scale = WIDTH // seq_length if seq_length <= WIDTH else WIDTH / seq_length
    width = math.ceil(scale * seq_length)
    pictures = _place_pictures(segments, scale, width)
    tallest = max((picture.height for _, picture in pictures), default=0)
    segments_top = _MARGIN + _TITLE
    tokens_top = segments_top + _BAND + _GAP
    pictures_top = tokens_top + _BAND + _GAP
    scale_top = pictures_top + tallest + _GAP
    image = Image.new("RGB", (width + 2 * _MARGIN, scale_top + _SCALE + _MARGIN), (245, 245, 245))
    draw = ImageDraw.Draw(image)
    draw.text((_MARGIN, _MARGIN), title, fill=_INK, font=_font())
    colours = np.full((seq_length, 3), FREE, dtype=np.uint8)
    start = 0
    for number, segment in enumerate(segments):
        end = start + len(segment.tokens.input_ids)
        colours[start:end] = token_colours(segment.tokens)
        left, right = _MARGIN + start * scale, _MARGIN + end * scale
        box = (left, segments_top, max(left, right - 1), segments_top + _BAND - 1)
        draw.rectangle(box, fill=_SEGMENTS[number % len(_SEGMENTS)])
        label = str(segment.sample_id)
        if draw.textlength(label, font=_font()) + 6 <= right - left:
            draw.text((left + 4, segments_top + 10), label, fill=_INK, font=_font())
        start = end
    band = Image.fromarray(colours[None]).resize((width, _BAND), Image.Resampling.NEAREST)
    image.paste(band, (_MARGIN, tokens_top))
    for edge in np.cumsum([0, *(len(segment.tokens.input_ids) for segment in segments)]).tolist():
        x = _MARGIN + edge * scale
        draw.line((x, segments_top, x, tokens_top + _BAND), fill=_INK)
    for x, picture in pictures:
        image.paste(picture, (_MARGIN + x, pictures_top))
    _draw_scale(draw, seq_length, scale, scale_top)
    return image


def token_colours(tokens: TokenizedSample) -> ByteArray:
    """Return the colour of each token, uint8 [n, 3].

    A token is green where the model is trained to say it, which is one place after its label.
    """
    colours = np.full((len(tokens.input_ids), 3), READ, dtype=np.uint8)
    colours[np.flatnonzero(tokens.labels[:-1] != IGNORE) + 1] = TRAINED
    colours[tokens.image_positions] = EMBEDDING
    return colours


def _place_pictures(
    segments: Sequence[Segment], scale: float, width: int
) -> list[tuple[int, Image.Image]]:
    """Each picture of the row and where it goes: as large as the next one allows."""
    found: list[tuple[int, ByteArray]] = []
    start = 0
    for segment in segments:
        if len(segment.images):
            blocks = segment.tokens.image_positions.reshape(len(segment.images), -1)
            places = [int((start + first) * scale) for first in blocks[:, 0].tolist()]
            found += zip(places, segment.images, strict=True)
        start += len(segment.tokens.input_ids)
    pictures = []
    for number, (x, pixels) in enumerate(found):
        end = found[number + 1][0] if number + 1 < len(found) else width
        side = min(_MAX_THUMBNAIL, max(_MIN_THUMBNAIL, end - x - 2))
        thumbnail = Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)
        pictures.append((x, thumbnail))
    return pictures


def _font() -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(14)


def _draw_scale(draw: ImageDraw.ImageDraw, seq_length: int, scale: float, top: int) -> None:
    step = 2 ** max(0, math.ceil(math.log2(seq_length / 16)))
    for place in range(0, seq_length, step):
        x = _MARGIN + place * scale
        draw.line((x, top, x, top + 5), fill=_INK)
        draw.text((x + 2, top + 3), str(place), fill=_INK, font=_font())
    legend = ((READ, "read"), (TRAINED, "trained on"), (EMBEDDING, "image"), (FREE, "free"))
    x = float(_MARGIN)
    for colour, name in legend:
        draw.rectangle((x, top + 28, x + 12, top + 40), fill=colour, outline=_INK)
        draw.text((x + 18, top + 25), name, fill=_INK, font=_font())
        x += 36 + draw.textlength(name, font=_font())
