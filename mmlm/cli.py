"""The command ``mmlm``; each of its commands has a file in `mmlm.commands`."""

import argparse
import os
import sys
import warnings
from collections.abc import Sequence

from mmlm.commands.data import add_data_parser
from mmlm.commands.debug import add_debug_parser
from mmlm.commands.evaluate import add_evaluate_parser
from mmlm.commands.train import add_train_parser
from mmlm.errors import MmlmError
from mmlm.log import get_logger, setup_logging

QUIET = (
    # absence of the optional packages is reported in the start-up summary instead
    ".*(Transformer Engine|Apex).*not installed",
    # megatron-core about its own defaults and calls
    "full scope is deprecated",
    ".*load_state_dict.* is deprecated",
    # topology.initialize sets CUDA_DEVICE_MAX_CONNECTIONS where there is CUDA
    "When using async grad allreduce it is recommended",
    "When using sequence parallelism it is recommended",
    ".*torch.distributed.* is deprecated",
)
"""Warnings of megatron-core that a user can do nothing about."""


def build_parser() -> argparse.ArgumentParser:
    """The command line of ``mmlm``.

    Each command sets ``run``, a function that takes the options and returns the exit status. What
    it needs is imported in there, so that ``--help`` and wrong settings need no megatron.
    """
    parser = argparse.ArgumentParser(
        prog="mmlm",
        description="3D-parallel training of InternVL-Chat models on megatron-core.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (add_train_parser, add_evaluate_parser, add_data_parser, add_debug_parser):
        add(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: the command line without the program's name; ``sys.argv`` when None.

    Returns:
        0; 1 after one printed line for an error that the user can mend, or where a topic of
        ``mmlm data`` says so.
    """
    options = build_parser().parse_args(arguments)
    setup_logging()
    for message in QUIET:
        warnings.filterwarnings("ignore", message=message)
    rank = int(os.environ.get("RANK", "0"))
    try:
        status: int = options.run(options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever reads the output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except MmlmError as error:
        if rank == 0 or not error.on_every_rank:
            get_logger().error(f"error: {error}")
        if "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized():
            sys.stderr.flush()
            os._exit(1)  # other ranks may wait in a collective: leave without waiting for them
        return 1
