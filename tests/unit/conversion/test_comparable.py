"""Every form of the same weights has the same names, shapes and rows."""

from pathlib import Path

import pytest
import torch

from mmlm.conversion.comparable import Weights, open_hf, open_megatron
from mmlm.conversion.convert import hf_to_megatron, megatron_to_hf
from mmlm.errors import CheckpointError
from tests.conversion_helpers import assert_equal, convert_in
from tests.tiny_weights import PROJECTOR_FILE, combined_state_dict, read_model_files


def read_all(weights: Weights, step: int = 1_000_000) -> dict[str, torch.Tensor]:
    return {
        name: torch.cat(
            [
                weights.read_rows(name, start, min(start + step, shape[0]))
                for start in range(0, shape[0], step)
            ]
        )
        for name, shape in weights.shapes.items()
    }


@pytest.mark.parametrize("step", [7, 1_000_000])
def test_every_form_gives_the_tensors_of_the_files(write_tiny_parts, tmp_path: Path, step: int):
    parts = write_tiny_parts(dtype=torch.bfloat16)
    checkpoint = convert_in(parts, tmp_path / "ckpt")
    combined = megatron_to_hf(load=checkpoint, output=tmp_path / "combined")
    expected = combined_state_dict(parts)
    sides = [open_hf(parts), open_hf(combined), open_megatron(tmp_path / "ckpt")]
    for side in sides:
        assert_equal(read_all(side, step), expected)
        assert set(side.dtypes.values()) == {torch.bfloat16}
        assert side.num_bytes == sum(tensor.nbytes for tensor in expected.values())
    assert [side.where for side in sides] == [str(parts), str(combined), str(checkpoint)]


def test_a_part_alone_has_the_names_of_the_combined_folder(write_tiny_parts, tmp_path: Path):
    parts = write_tiny_parts()
    for path, prefix in (
        (parts / "vision", "vision_model."),
        (parts / "llm", "language_model."),
        (parts / "vision" / PROJECTOR_FILE, "mlp1."),
    ):
        names = open_hf(path).shapes.keys()
        assert names
        assert all(name.startswith(prefix) for name in names)
    inner = read_model_files(parts / "vision")
    checkpoint = hf_to_megatron(vision=parts / "vision", output=tmp_path / "ckpt")
    for found in (open_hf(parts / "vision"), open_megatron(checkpoint)):
        assert_equal(
            read_all(found), {"vision_model." + name: tensor for name, tensor in inner.items()}
        )


def test_names_of_another_model_and_numbers_without_dimensions(tmp_path: Path):
    torch.save({"transformer.w": torch.ones(2), "scale": torch.tensor(3.0)}, tmp_path / "x.pth")
    found = open_hf(tmp_path / "x.pth")
    assert found.shapes == {"transformer.w": (2,), "scale": (1,)}
    assert found.read_rows("scale", 0, 1).tolist() == [3.0]


def test_what_is_no_checkpoint_is_an_error(tmp_path: Path):
    with pytest.raises(CheckpointError, match="gone: does not exist"):
        open_megatron(tmp_path / "gone")
    with pytest.raises(CheckpointError, match="gone: there is no such file or folder"):
        open_hf(tmp_path / "gone")
