"""``mmlm data show``: one sample as the model sees it, and a packed row as a picture."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mmlm.commands.data_arguments import (
    Source,
    add_sample_arguments,
    check_at_least,
    check_meta,
    read_sample_arguments,
    read_source,
    run_seed,
)
from mmlm.commands.recipe_arguments import Commands
from mmlm.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

    from mmlm.data.lookup import Lookup
    from mmlm.data.planners import TrainPlanner
    from mmlm.data.sample import SampleSettings
    from mmlm.data.tokenizer import Tokenizer


DESCRIPTION = """\
Print one sample as the model sees it: its text in the template, what of it is trained
on, its pictures, its lengths, and why it is left out if it is. With --png, draw the
packed row that has it; with --iteration, a row of that iteration.
"""

EPILOG = """\
examples (on the data and weights that examples/internvl_v1_2/pretrain.sh has made):
    mmlm data show work_dirs/demo_cache/internvl_1_2_finetune.json --index 3 \\
        --load work_dirs/demo_cache/converted
  one token a line, and the row of the first epoch that has the sample as a picture:
    mmlm data show work_dirs/demo_cache/internvl_1_2_finetune.json --index 3 --tokens \\
        --load work_dirs/demo_cache/converted --global-batch-size 16 --png work_dirs/row.png
  the second row of iteration 5, had the samples been packed into 256 tokens:
    mmlm data show work_dirs/demo_cache/internvl_1_2_finetune.json --iteration 5 --row 1 \\
        --load work_dirs/demo_cache/converted --global-batch-size 16 --seq-length 256 \\
        --png work_dirs/row.png

