"""Element types: names, casting, and what a set of tensors has in common."""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from mmlm.errors import CheckpointError

DtypeName = Literal["bf16", "fp16", "fp32"]

DTYPES: dict[str, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}
"""Name in commands and manifests -> element type."""


def dtype_name(dtypes: Iterable[torch.dtype]) -> str:
    """bf16, fp16 or fp32 when all are the same, otherwise mixed."""
    found = set(dtypes)
    names = [name for name, dtype in DTYPES.items() if dtype in found]
    return names[0] if len(names) == 1 else "mixed"


def torch_name(dtypes: Iterable[torch.dtype]) -> str:
    """The commonest of some types as HuggingFace's ``torch_dtype``, e.g. ``bfloat16``."""
    every = list(dtypes)
    return str(max(every, key=every.count)).removeprefix("torch.")


def cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Change the dtype; fp16 is refused where a finite value would become infinite.

    Args:
        tensor: any shape.
        dtype: wanted.
        name: of the tensor, for the message.
    """
    if tensor.dtype == dtype:
        return tensor
    result = tensor.to(dtype)
    if dtype == torch.float16 and bool((result.isinf() & tensor.isfinite()).any()):
        largest = float(tensor.abs().max())
        raise CheckpointError(f"tensor '{name}' holds {largest:g}, which is too large for fp16")
    return result
