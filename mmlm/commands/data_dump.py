"""``mmlm data dump``: samples in an ``.npz`` file, exactly as they reach the model."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mmlm.commands.data_arguments import (
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
    from mmlm.data.lookup import Look

_NUM_LISTED = 10


DESCRIPTION = """\
Write samples to an .npz file, exactly as they reach the model. A sample that cannot be
used is in the file, too, with the reason.
"""

EPILOG = """\
example (on the data and weights that examples/internvl_v1_2/pretrain.sh has made):
    mmlm data dump work_dirs/demo_cache/internvl_1_2_finetune.json --ids 0-9,250 \\
        --load work_dirs/demo_cache/converted --output work_dirs/samples.npz

what is in the file (numpy.load reads it; I is the number of a sample, from 0 through all sets):
  sample_ids           int64 [samples], those that were asked for
  I/reason             text: empty, or why the sample is left out; then only the next three
                       are there
  I/set, I/place, I/id text: its set, file:line, and its own id
  I/input_ids          int64 [n]
  I/labels             int64 [n]: the token that is wanted at each place, which is the next one, or
                       -100. Shifted already: HuggingFace's labels are [-100, *labels[:-1]]
  I/image_positions    int64 [k * embeddings_per_image]: where the image embeddings go
  I/image_ids          int64 [k]: I * 64 + which picture
  I/pixel_values       float32 [k, 3, S, S]
  metadata/...         seq_length, image_size, embeddings_per_image, seed, epoch, tokenizer (hash)
Positions count from 0 in each sample, and attention stays inside it.
"""


def add_dump_parser(topics: Commands) -> None:
    """Add ``dump`` to the topics of ``mmlm data``."""
    dump = topics.add_parser(
        "dump",
        help="write samples to an .npz file, to compare implementations",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    dump.add_argument("meta", metavar="META", help="meta json of the sets")
    dump.add_argument("--output", required=True, metavar="FILE.npz", help="file to write")
    dump.add_argument("--overwrite", action="store_true", help="replace the file if it is there")
    add_sample_arguments(dump)
    dump.add_argument(
        "--ids", metavar="I,J-K,...", help="numbers of samples, from 0 (default: all)"
    )
    dump.add_argument("--limit", type=int, metavar="N", help="only the first N of them")
    dump.add_argument("--no-pixels", action="store_true", help="leave pixel_values out")
    dump.add_argument(
        "--seed", type=int, metavar="N", help="seed of data_augment (default: the run's, or 42)"
    )
    dump.add_argument(
        "--epoch", type=int, default=0, metavar="N", help="epoch of data_augment (default: 0)"
    )
    dump.set_defaults(run=run_dump)


def run_dump(options: argparse.Namespace) -> int:
    """``mmlm data dump``."""
    check_meta(options.meta)
    check_at_least(options, 0, "epoch", "seed")
    check_at_least(options, 1, "limit")
    wanted = parse_ids(options.ids)
    from tqdm import tqdm

    from mmlm.data.dump import check_output, dump
    from mmlm.data.lookup import Lookup

    source = read_source(options)
    tokenizer, settings = read_sample_arguments(options, source)
    lookup = Lookup(options.meta)
    sample_ids = list(range(lookup.num_samples) if wanted is None else wanted)[: options.limit]
    for sample_id in sample_ids:
        lookup.place(sample_id)  # an unknown one is refused before anything is written
    output, seed = Path(options.output), run_seed(options, source)
    picture = 0 if options.no_pixels else 4 * 3 * settings.image_size**2
    needed = sum(lookup.num_images(sample_id) * picture for sample_id in sample_ids)
    check_output(output, overwrite=options.overwrite, num_bytes=needed)
    bar = tqdm(total=len(sample_ids), desc="dump", unit="sample", disable=None)

    def look(sample_id: int) -> "Look":
        bar.update()
        return lookup.look(
            sample_id,
            tokenizer,
            settings,
            seed=seed,
            epoch=options.epoch,
            with_pixels=not options.no_pixels,
        )

    report = dump(
        output,
        sample_ids,
        look,
        image_size=settings.image_size,
        metadata={
            "seq_length": settings.seq_length,
            "image_size": settings.image_size,
            "embeddings_per_image": settings.embeddings_per_image,
            "special_literals": settings.special_literals,
            "tokenizer": tokenizer.fingerprint,
            "seed": seed,
            "epoch": options.epoch,
        },
        with_pixels=not options.no_pixels,
    )
    bar.close()
    num_valid = report.num_samples - len(report.invalid)
    print(f"{output}: {num_valid} samples, {report.num_bytes / 1e6:,.1f} MB")
    for sample_id, reason in report.invalid[:_NUM_LISTED]:
        print(f"  sample {sample_id} cannot be used: {reason}")
    if len(report.invalid) > _NUM_LISTED:
        print(f"  ... and {len(report.invalid) - _NUM_LISTED} more that cannot be used")
    return 0


def parse_ids(text: str | None) -> list[int] | None:
    """Return the numbers of ``3,17,20-29``; None for None.

    Raises:
        ConfigError: it is something else, or names a sample twice.
    """
    if text is None:
        return None
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ConfigError(
                f"--ids '{text}': must be numbers and ranges with commas between them, e.g. "
                "3,17,20-29"
            )
        numbers += range(int(first), int(last or first) + 1)
    if len(set(numbers)) < len(numbers) or not numbers:
        raise ConfigError(f"--ids '{text}': names no sample, or one of them twice")
    return numbers
