"""HuggingFace folders that are opened whole."""

from pathlib import Path

import pytest
import torch

from mmlm.conversion.convert import megatron_to_hf
from mmlm.conversion.hf_weights import HFWeights, open_weights
from mmlm.errors import CheckpointError
from tests.conversion_helpers import convert_in


def read_all(weights: HFWeights) -> dict[str, torch.Tensor]:
    return {key: weights.reader.read(key) for key in weights.reader.dtypes}


@pytest.mark.parametrize("num_new_rows", [9, 0])
def test_combined_and_parts_are_the_same_weights(
    tmp_path: Path, write_tiny_parts, num_pieces: int, num_new_rows: int
):
    parts = write_tiny_parts(num_new_rows=num_new_rows)
    convert_in(parts, tmp_path / "checkpoint")
    megatron_to_hf(load=tmp_path / "checkpoint", output=tmp_path / "combined")
    three, one = open_weights(parts), open_weights(tmp_path / "combined")
    assert three.model == one.model
    assert three.model.language.vocab_size == num_pieces + 9
    assert three.dtype == one.dtype == "fp32"
    assert three.tokenizer_dir == parts / "llm"
    assert one.tokenizer_dir == tmp_path / "combined"
    found, expected = read_all(three), read_all(one)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (False, "nowhere: does not exist; give a combined InternVL-Chat folder, or one that holds"),
        (True, "nowhere: has neither config.json nor vision/ and llm/; give a combined"),
    ],
)
def test_another_folder_is_an_error(tmp_path: Path, make: bool, message: str):
    folder = tmp_path / "nowhere"
    if make:
        (folder / "vision").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=message):
        open_weights(folder)
