"""The command ``mmlm``: train, evaluate, data, debug."""

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
from mmlm.data_cli import add_data_parser, run_data
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

GRADIENTS_EPILOG = """\
example (on the data and weights that examples/internvl_v1_2/pretrain.sh has made):
    torchrun --standalone --nproc-per-node 4 -m mmlm debug gradients \\
        --load work_dirs/demo_cache/converted \\
        --data work_dirs/demo_cache/internvl_1_2_finetune.json --ids 3,17,250 --activations \\
        --set parallel.tensor_model_parallel_size=2 \\
        --set parallel.pipeline_model_parallel_size=2 --output work_dirs/gradients.safetensors

what is in the file (fp32 where nothing is said):
  loss                     float64; weighted as train.loss_weight says
  sample_ids               int64 [n], in the order of the global batch
  sample_num_tokens        int64 [n], supervised tokens
  sample_losses            [n], mean cross entropy of each sample's supervised tokens
  gradient/<name>          of every parameter that is trained, by its name in the combined
                           InternVL-Chat folder; a frozen part (--set train.freeze_...) has none
  grad_norm                of all gradients together, before any clipping
and with --activations for each sample (the first three only where it has images):
  sample/<id>/pixel_values       [images, 3, S, S]
  sample/<id>/vision_output      [images, class token and patches, width], last layer of the ViT
  sample/<id>/image_embeddings   [images, embeddings of one, width], after the projection
  sample/<id>/input_ids          int64 [tokens]
  sample/<id>/label_positions    int64 [supervised], where in the sample logits are computed
  sample/<id>/labels             int64 [supervised], the token that is wanted there
  sample/<id>/logits             [supervised, vocabulary]
The metadata hold the settings that decide the numbers. Keys, order and metadata are the same in
every layout, and the numbers are but for rounding.
"""


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
    add_data_parser(commands)
    _add_debug(commands)
    return parser


def _add_debug(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    debug = commands.add_parser("debug", help="look inside a training: for comparing with others")
    topics = debug.add_subparsers(dest="topic", required=True, metavar="TOPIC")
    gradients = topics.add_parser(
        "gradients",
        help="losses and every gradient of one global batch, under HuggingFace names",
        description="Run the forward and backward pass of one global batch, in any layout, and "
        "write losses and gradients to a safetensors file. Nothing is updated.",
        epilog=GRADIENTS_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    weights = gradients.add_mutually_exclusive_group(required=True)
    weights.add_argument("--load", help="checkpoint: a folder with 'latest'")
    weights.add_argument(
        "--load-hf",
        metavar="DIR",
        help="HuggingFace weights, read directly: a combined InternVL-Chat folder, or a folder "
        "with the parts as vision/ and llm/ (sizes of the samples are kept in "
        "work_dirs/run/data_cache unless --set data.cache_dir=... says where)",
    )
    gradients.add_argument("--data", required=True, metavar="META", help="meta json of the sets")
    gradients.add_argument("--output", required=True, metavar="FILE", help="file to write")
    gradients.add_argument("--overwrite", action="store_true", help="replace FILE if it is there")
    batch = gradients.add_mutually_exclusive_group()
    batch.add_argument(
        "--iteration",
        type=int,
        default=0,
        metavar="K",
        help="which global batch of the data order, from 0 (default: 0); its size is "
        "--set train.global_batch_size=...",
    )
    batch.add_argument(
        "--ids",
        metavar="I,J,...",
        help="one global batch of exactly these samples: numbers from 0 through all sets in the "
        "order of the meta json",
    )
    gradients.add_argument(
        "--activations", action="store_true", help="write inputs and activations of each sample"
    )
    gradients.add_argument(
        "--drop-path",
        action="store_true",
        help="drop what the training would drop in this iteration (default: nothing is dropped)",
    )
    _add_recipe_arguments(gradients, required=False)


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
        0; 1 after one printed line for an error that the user can mend, or where a topic of
        ``mmlm data`` says so.
    """
    options = build_parser().parse_args(arguments)
    setup_logging()
    for message in QUIET:
        warnings.filterwarnings("ignore", message=message)
    rank = int(os.environ.get("RANK", "0"))
    try:
        commands = {
            "train": run_train,
            "evaluate": run_evaluate,
            "data": run_data,
            "debug": run_debug_gradients,
        }
        return commands[options.command](options) or 0
    except MmlmError as error:
        if rank == 0 or not error.on_every_rank:
            get_logger().error(f"error: {error}")
        if "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized():
            sys.stderr.flush()
            os._exit(1)  # other ranks may wait in a collective: leave without waiting for them
        return 1


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


def run_debug_gradients(options: argparse.Namespace) -> None:
    """``mmlm debug gradients``."""
    if not Path(options.data).is_file():
        raise ConfigError(f"--data: the file '{options.data}' does not exist")
    if options.iteration < 0:
        raise ConfigError(f"--iteration {options.iteration}: must be at least 0")
    sample_ids = _sample_ids(options.ids)
    from mmlm.parallel import topology
    from mmlm.parallel.backend import resolve_backend
    from mmlm.train.debug_gradients import GradientRequest, debug_gradients, hf_settings
    from mmlm.train.evaluation_run import settings_of
    from mmlm.train.gradient_file import check_output, describe

    output = Path(options.output)
    check_output(output, overwrite=options.overwrite)
    load_hf = Path(options.load_hf) if options.load_hf else None
    if options.recipe:
        config = load_recipe(options.recipe)
    else:
        config = hf_settings(load_hf) if load_hf else settings_of(Path(options.load))
    config = apply_overrides(config, options.overrides)
    config = replace(config, checkpoint=replace(config.checkpoint, load=options.load or ""))
    request = GradientRequest(
        meta=options.data,
        output=output,
        load_hf=load_hf,
        iteration=options.iteration,
        sample_ids=sample_ids,
        activations=options.activations,
        drop_path=options.drop_path,
    )
    backend = resolve_backend(config.backend, config.train.dtype)
    place = topology.initialize(config.parallel)
    debug_gradients(config, request, place, backend)
    if place.rank == 0:
        print(describe(output))
    topology.destroy()


def _sample_ids(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise ConfigError(
            f"--ids '{text}': must be numbers with commas between them, e.g. 3,17"
        ) from None
