"""Megatron's tensors are made in the announced shape and dtype."""

import pytest
import torch

from mmlm.checkpoint.manifest import Manifest
from mmlm.conversion.convert import megatron_to_hf
from mmlm.conversion.entry_reader import EntryReader
from mmlm.conversion.hf_source import open_parts
from mmlm.conversion.name_map import expand
from mmlm.conversion.vocabulary import plan_vocabulary
from mmlm.errors import CheckpointError
from tests.conversion_helpers import assert_equal, convert_in, edit_safetensors
from tests.tiny_weights import PROJECTOR_FILE, combined_state_dict, read_model_files


def test_tensors_are_as_announced(write_tiny_parts, num_pieces):
    parts = write_tiny_parts(dtype=torch.bfloat16)
    source = open_parts(parts / "vision", parts / "llm", parts / "vision" / PROJECTOR_FILE)
    plan = plan_vocabulary(parts / "llm", num_pieces + 9)
    for dtype in (None, torch.float32):
        reader = EntryReader(source, expand(source.config.model), plan, dtype, seed=0)
        sizes: list[int] = []
        read = reader.counted(sizes.append)
        for key, info in reader.infos.items():
            rows = info.shape[0]
            tensor = torch.cat((read(key, 0, rows // 2), read(key, rows // 2, rows)))
            assert tensor.shape == info.shape
            assert tensor.dtype == info.dtype == (dtype or torch.bfloat16)
        assert sum(sizes) == reader.num_bytes


def test_tensors_of_one_row_in_two_dtypes_take_the_wider(tmp_path, write_tiny_parts):
    parts = write_tiny_parts(dtype=torch.bfloat16)
    name = "model.layers.0.self_attn.k_proj.weight"
    edit_safetensors(parts / "llm", lambda tensors: tensors.update({name: tensors[name].float()}))
    expected = {name: tensor.float() for name, tensor in combined_state_dict(parts).items()}
    directory = convert_in(parts, tmp_path / "ckpt")
    assert Manifest.read(directory).dtype == "mixed"
    found = read_model_files(megatron_to_hf(load=directory, output=tmp_path / "out"))
    prefix = "language_model.model.layers.0.self_attn."
    for kind in "qkv":
        assert found[f"{prefix}{kind}_proj.weight"].dtype == torch.float32
    assert_equal({name: tensor.float() for name, tensor in found.items()}, expected)


def test_other_element_types_are_refused_unless_converted(tmp_path, write_tiny_parts):
    parts = write_tiny_parts()
    projector = parts / "vision" / PROJECTOR_FILE
    torch.save({k: v.double() for k, v in torch.load(projector).items()}, projector)
    with pytest.raises(CheckpointError, match=r"'mlp1.0.weight' is torch.float64; supported are"):
        convert_in(parts, tmp_path / "ckpt")
    convert_in(parts, tmp_path / "ckpt", dtype="fp32")
