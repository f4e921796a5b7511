"""Token ids and labels equal those of the published preprocessing on transformers 4.37.

``tests/data/golden_tokens`` has the ids, the tokenizer they were made with (laid out as Yi's) and
the script that made them with the slow LlamaTokenizer. The comparison is exact.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mmlm.data.annotation import Record, Turn
from mmlm.data.rejection import Reason, Rejection
from mmlm.data.sample import SampleSettings, TokenizedSample, tokenize
from mmlm.data.tokenizer import NEW_TOKENS, Tokenizer
from tests.parity.reference_preprocessing import preprocess

FOLDER = Path(__file__).parents[1] / "data" / "golden_tokens"
GOLDEN: dict[str, Any] = json.loads((FOLDER / "golden.json").read_text("utf-8"))
CONVERSATIONS = GOLDEN["conversations"]

EXCLUDED = {
    # name: why mmlm leaves it out, and whether the published code would have trained on it
    "too_few_placeholders": (Reason.IMAGE_COUNT, False),
    "greeting_image_nowhere": (Reason.IMAGE_COUNT, False),
    "greeting_has_image": (Reason.IMAGE_COUNT, False),
    "greeting_alone": (Reason.ODD_TURNS, False),
    "no_turn": (Reason.ODD_TURNS, False),
    "odd": (Reason.ODD_TURNS, False),
    "odd_long": (Reason.ODD_TURNS, True),
    "role_twice": (Reason.ROLES_DO_NOT_ALTERNATE, False),
    "role_unknown": (Reason.ROLES_DO_NOT_ALTERNATE, False),
    "empty_answer": (Reason.EMPTY_TURN, False),
    "empty_answer_between": (Reason.EMPTY_TURN, False),
    "empty_question": (Reason.EMPTY_TURN, False),
    "end_in_question": (Reason.LITERAL_IM_END, False),
    "end_in_answer": (Reason.LITERAL_IM_END, False),
    "round_in_question": (Reason.LITERAL_IM_END, True),
    "img_in_question": (Reason.LITERAL_SPECIAL_TOKEN, True),
    "img_in_answer": (Reason.LITERAL_SPECIAL_TOKEN, True),
    "img_beside_image": (Reason.LITERAL_SPECIAL_TOKEN, True),
    "img_end_beside_image": (Reason.LITERAL_SPECIAL_TOKEN, False),
    "img_pair": (Reason.LITERAL_SPECIAL_TOKEN, True),
    "img_context": (Reason.LITERAL_IMG_CONTEXT, True),
    "start_in_question": (Reason.LITERAL_SPECIAL_TOKEN, True),
    "bos_in_question": (Reason.LITERAL_SPECIAL_TOKEN, True),
    "end_of_text_in_answer": (Reason.LITERAL_SPECIAL_TOKEN, True),
    "pad_in_question": (Reason.LITERAL_SPECIAL_TOKEN, False),
    "cut_before_answer": (Reason.NO_SUPERVISED_TOKEN, False),
    "cut_in_image": (Reason.CUT_INSIDE_IMAGE, False),
    "cut_in_second_image": (Reason.CUT_INSIDE_IMAGE, False),
}
SPELLED = [name for name, (why, _) in EXCLUDED.items() if why == Reason.LITERAL_SPECIAL_TOKEN]

# Cut between two pictures: the published code gives the sample up, mmlm trains on what is left.
WITHOUT_ITS_LAST_IMAGE = ("cut_before_second_image",)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(FOLDER)


def test_golden_ids_are_of_the_published_version(tokenizer: Tokenizer) -> None:
    assert GOLDEN["versions"]["transformers"] == "4.37.2"
    assert tokenizer.vocab_size == GOLDEN["vocab_size"]
    size = GOLDEN["vocab_size"] - len(NEW_TOKENS)
    assert [tokenizer.added_tokens[token] for token in NEW_TOKENS] == list(range(size, size + 9))
    assert (tokenizer.im_start_id, tokenizer.im_end_id) == (6, 7)


@pytest.mark.parametrize("entry", GOLDEN["texts"], ids=lambda entry: repr(entry["text"]))
def test_ids_of_a_text(tokenizer: Tokenizer, entry: dict[str, Any]) -> None:
    assert tokenizer.encode(entry["text"]) == entry["ids"]


@pytest.mark.parametrize("case", CONVERSATIONS, ids=lambda case: case["name"])
def test_a_conversation(tokenizer: Tokenizer, case: dict[str, Any]) -> None:
    """Ids and labels are the published ones, or the record is left out for a known reason."""
    found = tokenize(_record(case), tokenizer, _settings(case))
    if case["name"] in EXCLUDED:
        reason, trained_as_published = EXCLUDED[case["name"]]
        assert isinstance(found, Rejection) and found.reason == reason
        assert case["trained"] == trained_as_published
        return
    assert isinstance(found, TokenizedSample), found
    assert found.input_ids.tolist() == case["ids"]
    assert found.labels.tolist() == _labels(case)
    if case["name"] in WITHOUT_ITS_LAST_IMAGE:
        assert case["failure"] and found.num_images == len(case["image"]) - 1
    else:
        assert case["trained"] and found.num_images == len(case["image"])


@pytest.mark.parametrize("name", SPELLED)
def test_special_tokens_in_a_text_can_be_followed_as_published(
    tokenizer: Tokenizer, name: str
) -> None:
    (case,) = [case for case in CONVERSATIONS if case["name"] == name]
    found = tokenize(_record(case), tokenizer, _settings(case, special_literals="tokens"))
    if not case["trained"]:
        assert isinstance(found, Rejection) and found.reason == Reason.LITERAL_SPECIAL_TOKEN
        return
    assert isinstance(found, TokenizedSample), found
    assert (found.input_ids.tolist(), found.labels.tolist()) == (case["ids"], _labels(case))


def test_the_reference_needs_nothing_but_an_encoder(tokenizer: Tokenizer) -> None:
    """With mmlm's tokenizer the reference gives what it gave with the slow LlamaTokenizer."""
    for case in CONVERSATIONS:
        published = preprocess(
            case,
            tokenizer.encode,
            tokens_per_image=4,
            max_length=case["max_length"],
            pad_id=0,
            image_end_id=tokenizer.added_tokens["</img>"],
        )
        assert list(published.ids) == case["ids"], case["name"]
        assert published.shifted[:-1] == _labels(case)[:-1]
        assert (published.failure, published.trained) == (case["failure"], case["trained"])


