#!/usr/bin/env python3
"""Compare weights with weights to the bit: HuggingFace folders and checkpoints of any layout."""

import argparse
import sys
import time
from pathlib import Path

from tqdm import tqdm

from mmlm.conversion.comparable import open_hf, open_megatron
from mmlm.conversion.hf_weights import VOCABULARY_SEED
from mmlm.conversion.verify import compare
from mmlm.errors import MmlmError
from mmlm.log import setup_logging

EXAMPLES = """\
examples (two sources in any combination):
  verify.py --hf pretrained/InternVL-Chat-V1-2 --megatron checkpoints/internvl_v1_2
  verify.py --hf pretrained/InternVL-Chat-V1-2 --hf exported
  verify.py --megatron work_dirs/a/checkpoints/iter_0000200 --megatron work_dirs/b/checkpoints

exit status: 0 the same, 1 not the same, 2 something cannot be read.
"""


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for option, text in (
        ("--hf", "a combined folder, a folder with vision/ and llm/, or one part or file"),
        ("--megatron", "a checkpoint: folder with `latest`, or one of its iter_* folders"),
    ):
        parser.add_argument(
            option,
            dest="sources",
            action="append",
            type=lambda path, kind=option: (kind, Path(path)),  # type: ignore[misc]
            metavar="PATH",
            help=text,
        )
    parser.add_argument(
        "--seed",
        type=int,
        default=VOCABULARY_SEED,
        help="that new embedding rows were made with, where one side lacks the nine tokens "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--max-differences",
        type=int,
        default=20,
        metavar="N",
        help="lines of differences that are printed (default: %(default)s)",
    )
    args = parser.parse_args()
    if len(args.sources or ()) != 2:
        parser.error("give two sources: --hf or --megatron, each as often as needed")
    return args


def main() -> int:
    """Compare and report; errors that a user can mend become one line."""
    args = parse_args()
    setup_logging()
    start = time.monotonic()
    try:
        first, second = (
            (open_hf if kind == "--hf" else open_megatron)(path) for kind, path in args.sources
        )
        with tqdm(total=first.num_bytes, desc="comparing", unit="B", unit_scale=True) as bar:
            found = compare(first, second, seed=args.seed, on_bytes=bar.update)
    except MmlmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for note in found.notes:
        print(f"note: {note}")
    for line in found.differences[: args.max_differences]:
        print(f"differs: {line}")
    if len(found.differences) > args.max_differences:
        print(f"... and {len(found.differences) - args.max_differences} more")
    print(f"checksum of {first.where}: sha256 {found.checksum}")
    verdict = "not the same" if found.differences else "the same"
    print(
        f"{verdict}: {found.num_equal} of {len(first.shapes)} tensors are equal to the bit, "
        f"{first.num_bytes / 1e9:.2f} GB, {time.monotonic() - start:.1f} s"
    )
    return 1 if found.differences else 0


if __name__ == "__main__":
    sys.exit(main())
