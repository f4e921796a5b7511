"""Token ids and masks equal those of the slow LlamaTokenizer of transformers 4.37.

``tests/data/golden_tokens`` has the ids, the tokenizer they were made with (laid out as Yi's) and
the script that made them. The comparison is exact.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mmlm.data.annotation import Record, Turn
from mmlm.data.sample import SampleSettings, TokenizedSample, tokenize
from mmlm.data.tokenizer import NEW_TOKENS, Tokenizer

FOLDER = Path(__file__).parents[1] / "data" / "golden_tokens"
GOLDEN: dict[str, Any] = json.loads((FOLDER / "golden.json").read_text("utf-8"))
CONVERSATIONS = GOLDEN["conversations"]
SETTINGS = SampleSettings(seq_length=512, image_size=56, embeddings_per_image=4)


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


@pytest.mark.parametrize("number", range(len(CONVERSATIONS)))
def test_ids_and_mask_of_a_conversation(tokenizer: Tokenizer, number: int) -> None:
    golden = CONVERSATIONS[number]
    assert tokenizer.encode(golden["prompt"]) == golden["ids"]
    sample = tokenize(_record(golden), tokenizer, SETTINGS)
    assert isinstance(sample, TokenizedSample)
    assert sample.input_ids.tolist() == golden["ids"]
    targets = [
        token if wanted else -100
        for token, wanted in zip(golden["ids"], golden["supervised"], strict=True)
    ]
    assert sample.labels.tolist() == [*targets[1:], -100]
    assert sample.num_images == golden["num_images"]


@pytest.mark.parametrize("number", range(len(CONVERSATIONS)))
def test_without_legacy_there_would_be_one_piece_more(tokenizer: Tokenizer, number: int) -> None:
    """What ``"legacy": false`` would do to a conversation, which is why it is not followed."""
    golden = CONVERSATIONS[number]
    (space,) = tokenizer.encode(" ")
    assert golden["ids_if_not_legacy"] == [space, *golden["ids"]]


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


def _record(golden: dict[str, Any]) -> Record:
    turns = [
        Turn(role=role, text=text)
        for pair in golden["turns"]
        for role, text in zip(("human", "gpt"), pair, strict=True)
    ]
    images = tuple(f"{number}.png" for number in range(golden["num_images"]))
    return Record(file=FOLDER, line=1, identity="", images=images, turns=tuple(turns))
