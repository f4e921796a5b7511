"""A logger that knows its rank: rank 0 speaks at INFO, the others from WARNING on."""

import logging
import os
import sys


def get_logger(name: str = "mmlm") -> logging.Logger:
    """Return the logger ``name`` (a child of ``mmlm``); silent until `setup_logging` is called."""
    return logging.getLogger(name)


def setup_logging(rank: int | None = None) -> None:
    """Write ``mmlm`` messages to stderr, prefixed with the rank where there are several.

    Args:
        rank: this process's global rank; read from ``RANK`` when not given (0 without it).
    """
    if rank is None:
        rank = int(os.environ.get("RANK", "0"))
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    handler = logging.StreamHandler(sys.stderr)
    prefix = f"[rank {rank}] " if several and rank else ""
    handler.setFormatter(logging.Formatter(f"{prefix}%(message)s"))
    logger = logging.getLogger("mmlm")
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
