"""Arguments of the commands that need a whole configuration: a recipe and changes to it."""

import argparse
from typing import TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""What a command adds its parser to."""


def add_recipe_arguments(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Add ``--recipe`` and ``--set``.

    Args:
        parser: of the command.
        required: whether there is no other place to take settings from.
    """
    parser.add_argument(
        "--recipe",
        required=required,
        metavar="FILE:FUNCTION",
        help="python file and the function in it that returns the RunConfig"
        + ("" if required else " (default: the settings that the checkpoint was trained with)"),
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="a.b=c",
        dest="overrides",
        help="replace one field of the recipe, e.g. optimizer.lr=2e-5; may be repeated",
    )
