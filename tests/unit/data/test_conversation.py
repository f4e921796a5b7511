"""The template, written out by hand."""

import re

import pytest

from mmlm.data.annotation import Turn
from mmlm.data.conversation import SYSTEM_MESSAGE, render
from mmlm.data.rejection import Reason, Rejection

SYSTEM = f"<|im_start|>system\n{SYSTEM_MESSAGE}<|im_end|>"
BLOCK = "<img><IMG_CONTEXT><IMG_CONTEXT></img>"


def turns(*texts: str) -> list[Turn]:
    return [Turn(role=("human", "gpt")[i % 2], text=text) for i, text in enumerate(texts)]


def prompt(conversation: list[Turn], num_images: int = 0) -> str:
    pieces = render(conversation, num_images=num_images, embeddings_per_image=2)
    assert not isinstance(pieces, Rejection), pieces
    return "".join(piece.text for piece in pieces)


def rejection(conversation: list[Turn], num_images: int = 0) -> Rejection:
    result = render(conversation, num_images=num_images, embeddings_per_image=2)
    assert isinstance(result, Rejection)
    return result


def test_two_rounds_are_written_without_newlines_between_turns() -> None:
    assert prompt(turns("q1", "a1", " q2\n", "答二")) == (
        "<|im_start|>system\n你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，"
        "英文名叫InternVL, 是一个有用无害的人工智能助手。<|im_end|>"
        "<|im_start|>user\nq1<|im_end|><|im_start|>assistant\na1<|im_end|>"
        "<|im_start|>user\n q2\n<|im_end|><|im_start|>assistant\n答二<|im_end|>"
    )


def test_only_answers_and_their_ends_are_supervised() -> None:
    pieces = render(turns("q1", "a1", "q2", "a2"), num_images=0, embeddings_per_image=2)
    assert not isinstance(pieces, Rejection)
    assert [piece.text for piece in pieces if piece.supervised] == ["a1<|im_end|>", "a2<|im_end|>"]


def test_a_placeholder_in_the_middle_stays_in_its_place() -> None:
    text = prompt(turns("look <image> here", "a"), num_images=1)
    assert f"user\nlook {BLOCK} here<|im_end|>" in text


def test_a_missing_placeholder_goes_before_the_first_turn() -> None:
    assert f"user\n{BLOCK}\nq<|im_end|>" in prompt(turns("q", "a"), num_images=1)


def test_first_placeholders_of_the_whole_prompt_are_replaced_and_more_stay() -> None:
    text = prompt(turns("<image> x", "a", "<image><image> y", "b <image>"), num_images=2)
    assert text.count(BLOCK) == 2
    assert f"user\n{BLOCK} x<" in text
    assert f"user\n{BLOCK}<image> y<" in text
    assert "assistant\nb <image><|im_end|>" in text


def test_a_later_placeholder_does_not_spare_the_first_turn_one() -> None:
    text = prompt(turns("q", "a", "<image> r", "b"), num_images=1)
    assert f"user\n{BLOCK}\nq<" in text and "user\n<image> r<" in text


def test_text_only_keeps_the_literal() -> None:
    assert "user\nwhat is <image>?<" in prompt(turns("what is <image>?", "a"))


def test_a_first_turn_that_is_not_human_is_dropped() -> None:
    greeting = Turn(role="gpt", text="<image> hello")
    assert prompt([greeting, *turns("q", "a")]) == prompt(turns("q", "a"))
    with_image = turns("<image> q", "a")
    assert prompt([greeting, *with_image], 1) == prompt(with_image, 1)


@pytest.mark.parametrize("text", ["hello", "<image> hello"])
def test_a_placeholder_is_not_put_behind_a_dropped_turn(text: str) -> None:
    """The published code puts it before the first turn, and then drops that turn."""
    found = rejection([Turn(role="gpt", text=text), *turns("q", "a")], 1)
    assert found.reason == Reason.IMAGE_COUNT
    assert "1 images but 0 <image> in the conversation" in found.detail
    assert "one is put before the first turn, but only where that is from human" in found.detail


def test_the_system_message_can_be_set() -> None:
    pieces = render(turns("q", "a"), num_images=0, embeddings_per_image=2, system_message="S")
    assert not isinstance(pieces, Rejection)
    assert pieces[0].text.startswith("<|im_start|>system\nS<|im_end|><|im_start|>user\n")


@pytest.mark.parametrize(
    ("conversation", "num_images", "reason", "message"),
    [
        ([], 0, Reason.ODD_TURNS, "0 turns"),
        (turns("q"), 0, Reason.ODD_TURNS, "1 turns; every question needs an answer"),
        (turns("q", "a", "r"), 0, Reason.ODD_TURNS, "3 turns"),
        (
            [*turns("q", "a"), *turns("q", "a")[1:]],
            0,
            Reason.ROLES_DO_NOT_ALTERNATE,
            "turn 2 is from 'gpt' where 'human' must speak",
        ),
        (
            [Turn(role="gpt", text="x"), Turn(role="gpt", text="y"), *turns("q", "a")],
            0,
            Reason.ROLES_DO_NOT_ALTERNATE,
            "turn 0 is from 'gpt' where 'human' must speak",
        ),
        (turns("q", ""), 0, Reason.EMPTY_TURN, r"turn 1 \(gpt\) has no text"),
        (turns("", "a"), 0, Reason.EMPTY_TURN, r"turn 0 \(human\) has no text"),
        (turns("q", "a<|im_end|>"), 0, Reason.LITERAL_IM_END, "literal <|im_end|>"),
        (turns("<IMG_CONTEXT>", "a"), 0, Reason.LITERAL_IMG_CONTEXT, "literal <IMG_CONTEXT>"),
        (turns("q", "a"), 2, Reason.IMAGE_COUNT, "2 images but 1 <image> in the conversation"),
        (turns("<image>", "<image>"), 3, Reason.IMAGE_COUNT, "3 images but 2 <image>"),
    ],
)
def test_what_breaks_the_template_is_a_reason(
    conversation: list[Turn], num_images: int, reason: Reason, message: str
) -> None:
    found = rejection(conversation, num_images)
    assert found.reason == reason
    assert re.search(message.replace("|", r"\|"), found.detail)


def test_an_empty_first_question_with_an_image_is_the_image_alone() -> None:
    assert f"user\n{BLOCK}\n<|im_end|>" in prompt(turns("", "a"), num_images=1)


@pytest.mark.parametrize("number", [0, 1])
def test_reserved_texts_are_refused_in_any_turn(number: int) -> None:
    conversation = turns("q", "a")
    conversation[number] = Turn(role=conversation[number].role, text="a <img> b")
    found = render(conversation, num_images=0, embeddings_per_image=2, reserved=("<s>", "<img>"))
    assert isinstance(found, Rejection) and found.reason == Reason.LITERAL_SPECIAL_TOKEN
    role = conversation[number].role
    assert f"turn {number} ({role}) contains the literal <img>" in found.detail
    assert prompt(conversation)
