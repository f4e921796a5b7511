"""Which rows the nine tokens get, and what is in them."""

import json
from pathlib import Path

import pytest
import torch

from mmlm.conversion.vocabulary import (
    VocabularyPlan,
    mean_of_rows,
    new_embedding_rows,
    plan_vocabulary,
    write_tokenizer_files,
)
from mmlm.data.tokenizer import NEW_TOKENS, Tokenizer
from mmlm.errors import CheckpointError


def plan(old_size: int, new_size: int) -> VocabularyPlan:
    return VocabularyPlan(old_size=old_size, new_size=new_size, added_tokens={}, new_tokens={})


def test_ids_follow_the_tokenizer(tokenizer_dir: Path, num_pieces: int):
    found = plan_vocabulary(tokenizer_dir, num_pieces)
    assert found.new_tokens == {
        token: num_pieces + number for number, token in enumerate(NEW_TOKENS)
    }
    assert (found.old_size, found.new_size, found.num_new_rows) == (num_pieces, num_pieces + 9, 9)


def test_rows_that_are_there_are_kept(tokenizer_dir: Path, num_pieces: int):
    assert plan_vocabulary(tokenizer_dir, num_pieces + 9).num_new_rows == 0
    assert plan_vocabulary(tokenizer_dir, num_pieces + 20).new_size == num_pieces + 20
    assert plan_vocabulary(tokenizer_dir, num_pieces + 4).num_new_rows == 5


def test_tokens_that_are_known_get_no_second_id(
    tokenizer_dir: Path, num_pieces: int, tmp_path: Path
):
    write_tokenizer_files(tokenizer_dir, tmp_path, plan_vocabulary(tokenizer_dir, num_pieces))
    again = plan_vocabulary(tmp_path, num_pieces + 9)
    assert again.new_tokens == {}
    assert again.num_new_rows == 0
    assert tuple(again.added_tokens) == NEW_TOKENS
    (tmp_path / "tokenizer_config.json").unlink()  # added_tokens.json alone says the same
    assert plan_vocabulary(tmp_path, num_pieces + 9) == again
    three = {token: num_pieces + i for i, token in enumerate(NEW_TOKENS[:3])}
    (tmp_path / "added_tokens.json").write_text(json.dumps(three))
    assert list(plan_vocabulary(tmp_path, num_pieces + 3).new_tokens) == list(NEW_TOKENS[3:])


def test_files_agree_with_the_training_tokenizer(
    tokenizer_dir: Path, num_pieces: int, tmp_path: Path
):
    found = plan_vocabulary(tokenizer_dir, num_pieces)
    write_tokenizer_files(tokenizer_dir, tmp_path, found)
    for folder in (tokenizer_dir, tmp_path):
        tokenizer = Tokenizer(folder)
        assert tokenizer.vocab_size == found.new_size
        assert {token: tokenizer.added_tokens[token] for token in NEW_TOKENS} == found.new_tokens
    assert json.loads((tmp_path / "added_tokens.json").read_text()) == found.new_tokens
    special = json.loads((tmp_path / "special_tokens_map.json").read_text())
    assert special["additional_special_tokens"] == list(NEW_TOKENS)


def test_huggingface_gives_the_same_ids(tokenizer_dir: Path, num_pieces: int, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    found = plan_vocabulary(tokenizer_dir, num_pieces)
    write_tokenizer_files(tokenizer_dir, tmp_path, found)
    tokenizer = transformers.LlamaTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == found.new_size
    assert tokenizer.convert_tokens_to_ids(list(NEW_TOKENS)) == list(found.new_tokens.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_rows_are_as_published(dtype: torch.dtype):
    old = (3 + torch.randn(5000, 64)).to(dtype)
    new = new_embedding_rows(plan(5000, 5400), 64, seed=1)
    assert new.shape == (400, 64)
    assert abs(float(new.mean())) < 5e-4
    assert abs(float(new.std()) - 0.02) < 5e-4
    assert torch.equal(new, new_embedding_rows(plan(5000, 5400), 64, seed=1))
    assert not torch.equal(new, new_embedding_rows(plan(5000, 5400), 64, seed=2))
    mean = mean_of_rows(lambda rows: old[rows], 5000)
    assert torch.allclose(mean, old.double().mean(dim=0), rtol=1e-12)
    # published: one mean over the rows in the head's own type, which rounds it as we do
    assert torch.equal(mean.to(dtype), old.double().mean(dim=0).to(dtype))


def test_bad_tokenizers_are_named(tokenizer_dir: Path, num_pieces: int, tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: missing; the vocabulary cannot"):
        plan_vocabulary(tmp_path, num_pieces)
    with pytest.raises(CheckpointError, match=f"has {num_pieces} tokens, the weights 10 rows"):
        plan_vocabulary(tokenizer_dir, 10)
    (tmp_path / "tokenizer.model").write_text("no model")
    with pytest.raises(CheckpointError, match="not a SentencePiece model"):
        plan_vocabulary(tmp_path, num_pieces)
    (tmp_path / "tokenizer.model").write_bytes((tokenizer_dir / "tokenizer.model").read_bytes())
    twice = {"<img>": num_pieces, "</img>": num_pieces}
    (tmp_path / "added_tokens.json").write_text(json.dumps(twice))
    with pytest.raises(CheckpointError, match="two tokens have the same id"):
        plan_vocabulary(tmp_path, num_pieces + 9)
