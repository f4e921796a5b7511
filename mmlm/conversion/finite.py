"""Finds NaN and infinity in weights as they pass by."""

import torch
from torch import Tensor

from mmlm.errors import CheckpointError
from mmlm.log import get_logger

_SHOWN = 10
"""Names in a warning."""

_log = get_logger("mmlm.conversion")


class FiniteCheck:
    """Looks at every block of every tensor that is read.

    Args:
        strict: refuse the first tensor that is not finite, instead of a warning at the end.
    """

    def __init__(self, *, strict: bool = False) -> None:
        self._strict = strict
        self._found: dict[str, str] = {}

    def look(self, block: Tensor, name: str, where: str) -> None:
        """Judge some rows of a tensor.

        Args:
            block: any shape and dtype.
            name: of the tensor.
            where: the file.

        Raises:
            CheckpointError: if it is not finite and the check is strict.
        """
        if name in self._found or is_finite(block):
            return
        self._found[name] = where
        if self._strict:
            raise CheckpointError(f"{where}: tensor '{name}' holds NaN or infinity")

    def warn(self) -> None:
        """Log what was found, if anything."""
        if self._found:
            shown = [f"'{name}' in {where}" for name, where in list(self._found.items())[:_SHOWN]]
            more = "" if len(self._found) <= _SHOWN else f" and {len(self._found) - _SHOWN} more"
            _log.warning(
                "NaN or infinity in %d tensors: %s%s (--strict refuses them)",
                len(self._found),
                ", ".join(shown),
                more,
            )


def is_finite(block: Tensor) -> bool:
    """Whether no element is NaN or infinite.

    A sum is not finite if an element is not, and costs a fiftieth of looking at every one; only
    when it is not finite (it may have overflowed) are the elements looked at.
    """
    if not block.is_floating_point():
        return True
    if block.itemsize == 1:
        block = block.float()
    wide = torch.float32 if block.dtype == torch.float16 else None
    return bool(block.sum(dtype=wide).isfinite()) or bool(block.isfinite().all())
