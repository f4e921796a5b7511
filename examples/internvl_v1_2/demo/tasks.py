"""Questions and answers of the demo playground: one function for each of the nine published sets.

A task takes a ``random.Random`` and returns one `Example`. It keeps the spirit of the set whose
name it stands under (captions, Chinese dialogue, mixed instructions, bar charts, charts, diagrams,
documents, geometry, rendered words), at a size that a tiny model learns in minutes. A held-out
example is a single question about a picture, whose answer must be read from that picture; training
examples are also dialogues of several turns and text alone.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

from examples.internvl_v1_2.demo import pictures

COLOURS_ZH = {
    "red": "红色",
    "orange": "橙色",
    "yellow": "黄色",
    "green": "绿色",
    "blue": "蓝色",
    "purple": "紫色",
}
SHAPES_ZH = {
    "circle": "圆形",
    "square": "正方形",
    "triangle": "三角形",
    "cross": "十字形",
}
SIDES_ZH = {3: "三条", 4: "四条", 5: "五条", 6: "六条"}
ANGLES_ZH = {"锐角": (28.0, 62.0), "直角": (90.0, 90.0), "钝角": (118.0, 152.0)}
"""Kinds of angle and the range of their opening, degrees."""

WORDS = ["ant", "bee", "cat", "dog", "fox", "hen", "owl", "pig", "cup", "hat", "key", "sun"]
"""Words that are rendered and transcribed."""

HIGHEST_BAR = 5
"""Largest value in a bar chart."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One conversation and its picture."""

    picture: Image.Image | None
    """RGB, or None for a text-only conversation."""
    turns: tuple[tuple[str, str], ...]
    """(question, answer) pairs in order, without the ``<image>`` mark."""


Task = Callable[[random.Random, bool], Example]
"""Draws one example; the flag says that it is for the held-out split."""


def _dialogue(
    picture: Image.Image, rng: random.Random, turns: list[tuple[str, str]], held_out: bool
) -> Example:
    """Return one turn (always when held out, else one time in five) or all, in random order."""
    single = held_out or rng.random() < 0.2
    return Example(picture=picture, turns=tuple(rng.sample(turns, 1 if single else len(turns))))


def _two_of(rng: random.Random) -> list[tuple[str, str]]:
    shapes = rng.sample(pictures.SHAPES, 2)
    colours = rng.sample(list(pictures.COLOURS), 2)
    return list(zip(shapes, colours, strict=True))


def caption(rng: random.Random, held_out: bool) -> Example:
    """Describe one object: its colour, its shape and the background."""
    shape, colour = rng.choice(pictures.SHAPES), rng.choice(list(pictures.COLOURS))
    background = rng.choice(list(pictures.BACKGROUNDS))
    question = rng.choice(("Describe the picture in one sentence.", "What does the picture show?"))
    return Example(
        picture=pictures.one_object(shape, colour, background, rng),
        turns=((question, f"a {colour} {shape} on a {background} background"),),
    )


def chinese_dialogue(rng: random.Random, held_out: bool) -> Example:
    """Ask in Chinese about the colour and the shape of two objects, in up to four turns."""
    objects = _two_of(rng)
    turns = []
    for side, (shape, colour) in zip(("左边", "右边"), objects, strict=True):
        turns.append((f"{side}的图形是什么颜色？", COLOURS_ZH[colour]))
        turns.append((f"{side}的图形是什么形状？", SHAPES_ZH[shape]))
    return _dialogue(pictures.two_objects(objects, rng), rng, turns, held_out)


def _text_only(rng: random.Random) -> Example:
    """Translate a colour or a shape, or count on by one: no picture needed."""
    kind = rng.randrange(3)
    if kind == 0:
        name, chinese = rng.choice(list(COLOURS_ZH.items()) + list(SHAPES_ZH.items()))
        turn = (f"How do you say {name} in Chinese?", chinese)
    elif kind == 1:
        name, chinese = rng.choice(list(COLOURS_ZH.items()) + list(SHAPES_ZH.items()))
        turn = (f"{chinese}用英语怎么说？", name)
    else:
        number = rng.randrange(9)
        turn = (f"Which number comes after {number}?", str(number + 1))
    return Example(picture=None, turns=(turn,))


def mixed_instructions(rng: random.Random, held_out: bool) -> Example:
    """Count objects, name their shape or colour, or (training only) answer without a picture."""
    if not held_out and rng.random() < 0.2:
        return _text_only(rng)
    shape, colour = rng.choice(pictures.SHAPES), rng.choice(list(pictures.COLOURS))
    count = rng.randint(1, 5)
    turns = [
        ("How many objects are there?", str(count)),
        ("What shape are the objects?", shape),
        ("What colour are the objects?", colour),
    ]
    picture = pictures.many_objects(shape, [colour] * count, rng)
    return _dialogue(picture, rng, turns, held_out)


def bar_chart(rng: random.Random, held_out: bool) -> Example:
    """Read a bar chart of three bars: the highest, the lowest, or the value of one bar."""
    colours = rng.sample(list(pictures.COLOURS), 3)
    values = rng.sample(range(1, HIGHEST_BAR + 1), 3)
    bars = list(zip(colours, values, strict=True))
    by_value = sorted(bars, key=lambda bar: bar[1])
    place = rng.randrange(3)
    turns = [
        ("Which bar is the highest?", by_value[-1][0]),
        ("Which bar is the lowest?", by_value[0][0]),
        (f"What is the value of the {('left', 'middle', 'right')[place]} bar?", str(values[place])),
    ]
    picture = pictures.bar_chart(bars, HIGHEST_BAR, rng)
    return _dialogue(picture, rng, turns, held_out)


