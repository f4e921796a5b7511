"""What the published preprocessing makes of one record, written again from what it does.

InternVL-Chat's ``multi_modal_get_item`` / ``pure_text_get_item`` with ``preprocess_mpt`` (template
Hermes-2) and ``build_transform``. Nothing of mmlm is imported: the tokenizer is any function from
text to ids, so the same code makes ``tests/data/golden_tokens/golden.json`` with the slow
LlamaTokenizer of transformers 4.37 and judges mmlm's own in the tests.

The published loader does three things with a record: it trains on it; it trains on it with every
label ignored, where its count of the turns' tokens is not the count of the prompt's ("tokenization
mismatch"); or it raises and takes a random other record instead. `Published` keeps them apart.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

IGNORED = -100
SYSTEM = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, "
    "是一个有用无害的人工智能助手。"
)
END = "<|im_end|>"
HEADERS = {"human": "<|im_start|>user\n", "gpt": "<|im_start|>assistant\n"}
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Published:
    """What becomes of a record."""

    prompt: str = ""
    """Text before truncation."""
    ids: tuple[int, ...] = ()
    """Token ids after truncation, without padding."""
    targets: tuple[int, ...] = ()
    """One an id, not shifted: the id itself where it is trained on, otherwise -100."""
    failure: str = ""
    """Why the published loader raises; empty where it does not."""

    @property
    def shifted(self) -> list[int]:
        """Labels as the loss sees them: of each position, the token after it."""
        return [*self.targets[1:], IGNORED]

    @property
    def trained(self) -> bool:
        """Whether any label is left and nothing was raised."""
        return not self.failure and any(target != IGNORED for target in self.targets[1:])


def preprocess(
    entry: dict[str, Any],
    encode: Encode,
    *,
    tokens_per_image: int,
    max_length: int,
    pad_id: int,
    image_end_id: int,
) -> Published:
    """Do to a record (one json line) what the published code does to it.

    Args:
        entry: ``{"image": path or list, "conversations": [{"from", "value"}]}``.
        encode: text to ids, without BOS and EOS, specials split off.
        tokens_per_image: ``<IMG_CONTEXT>`` tokens of a picture.
        max_length: ids kept.
        pad_id: of the pad token; the published code counts what differs from it.
        image_end_id: of ``</img>``; one a picture must be left.
    """
    images = entry.get("image") or []
    num_images = 1 if isinstance(images, str) else len(images)
    prompt = _prompt([dict(turn) for turn in entry["conversations"]], with_image=num_images > 0)
    if prompt is None:
        return Published(failure="roles")
    block = "<img>" + "<IMG_CONTEXT>" * tokens_per_image + "</img>"
    for _ in range(num_images):
        prompt = prompt.replace("<image>", block, 1)
    ids = encode(prompt)[:max_length]
    targets = _targets(prompt, ids, encode, max_length, pad_id)
    failure = ""
    if num_images and ids.count(image_end_id) != num_images:
        failure = "image tokens"
    return Published(prompt, tuple(ids), tuple(targets), failure)


def _prompt(turns: list[dict[str, str]], *, with_image: bool) -> str | None:
    if not turns:
        return None
    # The placeholder is put into the record's first turn, which may be dropped afterwards.
    if with_image and "<image>" not in turns[0]["value"]:
        turns[0]["value"] = "<image>\n" + turns[0]["value"]
    if any(turn["from"] not in HEADERS for turn in turns):
        return None
    if turns[0]["from"] == "gpt":
        turns = turns[1:]
    prompt = f"<|im_start|>system\n{SYSTEM}{END}"
    for number, turn in enumerate(turns):
        if turn["from"] != ("human", "gpt")[number % 2]:
            return None
        prompt += HEADERS[turn["from"]]
        if turn["value"]:  # an empty turn is a header that nothing ends
            prompt += turn["value"] + END
    return prompt


def _targets(
    prompt: str, ids: list[int], encode: Encode, max_length: int, pad_id: int
) -> list[int]:
    """Ignore all but the answers: system, question and answer are counted together, then pairs."""
    segments = prompt.split(END)
    rounds = [segments[:3]] + [segments[at : at + 2] for at in range(3, len(segments), 2)]
    targets, counted = list(ids), 0
    for texts in rounds:
        joined = END.join(texts)
        halves = joined.split(END + HEADERS["gpt"])
        if len(halves) != 2:
            break
        masked = len(encode(halves[0] + END + HEADERS["gpt"]))
        for place in range(counted, min(counted + masked, len(targets))):
            targets[place] = IGNORED
        counted += len(encode(joined)) + 1  # and the mark that ends the answer
    for place in range(counted, len(targets)):
        targets[place] = IGNORED
    not_padding = sum(token != pad_id for token in ids)
    if counted < max_length and counted != not_padding:
        return [IGNORED] * len(ids)
    return targets


def pixels(path: str, size: int, quality: int | None = None) -> np.ndarray:
    """What ``build_transform`` makes of a picture file, in torchvision's order of operations.

    Args:
        path: any file that Pillow opens.
        size: S, pixels of a side.
        quality: of the JPEG that ``data_augment`` makes of the picture; None without it.

    Returns:
        float32 [3, S, S].
    """
    import io

    from PIL import Image

    image = Image.open(path).convert("RGB")
    if quality is not None:
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=quality)
        buffer.seek(0)
        image = Image.open(buffer).copy()
    image = image.resize((size, size), Image.BICUBIC)  # type: ignore[attr-defined]
    # ToTensor, then Normalize, each operation rounded to float32 as torch does it
    tensor = np.array(image).transpose(2, 0, 1).astype(np.float32) / np.float32(255)
    mean, std = (np.array(values, dtype=np.float32)[:, None, None] for values in (MEAN, STD))
    return np.asarray((tensor - mean) / std)
