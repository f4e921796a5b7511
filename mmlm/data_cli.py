"""The command group ``mmlm data``: look at a data set before a training does.

Each topic has a function that adds its parser and one that runs it; the latter returns the exit
status. What they call is imported when it is needed, so that ``--help`` is quick.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from mmlm.errors import ConfigError
from mmlm.preparation.command import add_parser as add_prepare_parser

if TYPE_CHECKING:
    from mmlm.config.model import VisionConfig
    from mmlm.data.sample import SampleSettings
    from mmlm.data.tokenizer import Tokenizer

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_data_parser(commands: Commands) -> None:
    """Add ``data`` and its topics to the commands of ``mmlm``."""
    data = commands.add_parser("data", help="prepare, check and look at training data")
    topics = data.add_subparsers(dest="topic", required=True, metavar="TOPIC")
    add_prepare_parser(topics)
    _add_check(topics)


def run_data(options: argparse.Namespace) -> int:
    """``mmlm data``: run the topic that was asked for.

    Returns:
        The exit status.
    """
    status: int = options.run(options)
    return status


def add_sample_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what decides the tokens of a sample: tokenizer, length and image size."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--tokenizer", metavar="DIR", help="folder with tokenizer.model")
    source.add_argument(
        "--load", metavar="CKPT", help="checkpoint: its tokenizer, its image size, its seq_length"
    )
    source.add_argument(
        "--load-hf",
        metavar="DIR",
        help="HuggingFace weights: a combined InternVL-Chat folder, or a folder with the parts as "
        "vision/ and llm/",
    )
    parser.add_argument(
        "--seq-length",
        type=int,
        metavar="N",
        help="tokens at which a sample is cut (default: the checkpoint's, otherwise 2048)",
    )
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="S",
        help="pixels along a side; a picture takes (S // 14)^2 / 4 tokens (default: the model's, "
        "otherwise 448, which is 256 tokens)",
    )


def read_sample_arguments(
    options: argparse.Namespace,
) -> "tuple[Tokenizer, SampleSettings]":
    """Open the tokenizer and find the sizes that `add_sample_arguments` asked for.

    Raises:
        MmlmError: a folder is missing or cannot be used, or a size breaks a rule.
    """
    from mmlm.config.presets import internvit_6b_448px
    from mmlm.data.sample import SampleSettings
    from mmlm.data.tokenizer import Tokenizer

    vision, seq_length = internvit_6b_448px(), 2048
    if options.load:
        from mmlm.checkpoint.manifest import ASSETS_DIR, Manifest, resolve

        checkpoint = resolve(Path(options.load))
        manifest = Manifest.read(checkpoint)
        vision, folder = manifest.model.vision, checkpoint / ASSETS_DIR
        if manifest.run_config is not None:
            seq_length = manifest.run_config["data"]["seq_length"]
    elif options.load_hf:
        vision, folder = _hf_model(Path(options.load_hf))
    else:
        folder = Path(options.tokenizer)
    seq_length = seq_length if options.seq_length is None else options.seq_length
    if seq_length < 8:
        raise ConfigError(f"--seq-length {seq_length}: must be at least 8")
    if options.image_size is not None:
        vision = replace(vision, image_size=options.image_size)
    settings = SampleSettings(
        seq_length=seq_length,
        image_size=vision.image_size,
        embeddings_per_image=vision.embeddings_per_image,
    )
    return Tokenizer(folder), settings


def _hf_model(folder: Path) -> "tuple[VisionConfig, Path]":
    """The tower's sizes and the folder of the tokenizer; no weights are looked at."""
    from mmlm.conversion.hf_config import read_combined, read_parts

    vision, llm = folder / "vision", folder / "llm"
    if (folder / "config.json").is_file():
        return read_combined(folder).model.vision, folder
    if vision.is_dir() and llm.is_dir():
        return read_parts(vision, llm).model.vision, llm
    found = "has neither config.json nor vision/ and llm/" if folder.is_dir() else "does not exist"
    raise ConfigError(
        f"--load-hf {folder}: {found}; give a combined InternVL-Chat folder, or one that holds "
        "the ViT as vision/ and the LLM as llm/"
    )


def check_meta(meta: str) -> None:
    """Refuse a meta json that does not exist, before anything heavy is imported."""
    if not Path(meta).is_file():
        raise ConfigError(f"META: the file '{meta}' does not exist")


def _add_check(topics: Commands) -> None:
    check = topics.add_parser("check", help="judge every line and every picture of the sets")
    check.add_argument("meta", metavar="META", help="meta json of the sets")
    add_sample_arguments(check)
    check.set_defaults(run=run_check)


def run_check(options: argparse.Namespace) -> int:
    """``mmlm data check``."""
    check_meta(options.meta)
    read_sample_arguments(options)
    return 0
