"""The command group ``mmlm debug``: look inside a training."""

import argparse
from pathlib import Path

from mmlm.commands.recipe_arguments import (
    Commands,
    add_recipe_arguments,
    add_weights_arguments,
    with_weights,
)
from mmlm.config.load import apply_overrides, load_recipe
from mmlm.errors import ConfigError

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


def add_debug_parser(commands: Commands) -> None:
    """Add ``debug`` and its topics to the commands of ``mmlm``."""
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
    add_weights_arguments(gradients)
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
    add_recipe_arguments(gradients, required=False)
    gradients.set_defaults(run=run_debug_gradients)


def run_debug_gradients(options: argparse.Namespace) -> int:
    """``mmlm debug gradients``; return the exit status."""
    if not Path(options.data).is_file():
        raise ConfigError(f"--data: the file '{options.data}' does not exist")
    if options.iteration < 0:
        raise ConfigError(f"--iteration {options.iteration}: must be at least 0")
    sample_ids = _sample_ids(options.ids)
    from mmlm.parallel import topology
    from mmlm.parallel.backend import resolve_backend
    from mmlm.train.debug_gradients import GradientRequest, debug_gradients
    from mmlm.train.evaluation_run import hf_settings, settings_of
    from mmlm.train.gradient_file import check_output, describe

    output = Path(options.output)
    check_output(output, overwrite=options.overwrite)
    if options.recipe:
        config = load_recipe(options.recipe)
    elif options.load_hf:
        config = hf_settings(Path(options.load_hf))
    else:
        config = settings_of(Path(options.load))
    config = with_weights(apply_overrides(config, options.overrides), options)
    request = GradientRequest(
        meta=options.data,
        output=output,
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
    return 0


def _sample_ids(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise ConfigError(
            f"--ids '{text}': must be numbers with commas between them, e.g. 3,17"
        ) from None
