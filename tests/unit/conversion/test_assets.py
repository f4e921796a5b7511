"""The small files of HuggingFace go in with the weights and come out again."""

import json
import logging

from mmlm.conversion.assets import copy_llm_files
from mmlm.conversion.convert import megatron_to_hf
from tests.conversion_helpers import convert_in
from tests.tiny_weights import PROJECTOR_FILE


def test_small_files_travel(tmp_path, write_tiny_parts):
    parts = write_tiny_parts(unknown_key={"kept": 1})
    (parts / "llm/generation_config.json").write_text('{"max_new_tokens": 5}')
    (parts / "vision/preprocessor_config.json").write_text('{"size": 56}')
    convert_in(parts, tmp_path / "ckpt")
    out = megatron_to_hf(load=tmp_path / "ckpt", output=tmp_path / "out", parts=True)
    tokenizer = {
        "tokenizer.model",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
    }
    for folder, names in {
        out: tokenizer | {"generation_config.json", "preprocessor_config.json", "config.json"},
        out / "llm": tokenizer | {"generation_config.json", "config.json"},
        out / "vision": {"preprocessor_config.json", "config.json", PROJECTOR_FILE},
    }.items():
        assert {name for name in names if (folder / name).is_file()} == names
    config = json.loads((out / "config.json").read_text())
    assert config["llm_config"]["unknown_key"] == {"kept": 1}
    for part, key in (("llm", "llm_config"), ("vision", "vision_config")):
        original = json.loads((parts / part / "config.json").read_text())
        assert json.loads((out / part / "config.json").read_text()) == original
        assert config[key] == original


def test_a_missing_tokenizer_is_said(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="mmlm"):
        copy_llm_files(tmp_path, tmp_path)
    assert "no tokenizer.model, so no tokenizer is exported" in caplog.text
