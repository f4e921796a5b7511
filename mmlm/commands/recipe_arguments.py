"""Arguments of the commands that need a whole configuration: a recipe, changes, weights."""

import argparse
from dataclasses import replace
from typing import TypeAlias

from mmlm.config.schema import RunConfig

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


def add_weights_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--load`` and ``--load-hf``, of which one must be given."""
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument("--load", metavar="CKPT", help="checkpoint: a folder with 'latest'")
    weights.add_argument(
        "--load-hf",
        metavar="DIR",
        help="HuggingFace weights, read directly: a combined InternVL-Chat folder, or a folder "
        "with the parts as vision/ and llm/ (sizes of the samples are kept in "
        "work_dirs/run/data_cache unless --set data.cache_dir=... says where)",
    )


def with_weights(config: RunConfig, options: argparse.Namespace) -> RunConfig:
    """The configuration with the weights of ``--load`` or ``--load-hf`` and no others."""
    named = replace(config.checkpoint, load=options.load or "", load_hf=options.load_hf or "")
    return replace(config, checkpoint=named)
