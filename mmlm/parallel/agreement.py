"""Work that one rank does and all must agree on."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from mmlm.errors import MmlmError

T = TypeVar("T")


def on_rank_zero(function: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Call ``function`` on rank 0 and give every rank its result; collective.

    Args:
        function: its result must be picklable.
        group: all ranks; work that can take long wants a group that waits long
            (`Topology.control_group`). The default group when None.

    Returns:
        The result.

    Raises:
        MmlmError: on every rank what rank 0 raised, so that none is left waiting. An OSError (a
            full disk, a folder without permission) becomes one. Any other exception of rank 0 is
            raised there as it is, and told to the others.
    """
    outcome: list[object] = [None, None]
    unexpected: Exception | None = None
    if dist.get_rank() == 0:
        try:
            outcome[0] = function()
        except MmlmError as error:
            error.on_every_rank = True
            outcome[1] = error
        except OSError as error:
            outcome[1] = MmlmError(f"{error.filename or 'a file'}: {error.strerror or error}")
        except Exception as error:
            unexpected = error
            outcome[1] = MmlmError(f"rank 0 failed: {error!r}")
    dist.broadcast_object_list(outcome, src=0, group=group)
    if unexpected is not None:
        raise unexpected
    if isinstance(outcome[1], MmlmError):
        raise outcome[1]
    return outcome[0]  # type: ignore[return-value]
