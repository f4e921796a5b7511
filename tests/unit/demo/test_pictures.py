"""The drawn pictures show what they are asked to show."""

import random
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from examples.internvl_v1_2.demo import pictures

DRAWERS: dict[str, Callable[[random.Random], Image.Image]] = {
    "one_object": lambda rng: pictures.one_object("circle", "red", "black", rng),
    "two_objects": lambda rng: pictures.two_objects([("square", "red"), ("cross", "blue")], rng),
    "many_objects": lambda rng: pictures.many_objects("triangle", ["green"] * 5, rng),
    "bar_chart": lambda rng: pictures.bar_chart([("red", 1), ("blue", 5)], 5, rng),
    "pie_chart": lambda rng: pictures.pie_chart([("red", 0.6), ("blue", 0.4)], rng),
    "line_chart": lambda rng: pictures.line_chart(True, "purple", rng),
    "arrow_diagram": lambda rng: pictures.arrow_diagram(
        ("circle", "red"), ("square", "blue"), True, rng
    ),
    "document": lambda rng: pictures.document(47, rng),
    "polygon": lambda rng: pictures.polygon(5, "orange", rng),
    "angle": lambda rng: pictures.angle(90.0, rng),
    "word": lambda rng: pictures.word("cat", rng),
}


def share_near(picture: Image.Image, colour: str) -> float:
    """Share of the pixels that are within a tint of a colour."""
    distance = np.abs(np.asarray(picture, dtype=int) - pictures.COLOURS[colour]).max(axis=2)
    return float((distance <= 20).mean())


@pytest.mark.parametrize("name", DRAWERS)
def test_same_seed_same_bytes_other_seed_other_picture(name: str) -> None:
    first, again, other = (DRAWERS[name](random.Random(seed)) for seed in (1, 1, 2))
    assert first.mode == "RGB"
    assert first.tobytes() == again.tobytes()
    assert first.tobytes() != other.tobytes()


@pytest.mark.parametrize("shape", pictures.SHAPES)
def test_shapes_differ_and_are_filled(shape: str) -> None:
    def draw(which: str) -> bytes:
        rng = random.Random(0)
        return pictures.one_object(which, "blue", "white", rng).tobytes()

    picture = pictures.one_object(shape, "blue", "white", random.Random(0))
    assert share_near(picture, "blue") > 0.1
    assert all(draw(shape) != draw(other) for other in pictures.SHAPES if other != shape)


def test_more_objects_cover_more() -> None:
    shares = [
        share_near(pictures.many_objects("square", ["green"] * n, random.Random(3)), "green")
        for n in (1, 3, 5)
    ]
    assert shares == sorted(shares)
    assert shares[2] == pytest.approx(5 * shares[0], rel=0.3)


def test_bar_is_as_high_as_its_value() -> None:
    bars = [("red", 1), ("blue", 4)]
    picture = pictures.bar_chart(bars, 5, random.Random(0))
    assert share_near(picture, "blue") == pytest.approx(4 * share_near(picture, "red"), rel=0.15)


def test_line_rises() -> None:
    rising, falling = (
        np.asarray(pictures.line_chart(rises, "red", random.Random(5)), dtype=int)
        for rises in (True, False)
    )

    def middle_row(picture: np.ndarray, columns: slice) -> float:
        near = np.abs(picture - pictures.COLOURS["red"]).max(axis=2) <= 20
        return float(np.nonzero(near[:, columns])[0].mean())

    left, right = slice(16, 40), slice(80, 104)
    assert middle_row(rising, right) < middle_row(rising, left)  # rows count downwards
    assert middle_row(falling, right) > middle_row(falling, left)


def test_tint_stays_in_range() -> None:
    rng = random.Random(0)
    for _ in range(100):
        assert all(0 <= channel <= 255 for channel in pictures.tint((0, 250, 128), rng, 30))


def test_polygon_has_its_corners() -> None:
    corners = pictures.regular_polygon((10.0, 10.0), 5.0, 4, 0.0)
    expected = [(10, 5), (15, 10), (10, 15), (5, 10)]
    assert np.allclose(corners, expected)
