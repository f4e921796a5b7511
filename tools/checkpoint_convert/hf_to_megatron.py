#!/usr/bin/env python3
"""Convert HuggingFace weights into a checkpoint of mmlm that any TP/PP/DP layout reads."""

import argparse
import sys
import time
from pathlib import Path

from mmlm.conversion.convert import hf_to_megatron
from mmlm.conversion.dtypes import DTYPES
from mmlm.conversion.hf_source import PROJECTOR_FILE
from mmlm.conversion.hf_weights import VOCABULARY_SEED
from mmlm.errors import MmlmError
from mmlm.log import setup_logging

EXAMPLES = """\
examples:
  hf_to_megatron.py --vision pretrained/InternViT-6B-448px-V1-2 \\
      --llm pretrained/Nous-Hermes-2-Yi-34B --output checkpoints/internvl_v1_2
  hf_to_megatron.py --internvl pretrained/InternVL-Chat-V1-2 --output checkpoints/internvl_v1_2
  hf_to_megatron.py --vision pretrained/InternViT-6B-448px-V1-0 --vision-num-layers 45 \\
      --output checkpoints/vit          (one part alone: the checkpoint holds that part alone)

A conversion that was killed goes on when the same command is given again.
"""


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--vision", type=Path, metavar="DIR", help="folder of InternViT: config.json and weights")
    add("--llm", type=Path, metavar="DIR", help="folder of the LLM: config, weights, tokenizer")
    add(
        "--projector",
        type=Path,
        metavar="FILE",
        help=f"projector weights (default: {PROJECTOR_FILE} in the ViT's folder)",
    )
    add(
        "--internvl",
        type=Path,
        metavar="DIR",
        help="a combined InternVL-Chat folder, instead of the three parts",
    )
    add(
        "--output",
        type=Path,
        metavar="ROOT",
        required=True,
        help="folder that gets iter_0000000 and `latest`",
    )
    add("--dtype", choices=tuple(DTYPES), help="element type (default: as in the files)")
    add(
        "--ps-version",
        choices=("v1", "v2"),
        default="v1",
        help="pixel shuffle variant of the projector; V1-2 is v1 (default: %(default)s)",
    )
    add(
        "--seed",
        type=int,
        default=VOCABULARY_SEED,
        help="of new embedding rows, when the vocabulary lacks the nine image and box tokens "
        "(default: %(default)s)",
    )
    add(
        "--image-size",
        type=int,
        metavar="PIXELS",
        help="of the pictures; position embeddings of another grid are resized, bicubic, as "
        "published (default: as config.json says)",
    )
    add(
        "--vision-num-layers",
        type=int,
        metavar="N",
        help="keep the first N layers of the ViT; InternViT-6B-448px-V1-2 is the first 45 of the "
        "48 layers of V1-0 (default: all)",
    )
    add("--strict", action="store_true", help="refuse NaN and infinity (otherwise a warning)")
    add("--overwrite", action="store_true", help="replace an iter_0000000 that is there")
    return parser.parse_args()


def main() -> int:
    """Convert; errors that a user can mend become one line."""
    args = parse_args()
    setup_logging()
    start = time.monotonic()
    try:
        directory = hf_to_megatron(
            output=args.output,
            vision=args.vision,
            llm=args.llm,
            projector=args.projector,
            combined=args.internvl,
            dtype=args.dtype,
            ps_version=args.ps_version,
            seed=args.seed,
            image_size=args.image_size,
            vision_num_layers=args.vision_num_layers,
            strict=args.strict,
            overwrite=args.overwrite,
            progress=True,
        )
    except MmlmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {directory} in {time.monotonic() - start:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