def chart(rng: random.Random, held_out: bool) -> Example:
    """Find the largest slice of a pie, or tell whether a line rises or falls and its colour."""
    colour = rng.choice(list(pictures.COLOURS))
    if rng.random() < 0.5:
        rising = rng.random() < 0.5
        turns = [
            ("Does the line rise or fall?", "rise" if rising else "fall"),
            ("What colour is the line?", colour),
        ]
        picture = pictures.line_chart(rising, colour, rng)
    else:
        others = rng.sample([c for c in pictures.COLOURS if c != colour], 2)
        share = rng.uniform(0.5, 0.66)
        second = (1 - share) * rng.uniform(0.4, 0.6)
        slices = [(colour, share), (others[0], second), (others[1], 1 - share - second)]
        rng.shuffle(slices)
        turns = [("Which colour has the largest slice?", colour)]
        picture = pictures.pie_chart(slices, rng)
    return _dialogue(picture, rng, turns, held_out)


def diagram(rng: random.Random, held_out: bool) -> Example:
    """Follow an arrow between two objects."""
    left, right = _two_of(rng)
    to_right = rng.random() < 0.5
    start, end = (left, right) if to_right else (right, left)
    turns = [
        ("Which shape does the arrow point to?", end[0]),
        ("Which shape does the arrow start from?", start[0]),
        ("Which colour does the arrow point to?", end[1]),
        ("Which colour does the arrow start from?", start[1]),
    ]
    picture = pictures.arrow_diagram(left, right, to_right, rng)
    return _dialogue(picture, rng, turns, held_out)


def document(rng: random.Random, held_out: bool) -> Example:
    """Read the two-digit number of a page."""
    number = rng.randrange(100)
    question = rng.choice(("What is the number on the page?", "Which number is printed here?"))
    return Example(picture=pictures.document(number, rng), turns=((question, f"{number:02d}"),))


def geometry(rng: random.Random, held_out: bool) -> Example:
    """Count the sides of a polygon or name the kind of an angle, in Chinese."""
    if rng.random() < 0.5:
        sides = rng.choice(list(SIDES_ZH))
        picture = pictures.polygon(sides, rng.choice(list(pictures.COLOURS)), rng)
        turn = ("图中的多边形有几条边？", SIDES_ZH[sides])
    else:
        kind, (smallest, largest) = rng.choice(list(ANGLES_ZH.items()))
        picture = pictures.angle(rng.uniform(smallest, largest), rng)
        turn = ("图中的角是锐角、直角还是钝角？", kind)
    return Example(picture=picture, turns=(turn,))


def transcription(rng: random.Random, held_out: bool) -> Example:
    """Transcribe one rendered word of three letters."""
    text = rng.choice(WORDS)
    question = rng.choice(("Transcribe the word.", "What is written in the picture?"))
    return Example(picture=pictures.word(text, rng), turns=((question, text),))


@dataclass(frozen=True, kw_only=True)
class SetSpec:
    """One of the nine published sets in the demo playground."""

    name: str
    """Published name; also the name of its annotation file."""
    root: str
    """Image root under ``playground/data``; empty when the annotation names whole paths."""
    folder: str
    """Where its pictures lie, under the root."""
    extension: str
    """File type of its pictures: jpg or png."""
    share: float
    """Part of all training samples."""
    task: Task
    """Draws one example."""


SETS: tuple[SetSpec, ...] = (
    SetSpec(
        name="sharegpt4v_instruct_gpt4-vision_cap100k",
        root="",
        folder="sam/images",
        extension="jpg",
        share=0.10,
        task=caption,
    ),
    SetSpec(
        name="llava_instruct_150k_zh",
        root="coco",
        folder="train2017",
        extension="jpg",
        share=0.14,
        task=chinese_dialogue,
    ),
    SetSpec(
        name="sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k",
        root="",
        folder="vg/VG_100K",
        extension="jpg",
        share=0.16,
        task=mixed_instructions,
    ),
    SetSpec(
        name="dvqa_train_200k",
        root="dvqa",
        folder="images",
        extension="png",
        share=0.14,
        task=bar_chart,
    ),
    SetSpec(
        name="chartqa_train_18k",
        root="chartqa",
        folder="train",
        extension="png",
        share=0.08,
        task=chart,
    ),
    SetSpec(
        name="ai2d_train_12k",
        root="ai2d",
        folder="images",
        extension="png",
        share=0.10,
        task=diagram,
    ),
    SetSpec(
        name="docvqa_train_10k",
        root="docvqa",
        folder="train",
        extension="png",
        share=0.10,
        task=document,
    ),
    SetSpec(
        name="geoqa+",
        root="geoqa+",
        folder="images",
        extension="png",
        share=0.08,
        task=geometry,
    ),
    SetSpec(
        name="synthdog_en",
        root="synthdog-en",
        folder="images",
        extension="jpg",
        share=0.10,
        task=transcription,
    ),
)
"""The nine sets in the published order."""
