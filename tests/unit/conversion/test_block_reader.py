"""Blocks are the blocks of the whole tensors, and nothing else is read."""

import itertools
from pathlib import Path

import pytest
import torch

from mmlm.conversion.block_reader import BlockReader
from mmlm.conversion.hf_reader import HFReader
from mmlm.conversion.hf_weights import HFWeights, open_weights
from mmlm.conversion.name_map import MODEL_PREFIX, expand
from mmlm.conversion.vocabulary import EMBEDDING, HEAD
from tests.tiny_weights import FileFormat


def blocks_of(shape: tuple[int, ...]) -> list[tuple[slice, ...]]:
    """The whole, the first half, and pieces that begin inside a head, of the first two dimensions.

    Of the others the whole.
    """
    cuts = [
        [slice(0, size), slice(0, (size + 1) // 2), slice(size // 3, size), slice(size - 1, size)]
        for size in shape[:2]
    ]
    return list(itertools.product(*cuts, *([slice(0, size)] for size in shape[2:])))


def whole_tensors(weights: HFWeights) -> dict[str, torch.Tensor]:
    """Every tensor from whole tensors of the files, and new rows by the published rule."""
    found = {
        entry.megatron_name: entry.rule.to_megatron(
            [weights.source.read(name) for name in entry.hf_names]
        )
        for entry in expand(weights.model)
    }
    num_new, width = weights.vocabulary.num_new_rows, weights.model.language.hidden_size
    generator = torch.Generator().manual_seed(42)
    drawn = 0.02 * torch.randn(num_new, width, generator=generator)
    mean = found[HEAD].double().mean(dim=0, keepdim=True).expand(num_new, -1)
    for name, rows in ((EMBEDDING, drawn), (HEAD, mean)):
        found[name] = torch.cat((found[name], rows.to(found[name].dtype)))
    return found


@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
@pytest.mark.parametrize(("num_new_rows", "dtype"), [(0, torch.bfloat16), (9, torch.float32)])
def test_every_block_is_that_of_the_whole_tensor(
    write_tiny_parts,
    monkeypatch: pytest.MonkeyPatch,
    file_format: FileFormat,
    num_new_rows: int,
    dtype: torch.dtype,
):
    parts = write_tiny_parts(
        num_new_rows=num_new_rows, dtype=dtype, file_format=file_format, shards=3
    )
    weights = open_weights(parts)
    expected = whole_tensors(weights)
    grown = weights.vocabulary.num_new_rows > 0
    assert grown == (num_new_rows == 0)

    def whole(self: HFReader, name: str) -> torch.Tensor:
        raise AssertionError(f"{name} was read whole")

    monkeypatch.setattr(HFReader, "read", whole)
    for name, tensor in expected.items():
        for place in blocks_of(tuple(tensor.shape)):
            reader = weights.blocks()
            block = reader.read(name, place)
            assert block.dtype == tensor.dtype == dtype
            assert torch.equal(block, tensor[place]), (name, place)
            if not (grown and name in (EMBEDDING, HEAD)):
                assert reader.bytes_read == block.nbytes, (name, place)


def test_new_rows_cost_no_bytes_but_the_mean_of_the_head(write_tiny_parts, num_pieces: int):
    weights = open_weights(write_tiny_parts(num_new_rows=0))
    width = weights.model.language.hidden_size
    bytes_a_row = 4 * width
    for name, rows, expected in (
        (EMBEDDING, slice(0, 10), 10),
        (EMBEDDING, slice(num_pieces - 1, num_pieces + 3), 1),
        (EMBEDDING, slice(num_pieces + 2, num_pieces + 9), 0),
        (HEAD, slice(0, num_pieces), num_pieces),
        (HEAD, slice(num_pieces - 1, num_pieces + 1), num_pieces + 1),
    ):
        reader = weights.blocks()
        reader.read(name, (rows, slice(0, width)))
        assert reader.bytes_read == expected * bytes_a_row, (name, rows)


def test_narrow_files_become_the_wider_of_a_row(write_tiny_parts, tmp_path: Path):
    """q is fp32 and k and v are bf16: the block is fp32, as the whole tensor is."""
    weights = open_weights(write_tiny_parts(dtype=torch.bfloat16))
    entries = expand(weights.model)
    name = "language_model.decoder.layers.0.self_attention.linear_qkv.weight"
    reader = BlockReader(
        weights.source, entries, {name: torch.float32}, weights.vocabulary, weights.seed
    )
    place = (slice(40, 60), slice(0, 48))
    whole = weights.reader.read(MODEL_PREFIX + name)
    assert torch.equal(reader.read(name, place), whole[place].float())
