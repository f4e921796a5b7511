"""Draws the pictures of the demo with Pillow: shapes, charts, diagrams, documents, words.

Every function is pure: the scene goes in, an RGB picture comes out, and all randomness (jitter of
places, sizes and tints) comes from the ``random.Random`` that is handed over. Objects are large
and colourful, because the tiny model sees 56 x 56 pixels.
"""

import math
import random
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

Rgb = tuple[int, int, int]
Point = tuple[float, float]

SIDE = 112
"""Height and width of a square picture, pixels: twice what the tiny vision tower sees."""

COLOURS: dict[str, Rgb] = {
    "red": (225, 30, 30),
    "orange": (250, 140, 0),
    "yellow": (245, 225, 20),
    "green": (20, 160, 50),
    "blue": (25, 70, 225),
    "purple": (150, 40, 190),
}
"""Colours that questions ask about."""

BACKGROUNDS: dict[str, Rgb] = {
    "white": (252, 252, 252),
    "gray": (150, 150, 150),
    "black": (12, 12, 12),
}
"""Plain backgrounds that captions name."""

SHAPES = ("circle", "square", "triangle", "cross")
"""Shapes that `draw_shape` knows."""


def tint(colour: Rgb, rng: random.Random, spread: int = 14) -> Rgb:
    """Return ``colour`` with every channel moved by at most ``spread``, kept in 0-255."""
    red, green, blue = (min(255, max(0, c + rng.randint(-spread, spread))) for c in colour)
    return red, green, blue


def regular_polygon(centre: Point, radius: float, sides: int, turn: float) -> list[Point]:
    """Return the corners of a regular polygon; ``turn`` in radians, 0 puts a corner on top."""
    x, y = centre
    angles = [turn - math.pi / 2 + 2 * math.pi * k / sides for k in range(sides)]
    return [(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles]


def draw_shape(
    draw: ImageDraw.ImageDraw, shape: str, centre: Point, radius: float, colour: Rgb
) -> None:
    """Draw one filled shape of `SHAPES`; ``radius`` in pixels reaches its farthest point."""
    x, y = centre
    if shape == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    elif shape == "square":
        half = radius * 0.86
        draw.rectangle((x - half, y - half, x + half, y + half), fill=colour)
    elif shape == "triangle":
        draw.polygon(
            [(x, y - radius), (x - radius, y + radius * 0.8), (x + radius, y + radius * 0.8)],
            fill=colour,
        )
    else:
        arm = radius * 0.3
        draw.rectangle((x - radius, y - arm, x + radius, y + arm), fill=colour)
        draw.rectangle((x - arm, y - radius, x + arm, y + radius), fill=colour)


def _canvas(background: Rgb, width: int = SIDE, height: int = SIDE) -> Image.Image:
    return Image.new("RGB", (width, height), background)


def one_object(shape: str, colour: str, background: str, rng: random.Random) -> Image.Image:
    """Return one large object on a plain background, near the middle."""
    picture = _canvas(tint(BACKGROUNDS[background], rng))
    centre = (SIDE / 2 + rng.uniform(-8, 8), SIDE / 2 + rng.uniform(-8, 8))
    fill = tint(COLOURS[colour], rng)
    draw_shape(ImageDraw.Draw(picture), shape, centre, rng.uniform(34, 42), fill)
    return picture


def two_objects(objects: Sequence[tuple[str, str]], rng: random.Random) -> Image.Image:
    """Return two objects, left and right; each is (shape, colour)."""
    picture = _canvas(tint(BACKGROUNDS["white"], rng, 8))
    draw = ImageDraw.Draw(picture)
    for (shape, colour), x in zip(objects, (SIDE * 0.25, SIDE * 0.75), strict=True):
        centre = (x + rng.uniform(-2, 2), SIDE / 2 + rng.uniform(-6, 6))
        draw_shape(draw, shape, centre, rng.uniform(23, 26), tint(COLOURS[colour], rng))
    return picture


def many_objects(shape: str, colours: Sequence[str], rng: random.Random) -> Image.Image:
    """Return ``len(colours)`` (1-9) objects of one shape on different cells of a 3 x 3 grid."""
    picture = _canvas(tint(BACKGROUNDS["white"], rng, 8))
    draw = ImageDraw.Draw(picture)
    cell = SIDE / 3
    for place, colour in zip(rng.sample(range(9), len(colours)), colours, strict=True):
        centre = (
            (place % 3 + 0.5) * cell + rng.uniform(-2, 2),
            (place // 3 + 0.5) * cell + rng.uniform(-2, 2),
        )
        draw_shape(draw, shape, centre, rng.uniform(14, 16), tint(COLOURS[colour], rng))
    return picture


def bar_chart(bars: Sequence[tuple[str, int]], highest: int, rng: random.Random) -> Image.Image:
    """Return a bar chart.

    Args:
        bars: (colour, value) from left to right; values are 1 to ``highest``.
        highest: value that reaches the top of the axis.
        rng: source of the jitter.

    Returns:
        The picture, 144 x 112 pixels, with a grid line at every value.
    """
    width, height, base, top = 144, 112, 104, 6
    picture = _canvas(BACKGROUNDS["white"], width, height)
    draw = ImageDraw.Draw(picture)
    unit = (base - top) / highest
    for value in range(1, highest + 1):
        draw.line((8, base - value * unit, width - 4, base - value * unit), fill=(205, 205, 205))
    draw.line((8, top, 8, base, width - 4, base), fill=(0, 0, 0), width=2)
    slot = (width - 16) / len(bars)
    for index, (colour, value) in enumerate(bars):
        left = 12 + index * slot
        box = (left + slot * 0.1, base - value * unit, left + slot * 0.85, base - 1)
        draw.rectangle(box, fill=tint(COLOURS[colour], rng))
    return picture


def pie_chart(slices: Sequence[tuple[str, float]], rng: random.Random) -> Image.Image:
    """Return a pie chart; each slice is (colour, share), the shares sum to 1."""
    picture = _canvas(tint(BACKGROUNDS["white"], rng, 8))
    draw = ImageDraw.Draw(picture)
    start = rng.uniform(0, 360)
    for colour, share in slices:
        end = start + 360 * share
        draw.pieslice((8, 8, SIDE - 8, SIDE - 8), start, end, fill=tint(COLOURS[colour], rng))
        start = end
    return picture


def line_chart(rising: bool, colour: str, rng: random.Random) -> Image.Image:
    """Return a line of four points that rises or falls from left to right."""
    picture = _canvas(BACKGROUNDS["white"])
    draw = ImageDraw.Draw(picture)
    draw.line((8, 6, 8, 104, SIDE - 4, 104), fill=(0, 0, 0), width=2)
    heights = sorted(rng.uniform(14, 92) for _ in range(2))
    low, high = min(heights[0], 40.0), max(heights[1], 66.0)
    levels = [low + (high - low) * k / 3 + rng.uniform(-4, 4) for k in range(4)]
    levels = levels if rising else levels[::-1]
    points = [(16 + 29 * k, 104 - level) for k, level in enumerate(levels)]
    draw.line(points, fill=tint(COLOURS[colour], rng), width=7, joint="curve")
    return picture


def arrow_diagram(
    left: tuple[str, str], right: tuple[str, str], to_right: bool, rng: random.Random
) -> Image.Image:
    """Return two objects (shape, colour) and a black arrow from one to the other."""
    picture = _canvas(tint(BACKGROUNDS["white"], rng, 8), 144, 112)
    draw = ImageDraw.Draw(picture)
    y = 56 + rng.uniform(-4, 4)
    for (shape, colour), x in ((left, 26), (right, 118)):
        draw_shape(draw, shape, (x, y), rng.uniform(21, 24), tint(COLOURS[colour], rng))
    tail, tip = (54, 90) if to_right else (90, 54)
    back = tip - 20 if to_right else tip + 20
    draw.line((tail, y, back, y), fill=(0, 0, 0), width=9)
    draw.polygon([(tip, y), (back, y - 18), (back, y + 18)], fill=(0, 0, 0))
    return picture


def document(number: int, rng: random.Random) -> Image.Image:
    """Return a page with a ruled heading, gray lines of text and one large number (0-99)."""
    width, height = 104, 128
    picture = _canvas((250, 250, 246), width, height)
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, 0, width - 1, height - 1), outline=(60, 60, 60), width=2)
    draw.rectangle((10, 10, 10 + rng.randint(40, 80), 18), fill=(90, 90, 90))
    for y in range(98, 124, 8):
        draw.line((10, y, rng.randint(60, 94), y), fill=(170, 170, 170), width=3)
    font = ImageFont.load_default(size=66)
    centre = (width / 2 + rng.uniform(-3, 3), 58 + rng.uniform(-3, 3))
    draw.text(centre, f"{number:02d}", fill=(10, 10, 10), font=font, anchor="mm")
    return picture


