"""The command ``mmlm``: train and evaluate."""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mmlm.config.checks import check_run
from mmlm.config.load import apply_overrides, load_recipe
from mmlm.errors import ConfigError, MmlmError
from mmlm.log import get_logger, setup_logging

TRAIN_EPILOG = """\
examples (on the data and weights that examples/internvl_v1_2/pretrain.sh has made):
  one process (CPU or GPU):
    mmlm train --recipe examples/internvl_v1_2/recipe.py:tiny --set output_dir=work_dirs/one
  four processes, TP 2 x PP 2:
    torchrun --standalone --nproc-per-node 4 -m mmlm train \\
        --recipe examples/internvl_v1_2/recipe.py:tiny \\
        --set parallel.tensor_model_parallel_size=2 \\
        --set parallel.pipeline_model_parallel_size=2

A run that finds a checkpoint in output_dir/checkpoints continues it, in any layout.
"""


QUIET = (
    # absence of the optional packages is reported in the start-up summary instead
    ".*(Transformer Engine|Apex).*not installed",
    # megatron-core about its own defaults and calls
    "full scope is deprecated",
    ".*load_state_dict.* is deprecated",
    "When using async grad allreduce it is recommended",
    ".*torch.distributed.* is deprecated",
)
"""Warnings of megatron-core that a user can do nothing about."""


def build_parser() -> argparse.ArgumentParser:
    """The command line of ``mmlm``."""
    parser = argparse.ArgumentParser(
        prog="mmlm",
        description="3D-parallel training of InternVL-Chat models on megatron-core.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = commands.add_parser(
        "train",
        help="train a model as a recipe says",
        epilog=TRAIN_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_recipe_arguments(train, required=True)
    evaluate = commands.add_parser(
        "evaluate", help="loss and exact match of a checkpoint on the sets of a meta json"
    )
    _add_recipe_arguments(evaluate, required=False)
    evaluate.add_argument("--load", required=True, help="checkpoint: a folder with 'latest'")
    evaluate.add_argument("--data", required=True, help="meta json of the split")
    evaluate.add_argument("--output", help="write the report as JSON to this file")
    return parser


def _add_recipe_arguments(parser: argparse.ArgumentParser, *, required: bool) -> None:
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: the command line without the program's name; ``sys.argv`` when None.

    Returns:
        0, or 1 after one printed line for an error that the user can mend.
    """
    options = build_parser().parse_args(arguments)
    setup_logging()
    for message in QUIET:
        warnings.filterwarnings("ignore", message=message)
    rank = int(os.environ.get("RANK", "0"))
    try:
        command = {"train": run_train, "evaluate": run_evaluate}[options.command]
        command(options)
    except MmlmError as error:
        if rank == 0 or not error.on_every_rank:
            get_logger().error(f"error: {error}")
        if "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized():
            sys.stderr.flush()
            os._exit(1)  # other ranks may wait in a collective: leave without waiting for them
        return 1
    return 0


def run_train(options: argparse.Namespace) -> None:
    """``mmlm train``."""
    config = apply_overrides(load_recipe(options.recipe), options.overrides)
    check_run(config)
    # imported here: --help and configuration errors need no megatron
    from mmlm.parallel import topology
    from mmlm.parallel.backend import resolve_backend
    from mmlm.train.trainer import train

    backend = resolve_backend(config.backend, config.train.dtype)
    place = topology.initialize(config.parallel)
    train(config, place, backend)
    topology.destroy()


def run_evaluate(options: argparse.Namespace) -> None:
    """``mmlm evaluate``."""
    if not Path(options.data).is_file():
        raise ConfigError(f"--data: the file '{options.data}' does not exist")
    if options.output:
        try:
            Path(options.output).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--output {options.output}: {error.strerror}") from error
    from mmlm.parallel import topology
    from mmlm.parallel.backend import resolve_backend
    from mmlm.train.evaluation_run import evaluate_checkpoint, settings_of

    config = load_recipe(options.recipe) if options.recipe else settings_of(Path(options.load))
    config = apply_overrides(config, options.overrides)
    config = replace(config, checkpoint=replace(config.checkpoint, load=options.load))
    backend = resolve_backend(config.backend, config.train.dtype)
    place = topology.initialize(config.parallel)
    report = evaluate_checkpoint(config, options.data, place, backend)
    if place.rank == 0:
        text = json.dumps(report, indent=2, ensure_ascii=False)
        print(text)
        if options.output:
            Path(options.output).write_text(text + "\n", encoding="utf-8")
    topology.destroy()
