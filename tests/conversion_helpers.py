"""What several tests of the conversion share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmlm.conversion.convert import hf_to_megatron


def convert_in(parts: Path, output: Path, **options: Any) -> Path:
    """The three parts of a folder into a checkpoint."""
    return hf_to_megatron(vision=parts / "vision", llm=parts / "llm", output=output, **options)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Same names, dtypes, shapes and bits."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        raw = [each.contiguous().view(-1).view(torch.uint8) for each in (found[name], tensor)]
        assert torch.equal(*raw), name


def edit_safetensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Apply a function to the dict of a folder's only safetensors file."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
