"""Work that one rank does and all must agree on."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from mmlm.errors import MmlmError

T = TypeVar("T")


def on_rank_zero(function: Callable[[], T]) -> T:
    """Call ``function`` on rank 0 and give every rank its result; collective.

    Args:
        function: its result must be picklable.

    Returns:
        The result.

    Raises:
        MmlmError: on every rank what rank 0 raised, so that none is left waiting.
    """
    outcome: list[object] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = function()
        except MmlmError as error:
            error.on_every_rank = True
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[1], MmlmError):
        raise outcome[1]
    return outcome[0]  # type: ignore[return-value]
