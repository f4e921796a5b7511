"""``mmlm evaluate``."""

import argparse
import json
from pathlib import Path

from mmlm.commands.recipe_arguments import (
    Commands,
    add_recipe_arguments,
    add_weights_arguments,
    with_weights,
)
from mmlm.config.load import apply_overrides, load_recipe
from mmlm.errors import ConfigError


def add_evaluate_parser(commands: Commands) -> None:
    """Add ``evaluate`` to the commands of ``mmlm``."""
    evaluate = commands.add_parser(
        "evaluate",
        help="loss and exact match of weights on the sets of a meta json",
    )
    add_recipe_arguments(evaluate, required=False)
    add_weights_arguments(evaluate)
    evaluate.add_argument("--data", required=True, help="meta json of the split")
    evaluate.add_argument("--output", help="write the report as JSON to this file")
    evaluate.set_defaults(run=run_evaluate)


def run_evaluate(options: argparse.Namespace) -> int:
    """Judge a checkpoint; return the exit status."""
    if not Path(options.data).is_file():
        raise ConfigError(f"--data: the file '{options.data}' does not exist")
    if options.output:
        try:
            Path(options.output).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--output {options.output}: {error.strerror}") from error
    from mmlm.parallel import topology
    from mmlm.parallel.backend import resolve_backend
    from mmlm.train.evaluation_run import evaluate_checkpoint, hf_settings, settings_of

    if options.recipe:
        config = load_recipe(options.recipe)
    elif options.load_hf:
        config = hf_settings(Path(options.load_hf))
    else:
        config = settings_of(Path(options.load))
    config = with_weights(apply_overrides(config, options.overrides), options)
    backend = resolve_backend(config.backend, config.train.dtype)
    place = topology.initialize(config.parallel)
    report = evaluate_checkpoint(config, options.data, place, backend)
    if place.rank == 0:
        text = json.dumps(report, indent=2, ensure_ascii=False)
        print(text)
        if options.output:
            Path(options.output).write_text(text + "\n", encoding="utf-8")
    topology.destroy()
    return 0