@pytest.mark.parametrize("case", CONVERSATIONS[:6], ids=lambda case: case["name"])
def test_without_legacy_there_would_be_one_piece_more(
    tokenizer: Tokenizer, case: dict[str, Any]
) -> None:
    """What ``"legacy": false`` would do to a conversation, which is why it is not followed."""
    (space,) = tokenizer.encode(" ")
    assert case["ids_if_not_legacy"] == [space, *case["ids"]]


def test_listing_every_mark_changes_no_id(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """``<|im_start|>`` may be listed or left to SentencePiece, the nine be there or not."""
    folder = Path(shutil.copytree(FOLDER, tmp_path / "listed"))
    config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    for token in ("<|im_start|>", *NEW_TOKENS):
        entry = {"content": token, "special": True, "lstrip": False, "rstrip": False}
        config["added_tokens_decoder"][str(tokenizer.added_tokens[token])] = entry
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    listed = Tokenizer(folder)
    for entry in GOLDEN["texts"]:
        assert listed.encode(entry["text"]) == entry["ids"], entry["text"]


def _settings(case: dict[str, Any], **changes: Any) -> SampleSettings:
    return SampleSettings(
        seq_length=case["max_length"], image_size=56, embeddings_per_image=4, **changes
    )


def _labels(case: dict[str, Any]) -> list[int]:
    marked = zip(case["ids"], case["supervised"], strict=True)
    return [*[token if wanted else -100 for token, wanted in marked][1:], -100]


def _record(case: dict[str, Any]) -> Record:
    turns = [Turn(role=turn["from"], text=turn["value"]) for turn in case["conversations"]]
    images = tuple(case["image"])
    return Record(file=FOLDER, line=1, identity="", images=images, turns=tuple(turns))
