"""Slow-Llama behaviour, added tokens and what a broken folder says."""

import json
import shutil
from pathlib import Path

import pytest

from mmlm.data.tokenizer import NEW_TOKENS, Tokenizer
from mmlm.errors import DataError
from tests.tiny_data import make_tokenizer

TEXTS = (
    "<|im_start|>user\n红色 hi <img><IMG_CONTEXT></img>\n  What  <box>[1, 2]</box> x<|im_end|>",
    "<|im_start|>assistant\n The square.<|im_end|><|im_start|>user\n",
    "a </s> <s>b <unk> c\n\n\td",
    "",
    " ",
    " <img> ",
)


@pytest.fixture
def folder(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(tokenizer.folder, tmp_path / "copy"))


def test_nine_tokens_follow_the_vocabulary_in_order(tokenizer: Tokenizer) -> None:
    assert [tokenizer.added_tokens[token] for token in NEW_TOKENS] == list(range(448, 457))
    assert tokenizer.vocab_size == 457
    published = "<img> </img> <IMG_CONTEXT> <quad> </quad> <ref> </ref> <box> </box>"
    assert " ".join(NEW_TOKENS) == published
    assert (tokenizer.im_start_id, tokenizer.im_end_id, tokenizer.img_context_id) == (3, 4, 450)


def test_text_comes_back_whole(tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_one_token_is_written_as_the_vocabulary_does(tokenizer: Tokenizer) -> None:
    assert tokenizer.piece(tokenizer.img_context_id) == "<IMG_CONTEXT>"
    assert [tokenizer.piece(number) for number in tokenizer.encode("\x07<box>")] == [
        "<0x07>",
        "<box>",
    ]
    assert "".join(map(tokenizer.piece, tokenizer.encode(" The square"))) == "\u2581The\u2581square"


def test_pieces_between_special_tokens_are_encoded_alone(tokenizer: Tokenizer) -> None:
    left, right = " What colour \n", "\n is 红色 "
    assert tokenizer.encode(f"{left}<|im_end|>{right}") == [
        *tokenizer.encode(left),
        tokenizer.im_end_id,
        *tokenizer.encode(right),
    ]


def test_the_longest_added_token_wins(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"]["448"] = {"content": "<img>big"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer(folder).encode("<img>big<img>") == [448, 449]


def test_added_tokens_can_be_left_out_of_the_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<|im_start|>The square<|im_end|>")
    assert tokenizer.decode(ids, skip_added_tokens=True) == "The square"


@pytest.mark.parametrize("add_dummy_prefix", [False, True])
def test_ids_equal_huggingface_slow_llama(tmp_path: Path, add_dummy_prefix: bool) -> None:
    transformers = pytest.importorskip("transformers")
    folder = make_tokenizer(tmp_path, add_dummy_prefix=add_dummy_prefix)
    reference = transformers.LlamaTokenizer.from_pretrained(str(folder))
    reference.add_tokens(list(NEW_TOKENS), special_tokens=True)
    tokenizer = Tokenizer(folder)
    assert tokenizer.vocab_size == len(reference)
    for text in TEXTS:
        assert tokenizer.encode(text) == reference(text)["input_ids"]


def test_a_folder_that_has_the_nine_tokens_keeps_its_ids(folder: Path) -> None:
    ids = {token: 448 + place for place, token in enumerate(reversed(NEW_TOKENS))}
    (folder / "added_tokens.json").write_text(json.dumps(ids))
    tokenizer = Tokenizer(folder)
    assert tokenizer.vocab_size == 457
    assert {token: tokenizer.added_tokens[token] for token in NEW_TOKENS} == ids


def test_the_fingerprint_follows_what_changes_encodings(
    tokenizer: Tokenizer, folder: Path, tmp_path: Path
) -> None:
    assert Tokenizer(folder).fingerprint == tokenizer.fingerprint
    (folder / "added_tokens.json").write_text('{"<new>": 448}')
    assert Tokenizer(folder).fingerprint != tokenizer.fingerprint
    (folder / "added_tokens.json").unlink()
    (folder / "special_tokens_map.json").write_text('{"pad_token": "<unk>"}')
    assert Tokenizer(folder).fingerprint != tokenizer.fingerprint
    other = make_tokenizer(tmp_path / "other", vocab_size=440)
    assert Tokenizer(other).fingerprint != tokenizer.fingerprint


def test_chatml_tokens_are_found_without_json_files(folder: Path, tokenizer: Tokenizer) -> None:
    for path in folder.glob("*.json"):
        path.unlink()
    assert Tokenizer(folder).encode("<|im_end|>") == [tokenizer.im_end_id]


def test_special_literals_are_all_special_tokens_but_those_of_regions(
    tokenizer: Tokenizer, folder: Path
) -> None:
    special = "</img> </s> <IMG_CONTEXT> <img> <s> <unk> <|im_end|> <|im_start|>"
    assert " ".join(tokenizer.special_literals) == special
    assert tokenizer.pad_token == ""
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"]["448"] = {"content": "<tool>", "special": True}
    config["added_tokens_decoder"]["449"] = {"content": "hello", "special": False}
    config["added_tokens_decoder"]["450"] = {"content": "<box>", "special": True}
    config["pad_token"] = {"content": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    other = Tokenizer(folder)
    assert set(other.special_literals) - set(tokenizer.special_literals) == {"<tool>"}
    assert other.pad_token == "<unk>"


def test_an_id_outside_the_vocabulary_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"token id 457 is outside the vocabulary .*457 ids"):
        tokenizer.decode([457])


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: the tokenizer folder does not exist"):
        Tokenizer(tmp_path / "nowhere")


def test_a_missing_model_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tokenizer\.model: cannot read the SentencePiece model"):
        Tokenizer(tmp_path)


def test_a_broken_model_file_is_named(folder: Path) -> None:
    (folder / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(DataError, match=r"tokenizer\.model: not a SentencePiece model"):
        Tokenizer(folder)


@pytest.mark.parametrize(("text", "message"), [("{", "not valid JSON"), ("[]", "must be a JSON")])
def test_a_broken_config_is_named(folder: Path, text: str, message: str) -> None:
    (folder / "tokenizer_config.json").write_text(text)
    with pytest.raises(DataError, match=rf"tokenizer_config\.json: {message}"):
        Tokenizer(folder)


def test_a_vocabulary_without_chatml_is_refused(folder: Path) -> None:
    for path in folder.glob("*.json"):
        path.unlink()
    model = (folder / "tokenizer.model").read_bytes()
    (folder / "tokenizer.model").write_bytes(model.replace(b"<|im_end|>", b"<|im_fin|>"))
    with pytest.raises(DataError, match=r"the tokenizer has no <\|im_end\|>; the Hermes-2"):
        Tokenizer(folder)
