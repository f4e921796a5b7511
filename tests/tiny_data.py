"""A tokenizer and a small playground, made on the spot for tests."""

import io
import json
import random
from pathlib import Path
from typing import Any

import sentencepiece
from PIL import Image, ImageDraw

from mmlm.data.conversation import SYSTEM_MESSAGE

IMAGE_SIZE = 56
EMBEDDINGS_PER_IMAGE = 4

_COLOURS = {"red": "红色", "green": "绿色", "blue": "蓝色", "yellow": "黄色", "black": "黑色"}
_SHAPES = {"square": "方块", "circle": "圆"}


def make_tokenizer(folder: Path, vocab_size: int = 448, *, add_dummy_prefix: bool = False) -> Path:
    """Train a tiny SentencePiece model with the ChatML tokens and lay it out as HuggingFace does.

    Args:
        folder: made if missing.
        vocab_size: pieces, the ChatML tokens and 256 byte pieces included.
        add_dummy_prefix: as in the model file; Yi has it off.

    Returns:
        The folder, with ``tokenizer.model`` and the two json files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_corpus()),
        model_writer=buffer,
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=add_dummy_prefix,
        user_defined_symbols=["<|im_start|>", "<|im_end|>"],
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(buffer.getvalue())
    names = {0: "<unk>", 1: "<s>", 2: "</s>", 3: "<|im_start|>", 4: "<|im_end|>"}
    decoder = {
        str(number): {"content": name, "special": True, "lstrip": False, "rstrip": False}
        for number, name in names.items()
    }
    special = {"bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>"}
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": False,
        "add_eos_token": False,
        "legacy": True,
        "added_tokens_decoder": decoder,
        **special,
    }
    _write_json(folder / "tokenizer_config.json", config)
    _write_json(folder / "special_tokens_map.json", special)
    return folder


def make_playground(folder: Path, num_samples: int = 24, seed: int = 0) -> Path:
    """Draw pictures and write two sets: one with pictures, one of text only.

    Samples have one picture, two pictures, several turns, Chinese, or no picture, and answers of
    very different lengths. The placeholder stands first, in the middle, or is missing.

    Args:
        folder: made if missing.
        num_samples: in both sets together.
        seed: of what is drawn and asked.

    Returns:
        The meta json, with absolute paths.
    """
    generator = random.Random(seed)
    images = folder / "pictures" / "images"
    images.mkdir(parents=True, exist_ok=True)
    opensource = folder / "opensource"
    opensource.mkdir(exist_ok=True)
    kinds = ("one", "two", "turns", "chinese", "text")
    pictured, text_only = [], []
    for number in range(num_samples):
        kind = kinds[number % len(kinds)]
        if kind == "text":
            text_only.append(_text_sample(number, generator))
            continue
        names = [f"images/{number}_{slot}.png" for slot in range(2 if kind == "two" else 1)]
        drawn = [_draw(folder / "pictures" / name, generator) for name in names]
        entry: dict[str, Any] = {"id": number, "image": names if kind == "two" else names[0]}
        entry["conversations"] = _talk(kind, drawn, generator)
        pictured.append(entry)
    meta = {}
    for name, entries in (("pictured", pictured), ("text_only", text_only)):
        if entries:
            path = opensource / f"{name}.jsonl"
            write_jsonl(path, entries)
            meta[name] = {
                "root": str(folder / "pictures"),
                "annotation": str(path),
                "data_augment": False,
                "repeat_time": 1,
                "length": len(entries),
            }
    _write_json(folder / "meta.json", meta)
    return folder / "meta.json"


def write_jsonl(path: Path, entries: list[dict[str, Any]]) -> None:
    """Write one JSON object a line."""
    lines = (json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    path.write_text("".join(lines), encoding="utf-8")


def write_set(folder: Path, entries: list[dict[str, Any]], **settings: Any) -> Path:
    """Write a meta json of the one set ``tiny`` whose pictures are below ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "tiny.jsonl", entries)
    entry = {"root": str(folder), "annotation": str(folder / "tiny.jsonl"), **settings}
    _write_json(folder / "meta.json", {"tiny": entry})
    return folder / "meta.json"


def conversation(*texts: str) -> list[dict[str, str]]:
    """Return turns of human and gpt in alternation."""
    return [
        {"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)
    ]


def _corpus() -> list[str]:
    lines = [SYSTEM_MESSAGE]
    for colour, chinese in _COLOURS.items():
        for shape, chinese_shape in _SHAPES.items():
            lines += [
                f"What colour is the {shape}? The {shape} is {colour}.",
                f"这个{chinese_shape}是什么颜色？{chinese}。",
            ]
    return lines


def _draw(path: Path, generator: random.Random) -> tuple[str, str]:
    colour, shape = generator.choice(list(_COLOURS)), generator.choice(list(_SHAPES))
    size = (generator.randrange(40, 90), generator.randrange(40, 90))
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    (draw.rectangle if shape == "square" else draw.ellipse)((8, 8, 32, 32), fill=colour)
    image.save(path)
    return colour, shape


def _talk(
    kind: str, drawn: list[tuple[str, str]], generator: random.Random
) -> list[dict[str, str]]:
    (colour, shape), (other, other_shape) = drawn[0], drawn[-1]
    answer = f"The {shape} is {colour}."
    if kind == "chinese":
        return conversation(f"<image>\n这个{_SHAPES[shape]}是什么颜色？", f"{_COLOURS[colour]}。")
    if kind == "two":
        question = f"First <image> second <image>. What colour is the {shape}?"
        return conversation(question, f"{answer} The {other_shape} is {other}.")
    if kind == "turns":
        repeats = generator.randrange(1, 4)
        more = [f"What colour is the {shape}?", answer * generator.randrange(1, 4)] * repeats
        return conversation("What is this?", f"The {shape}.", *more)
    return conversation(f"<image>\nWhat colour is the {shape}?", answer)


def _text_sample(number: int, generator: random.Random) -> dict[str, Any]:
    colour = generator.choice(list(_COLOURS))
    answer = f"{_COLOURS[colour]}。" * generator.randrange(1, 12)
    return {"id": number, "conversations": conversation(f"What is {colour}?", answer)}


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")
