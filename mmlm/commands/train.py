"""``mmlm train``."""

import argparse
from dataclasses import replace

from mmlm.commands.recipe_arguments import Commands, add_recipe_arguments
from mmlm.config.checks import check_run
from mmlm.config.load import apply_overrides, load_recipe
from mmlm.train.stop import Stopper

EPILOG = """\
examples (on the data and weights that examples/internvl_v1_2/pretrain.sh has made):
  one process (CPU or GPU):
    mmlm train --recipe examples/internvl_v1_2/recipe.py:tiny --set output_dir=work_dirs/one
  four processes, TP 2 x PP 2:
    torchrun --standalone --nproc-per-node 4 -m mmlm train \\
        --recipe examples/internvl_v1_2/recipe.py:tiny \\
        --set parallel.tensor_model_parallel_size=2 \\
        --set parallel.pipeline_model_parallel_size=2

A run that finds a checkpoint in output_dir/checkpoints continues it, in any layout. SIGTERM and
SIGUSR1 save it and end it with status 0 and output_dir/stopped.json; the same command continues.
docs/running.md says more.
"""


def add_train_parser(commands: Commands) -> None:
    """Add ``train`` to the commands of ``mmlm``."""
    train = commands.add_parser(
        "train",
        help="train a model as a recipe says",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_recipe_arguments(train, required=True)
    train.add_argument(
        "--load-hf",
        metavar="DIR",
        help="start from HuggingFace weights as they are: a combined InternVL-Chat folder, or a "
        "folder with the parts as vision/ and llm/; takes the place of checkpoint.load, and a run "
        "that resumes ignores it",
    )
    train.add_argument(
        "--export-hf-every",
        type=int,
        metavar="N",
        help="write a combined HuggingFace folder to output_dir/hf/iter_XXXXXXX every N "
        "iterations and after the last; as many stay as checkpoint.save_total_limit says",
    )
    train.add_argument(
        "--no-resume",
        action="store_true",
        help="refuse to start where output_dir has a checkpoint (checkpoint.resume=false)",
    )
    train.add_argument(
        "--deterministic",
        action="store_true",
        help="only algorithms that add in a fixed order (train.deterministic=true)",
    )
    train.set_defaults(run=run_train)


def run_train(options: argparse.Namespace) -> int:
    """Train; return the exit status."""
    config = apply_overrides(load_recipe(options.recipe), options.overrides)
    checkpoint = config.checkpoint
    if options.load_hf:
        checkpoint = replace(checkpoint, load="", load_hf=options.load_hf)
    if options.export_hf_every is not None:
        checkpoint = replace(checkpoint, export_hf_interval=options.export_hf_every)
    if options.no_resume:
        checkpoint = replace(checkpoint, resume=False)
    config = replace(config, checkpoint=checkpoint)
    if options.deterministic:
        config = replace(config, train=replace(config.train, deterministic=True))
    check_run(config)
    # imported inside: --help and configuration errors need no megatron, signals are heard before
    with Stopper(config.train.exit_duration_minutes) as stopper:
        from mmlm.parallel import topology
        from mmlm.parallel.backend import resolve_backend
        from mmlm.train.trainer import train

        backend = resolve_backend(config.backend, config.train.dtype)
        place = topology.initialize(config.parallel)
        train(config, place, backend, stopper)
        topology.destroy()
    return 0