Samples are numbered from 0 through all sets in the order of the meta json, as everywhere
in mmlm. Rows depend on the batch and on the layout: seed, batch sizes and packing are
those of the run that made the checkpoint, or as given; without either, the published ones.
They need the length index, which is built once (--cache-dir) and measures all the data.
"""


def add_show_parser(topics: Commands) -> None:
    """Add ``show`` to the topics of ``mmlm data``."""
    show = topics.add_parser(
        "show",
        help="print one sample as the model sees it, draw a packed row",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    show.add_argument("meta", metavar="META", help="meta json of the sets")
    what = show.add_mutually_exclusive_group(required=True)
    what.add_argument("--index", type=int, metavar="I", help="number of a sample, from 0")
    what.add_argument("--iteration", type=int, metavar="K", help="a row of this iteration, from 0")
    show.add_argument(
        "--row", type=int, default=0, metavar="R", help="which row of --iteration (default: 0)"
    )
    add_sample_arguments(show)
    show.add_argument("--png", metavar="FILE", help="draw the packed row into this file")
    show.add_argument("--tokens", action="store_true", help="one token a line, with id and label")
    show.add_argument(
        "--color",
        nargs="?",
        const="always",
        default="auto",
        choices=("auto", "always", "never"),
        help="colours (default: auto, on a terminal)",
    )
    _add_order_arguments(show)
    show.set_defaults(run=run_show)


def _add_order_arguments(parser: argparse.ArgumentParser) -> None:
    order = parser.add_argument_group("order and packing")
    order.add_argument("--seed", type=int, metavar="N", help="seed of the run")
    order.add_argument(
        "--epoch", type=int, default=0, metavar="N", help="in which epoch to look for --index"
    )
    order.add_argument("--global-batch-size", type=int, metavar="N", help="samples of an iteration")
    order.add_argument("--micro-batch-size", type=int, metavar="N", help="rows of a microbatch")
    order.add_argument(
        "--data-parallel-size",
        type=int,
        default=1,
        metavar="N",
        help="DP of the run that is asked about (default: 1)",
    )
    order.add_argument(
        "--cache-dir",
        metavar="DIR",
        help="folder of the length indexes: data.cache_dir of a training (default: that of "
        "mmlm data check)",
    )


def run_show(options: argparse.Namespace) -> int:
    """``mmlm data show``."""
    check_meta(options.meta)
    check_at_least(options, 0, "index", "iteration", "row", "epoch", "seed")
    check_at_least(options, 1, "global_batch_size", "micro_batch_size", "data_parallel_size")
    from mmlm.data.lookup import Lookup
    from mmlm.data.show import format_sample

    source = read_source(options)
    tokenizer, settings = read_sample_arguments(options, source)
    lookup = Lookup(options.meta)
    seed = run_seed(options, source)
    if options.index is not None:
        look = lookup.look(
            options.index,
            tokenizer,
            settings,
            seed=seed,
            epoch=options.epoch,
        )
        color = sys.stdout.isatty() if options.color == "auto" else options.color == "always"
        text = format_sample(
            look,
            tokenizer,
            settings,
            num_samples=lookup.num_samples,
            color=color,
            list_tokens=options.tokens,
        )
        print(text)
        if not options.png:
            return 0
        if look.rejection is not None:
            raise ConfigError(f"--png: sample {options.index} is left out, so no row has it")
    _show_row(options, source, lookup, tokenizer, settings)
    return 0


def _show_row(
    options: argparse.Namespace,
    source: Source,
    lookup: "Lookup",
    tokenizer: "Tokenizer",
    settings: "SampleSettings",
) -> None:
    from mmlm.data.show import format_row
    from mmlm.data.strip import Segment, draw_row

    planner = _planner(options, source, tokenizer, settings)
    iteration = options.iteration
    if iteration is None:
        iteration = _iteration_of(planner, options.index, options.epoch)
    plan = planner.plan(iteration)
    rows = [
        (f"rank {rank}, microbatch {number}", row)
        for rank, microbatches in enumerate(plan.microbatches)
        for number, microbatch in enumerate(microbatches)
        for row in microbatch
    ]
    place = options.row
    if options.index is not None:
        place = next(number for number, (_, ids) in enumerate(rows) if options.index in ids)
    if place >= len(rows):
        raise ConfigError(f"--row {place}: iteration {iteration} has {len(rows)} rows, from 0")
    where, sample_ids = rows[place]
    segments = []
    for sample_id in sample_ids:
        look = lookup.look(sample_id, tokenizer, settings, seed=planner.seed, epoch=plan.epoch)
        if look.rejection is not None or look.tokens is None or look.images is None:
            raise ConfigError(
                f"sample {sample_id} ({look.place}) was usable when it was measured, and is not "
                f"any more: {look.rejection}"
            )
        segments.append(
            Segment(
                sample_id=sample_id,
                tokens=look.tokens,
                images=look.images,
                weight=plan.token_weights[sample_id],
            )
        )
    title = f"iteration {iteration}, row {place} of {len(rows)} (DP {where}, epoch {plan.epoch})"
    print(
        ("\n" if options.index is not None else "") + format_row(title, segments, plan.seq_length)
    )
    if options.png:
        used = sum(len(segment.tokens.input_ids) for segment in segments)
        title += f": {len(segments)} samples, {used} of {plan.seq_length} tokens"
        _save(draw_row(title, segments, plan.seq_length), Path(options.png))


def _planner(
    options: argparse.Namespace, source: Source, tokenizer: "Tokenizer", settings: "SampleSettings"
) -> "TrainPlanner":
    """The order and the packing of the run that is asked about; measures what is not measured."""
    from mmlm.config.schema import RunConfig
    from mmlm.data.dataset import cache_folder, open_dataset
    from mmlm.data.packing import PackingCost, packing_cost
    from mmlm.data.planners import TrainPlanner

    run = source.run or RunConfig()
    cache = (
        options.cache_dir or Path("work_dirs") / "data_check" / Path(options.meta).stem / "cache"
    )
    dataset = open_dataset(
        options.meta,
        tokenizer,
        settings,
        cache_dir=cache_folder(cache, options.meta),
        policy="skip",
        num_workers=len(os.sched_getaffinity(0)),
    )
    return TrainPlanner(
        table=dataset.table,
        seed=run_seed(options, source),
        global_batch_size=options.global_batch_size or run.train.global_batch_size,
        seq_length=settings.seq_length,
        micro_batch_size=options.micro_batch_size or run.train.micro_batch_size,
        data_parallel_size=options.data_parallel_size,
        loss_weight=run.train.loss_weight,
        loss_group_size=run.train.loss_group_size,
        microbatch_multiple=run.parallel.microbatch_multiple,
        cost=packing_cost(source.model) if source.model else PackingCost(),
        packing=run.data.packing,
    )


def _iteration_of(planner: "TrainPlanner", sample_id: int, epoch: int) -> int:
    """The first iteration of an epoch that has the sample: every usable sample is in one."""
    first = epoch * planner.iterations_per_epoch
    return next(
        iteration
        for iteration in range(first, first + planner.iterations_per_epoch)
        if sample_id in planner.sample_ids(iteration)
    )


def _save(image: "Image", path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, format="PNG")
    except OSError as error:
        raise ConfigError(f"--png {path}: cannot be written ({error.strerror or error})") from error
    print(f"written {path} ({image.width} x {image.height} pixels)")
