"""The tiny published-layout weights: same values back, files as HuggingFace names them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.parity.reference_model import ReferenceInternVL
from tests.tiny_weights import (
    FileFormat,
    combined_config,
    combined_state_dict,
    read_model_files,
    tiny_llm_config,
    tiny_vision_config,
    write_parts,
)


@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 3])
def test_files_and_round_trip(tmp_path: Path, file_format: FileFormat, shards: int) -> None:
    vision, llm = tiny_vision_config(), tiny_llm_config(60)
    write_parts(tmp_path / "a", vision, llm, 1, torch.bfloat16, file_format, shards)
    write_parts(tmp_path / "b", vision, llm, 1, torch.bfloat16)
    stem = "model" if file_format == "safetensors" else "pytorch_model"
    expected = (
        {f"{stem}.{file_format}"}
        if shards == 1
        else {f"{stem}-0000{i}-of-00003.{file_format}" for i in (1, 2, 3)}
        | {f"{stem}.{file_format}.index.json"}
    )
    for part in ("vision", "llm"):
        found = {f.name for f in (tmp_path / "a" / part).iterdir() if f.is_file()}
        assert found == expected | {"config.json"}
    one, other = combined_state_dict(tmp_path / "a"), combined_state_dict(tmp_path / "b")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert {tensor.dtype for tensor in one.values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "a" / "llm" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    assert config["vocab_size"] == 60
    if shards > 1:
        index = json.loads(
            (tmp_path / "a" / "llm" / f"{stem}.{file_format}.index.json").read_text()
        )
        tensors = read_model_files(tmp_path / "a" / "llm")
        assert index["weight_map"].keys() == tensors.keys()
        assert index["metadata"]["total_size"] == sum(2 * t.numel() for t in tensors.values())


def test_reference_loads_them(tmp_path: Path) -> None:
    write_parts(tmp_path, tiny_vision_config(num_hidden_layers=4), tiny_llm_config(60), seed=2)
    model = ReferenceInternVL(combined_config(tmp_path))
    model.load_state_dict(combined_state_dict(tmp_path), strict=True)
    assert len(model.vision_model.encoder.layers) == 4


def test_values_are_not_degenerate(tmp_path: Path) -> None:
    write_parts(tmp_path, tiny_vision_config(), tiny_llm_config(60))
    for name, tensor in combined_state_dict(tmp_path).items():
        assert tensor.std() > 0.01, name
        assert tensor.abs().max() < 5, name
    other = tmp_path / "other"
    write_parts(other, tiny_vision_config(), tiny_llm_config(60), seed=1)
    first, second = combined_state_dict(tmp_path), combined_state_dict(other)
    assert not any(torch.equal(first[name], second[name]) for name in first)


def test_missing_and_repeated_tensors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no \*\.safetensors"):
        read_model_files(tmp_path)
    write_parts(tmp_path, tiny_vision_config(), tiny_llm_config(60))
    write_parts(tmp_path, tiny_vision_config(), tiny_llm_config(60), file_format="bin")
    with pytest.raises(ValueError, match="already came from another file"):
        combined_state_dict(tmp_path)
    with pytest.raises(ValueError, match="cannot fill 999 shards"):
        write_parts(tmp_path, tiny_vision_config(), tiny_llm_config(60), shards=999)
