#!/usr/bin/env python3
"""Convert a checkpoint of mmlm, saved at any layout, into HuggingFace folders."""

import argparse
import sys
import time
from pathlib import Path

from mmlm.conversion.convert import megatron_to_hf
from mmlm.conversion.dtypes import DTYPES
from mmlm.conversion.hf_source import PROJECTOR_FILE
from mmlm.conversion.name_map import HF_PREFIXES
from mmlm.errors import MmlmError
from mmlm.log import setup_logging

EXAMPLES = f"""\
what is written:
  OUTPUT/                   config.json, model-*.safetensors with index, tokenizer files
  OUTPUT/vision, .../llm    with --parts: the ViT (its {PROJECTOR_FILE}
                            inside) and the LLM
  OUTPUT/                   with --only, and of a checkpoint of one part: that part

A conversion that was killed goes on when the same command is given again.

example:
  megatron_to_hf.py --load work_dirs/run/checkpoints --output InternVL-Chat-mine --dtype bf16
"""


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--load",
        type=Path,
        metavar="ROOT",
        required=True,
        help="folder with `latest` (the newest is taken), or one of its iter_* folders",
    )
    add("--output", type=Path, metavar="DIR", required=True, help="folder to make")
    add("--parts", action="store_true", help="also write the three parts")
    add("--no-combined", action="store_true", help="leave out the combined InternVL-Chat folder")
    add(
        "--only",
        choices=tuple(HF_PREFIXES),
        metavar="PART",
        help=f"write one part and nothing else: {', '.join(HF_PREFIXES)}",
    )
    add("--dtype", choices=tuple(DTYPES), help="element type (default: as in the checkpoint)")
    add(
        "--max-shard-size-gb",
        type=float,
        default=5.0,
        metavar="GB",
        help="largest safetensors file, in 10^9 bytes (default: %(default)s)",
    )
    add("--strict", action="store_true", help="refuse NaN and infinity (otherwise a warning)")
    add("--overwrite", action="store_true", help="replace OUTPUT if it is there")
    args = parser.parse_args()
    if args.max_shard_size_gb <= 0:
        parser.error("--max-shard-size-gb must be above 0")
    if args.only and (args.parts or args.no_combined):
        parser.error("--only writes one part: leave out --parts and --no-combined")
    if args.no_combined and not args.parts:
        parser.error("--no-combined without --parts leaves nothing to write")
    return args


def main() -> int:
    """Convert; errors that a user can mend become one line."""
    args = parse_args()
    setup_logging()
    start = time.monotonic()
    try:
        folder = megatron_to_hf(
            load=args.load,
            output=args.output,
            dtype=args.dtype,
            combined=not args.no_combined,
            parts=args.parts,
            only=args.only,
            strict=args.strict,
            max_shard_size_bytes=int(args.max_shard_size_gb * 1e9),
            overwrite=args.overwrite,
            progress=True,
        )
    except MmlmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {folder} in {time.monotonic() - start:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