def polygon(sides: int, colour: str, rng: random.Random) -> Image.Image:
    """Return the outline of a regular polygon, filled lightly, turned a little."""
    picture = _canvas(tint(BACKGROUNDS["white"], rng, 8))
    centre = (SIDE / 2 + rng.uniform(-5, 5), SIDE / 2 + rng.uniform(-5, 5))
    corners = regular_polygon(centre, rng.uniform(42, 48), sides, rng.uniform(-0.15, 0.15))
    ImageDraw.Draw(picture).polygon(corners, fill=tint(COLOURS[colour], rng))
    return picture


def angle(degrees: float, rng: random.Random) -> Image.Image:
    """Return an angle whose first leg lies flat to the right; ``degrees`` is its opening."""
    picture = _canvas(tint(BACKGROUNDS["white"], rng, 8))
    draw = ImageDraw.Draw(picture)
    x, y = 50 + rng.uniform(-4, 4), 88 + rng.uniform(-4, 4)
    reach = 52 + rng.uniform(-4, 4)
    radians = math.radians(degrees)
    tip = (x + 1.4 * reach * math.cos(radians), y - 1.4 * reach * math.sin(radians))
    draw.line([(x + reach, y), (x, y), tip], fill=(15, 15, 15), width=7, joint="curve")
    return picture


def word(text: str, rng: random.Random) -> Image.Image:
    """Return three large letters on a tinted background."""
    paper = tint((235, 230, 220), rng, 20)
    picture = _canvas(paper, 128, 96)
    font = ImageFont.load_default(size=62)
    centre = (64 + rng.uniform(-3, 3), 48 + rng.uniform(-3, 3))
    ImageDraw.Draw(picture).text(centre, text, fill=tint((30, 30, 40), rng), font=font, anchor="mm")
    return picture
