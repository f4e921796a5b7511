"""The Hermes-2 (ChatML) template: from turns to text, and which of the text is supervised.

The system turn is ``<|im_start|>system\\n{system}<|im_end|>``; each pair of turns follows as
``<|im_start|>user\\n{question}<|im_end|><|im_start|>assistant\\n{answer}<|im_end|>``. There is
no newline between or after them, no BOS and no end-of-text. Text is never stripped.
"""

from collections.abc import Sequence
from typing import NamedTuple

from mmlm.data.annotation import Turn
from mmlm.data.rejection import Reason, Rejection, Remark

SYSTEM_MESSAGE = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, "
    "是一个有用无害的人工智能助手。"
)
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
IMG_START = "<img>"
IMG_END = "</img>"
IMG_CONTEXT = "<IMG_CONTEXT>"
IMAGE_PLACEHOLDER = "<image>"
ASSISTANT_HEADER = f"{IM_START}assistant\n"

_LITERALS = {IM_END: Reason.LITERAL_IM_END, IMG_CONTEXT: Reason.LITERAL_IMG_CONTEXT}


class Piece(NamedTuple):
    """A stretch of the prompt."""

    text: str
    """What stands there."""
    supervised: bool
    """Whether the model is trained to say it."""


def render(
    turns: Sequence[Turn],
    *,
    num_images: int,
    embeddings_per_image: int,
    system_message: str = SYSTEM_MESSAGE,
    reserved: Sequence[str] = (),
) -> tuple[Piece, ...] | Rejection:
    """Write a conversation in the Hermes-2 template.

    With images, ``<image>\\n`` goes before the first turn unless that has an ``<image>``. A first
    turn that is not from ``human`` is dropped, and what was put before it with it. Then the first
    ``num_images`` placeholders of the whole prompt become image blocks, and further ones stay as
    text.

    Args:
        turns: the conversation.
        num_images: pictures of the sample.
        embeddings_per_image: vectors, hence ``<IMG_CONTEXT>`` tokens, of a picture.
        system_message: text of the system turn.
        reserved: texts of special tokens that no turn may contain.

    Returns:
        Three pieces for each pair of turns: everything before the assistant, its header, and its
        answer with ``<|im_end|>`` (supervised); or the rule that the conversation breaks.
    """
    turns, _ = repair(turns, num_images)
    rejection = _check(turns, reserved)
    if rejection is not None:
        return rejection
    texts = [turn.text for turn in turns]
    for number, text in enumerate(texts):
        if not text:
            return Rejection(
                reason=Reason.EMPTY_TURN,
                detail=f"turn {number} ({turns[number].role}) has no text; remove the pair",
            )
    pieces = []
    before = f"{IM_START}system\n{system_message}{IM_END}"
    for question, answer in zip(texts[::2], texts[1::2], strict=True):
        pieces += [
            Piece(f"{before}{IM_START}user\n{question}{IM_END}", False),
            Piece(ASSISTANT_HEADER, False),
            Piece(f"{answer}{IM_END}", True),
        ]
        before = ""
    return _insert_images(pieces, num_images, embeddings_per_image)


def repair(turns: Sequence[Turn], num_images: int) -> tuple[list[Turn], tuple[Remark, ...]]:
    """Make a conversation fit the template as the published preprocessing does.

    Args:
        turns: as in the file.
        num_images: pictures of the sample.

    Returns:
        The turns that are written, and what was done to them or is odd about them.
    """
    fitting, remarks = list(turns), []
    if fitting and fitting[0].role != "human":
        detail = f"the first turn is from '{fitting[0].role}'; it is dropped"
        remarks.append(Remark(reason=Reason.FIRST_TURN_DROPPED, detail=detail))
        del fitting[0]  # and with it the placeholder that the published code puts before it
    elif num_images and fitting and IMAGE_PLACEHOLDER not in fitting[0].text:
        first = fitting[0]
        fitting[0] = Turn(role=first.role, text=f"{IMAGE_PLACEHOLDER}\n{first.text}")
        detail = f"the first turn has no {IMAGE_PLACEHOLDER}; one is put before it"
        remarks.append(Remark(reason=Reason.PLACEHOLDER_INSERTED, detail=detail))
    num_placeholders = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in fitting)
    if num_placeholders > num_images:
        detail = (
            f"{num_placeholders} {IMAGE_PLACEHOLDER} for {num_images} images; the last "
            f"{num_placeholders - num_images} stay as text"
        )
        remarks.append(Remark(reason=Reason.LITERAL_PLACEHOLDER, detail=detail))
    return fitting, tuple(remarks)


def _check(turns: Sequence[Turn], reserved: Sequence[str]) -> Rejection | None:
    for number, turn in enumerate(turns):
        expected = ("human", "gpt")[number % 2]
        if turn.role != expected:
            return Rejection(
                reason=Reason.ROLES_DO_NOT_ALTERNATE,
                detail=f"turn {number} is from '{turn.role}' where '{expected}' must speak (a "
                "first turn not from 'human' is dropped); human and gpt must alternate",
            )
        for literal in (IM_END, IMG_CONTEXT, *reserved):
            if literal in turn.text:
                return Rejection(
                    reason=_LITERALS.get(literal, Reason.LITERAL_SPECIAL_TOKEN),
                    detail=f"turn {number} ({turn.role}) contains the literal {literal}, which is "
                    "reserved for the template; rewrite the text",
                )
    if len(turns) % 2 or not turns:
        return Rejection(
            reason=Reason.ODD_TURNS,
            detail=f"{len(turns)} turns; every question needs an answer, remove or complete them",
        )
    return None


def _insert_images(
    pieces: Sequence[Piece], num_images: int, embeddings_per_image: int
) -> tuple[Piece, ...] | Rejection:
    num_placeholders = sum(piece.text.count(IMAGE_PLACEHOLDER) for piece in pieces)
    if num_placeholders < num_images:
        return Rejection(
            reason=Reason.IMAGE_COUNT,
            detail=f"{num_images} images but {num_placeholders} {IMAGE_PLACEHOLDER} in the "
            "conversation; every image needs its own placeholder (one is put before the first "
            "turn, but only where that is from human)",
        )
    block = f"{IMG_START}{IMG_CONTEXT * embeddings_per_image}{IMG_END}"
    result, left = [], num_images
    for piece in pieces:
        here = min(left, piece.text.count(IMAGE_PLACEHOLDER))
        # str.replace takes a negative count as "all", so 0 must stay 0.
        result.append(Piece(piece.text.replace(IMAGE_PLACEHOLDER, block, here), piece.supervised))
        left -= here
    return tuple(result)
