"""Arguments that topics of ``mmlm data`` share: which tokenizer, which lengths, which sets.

What decides the tokens of a sample comes from a checkpoint, from HuggingFace weights or from a
tokenizer alone. Imports are made when they are needed, so that ``--help`` is quick.
"""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mmlm.errors import ConfigError

if TYPE_CHECKING:
    from mmlm.config.model import ModelConfig
    from mmlm.config.schema import RunConfig
    from mmlm.data.sample import SampleSettings
    from mmlm.data.tokenizer import Tokenizer


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
    parser.add_argument(
        "--special-literals",
        choices=("exclude", "tokens"),
        help="a text that spells a special token, such as <img>: its sample is left out, or it is "
        "that token, as published (default: the checkpoint's, otherwise exclude)",
    )


@dataclass(frozen=True, kw_only=True)
class Source:
    """What ``--tokenizer``, ``--load`` or ``--load-hf`` leads to."""

    tokenizer_folder: Path
    """Folder with ``tokenizer.model``."""
    model: "ModelConfig | None"
    """Sizes of the model, where there is one."""
    run: "RunConfig | None"
    """Settings of the run that made the checkpoint, where one did."""


def read_source(options: argparse.Namespace) -> Source:
    """Follow the one of the three arguments that was given; no weights are looked at.

    Raises:
        MmlmError: a folder is missing or cannot be used.
    """
    if options.load:
        from mmlm.checkpoint.manifest import ASSETS_DIR, Manifest, resolve
        from mmlm.config.load import from_json
        from mmlm.config.schema import RunConfig

        checkpoint = resolve(Path(options.load))
        manifest = Manifest.read(checkpoint)
        run = manifest.run_config
        return Source(
            tokenizer_folder=checkpoint / ASSETS_DIR,
            model=manifest.model,
            run=None if run is None else from_json(RunConfig, run),
        )
    if options.load_hf:
        model, folder = _hf_model(Path(options.load_hf))
        return Source(tokenizer_folder=folder, model=model, run=None)
    return Source(tokenizer_folder=Path(options.tokenizer), model=None, run=None)


def read_sample_arguments(
    options: argparse.Namespace, source: Source | None = None
) -> "tuple[Tokenizer, SampleSettings]":
    """Open the tokenizer and find the sizes that `add_sample_arguments` asked for.

    Args:
        options: the command line.
        source: what `read_source` found, where the caller has it at hand.

    Raises:
        MmlmError: a folder is missing or cannot be used, or a size breaks a rule.
    """
    from mmlm.config.presets import internvit_6b_448px
    from mmlm.config.schema import DataConfig
    from mmlm.data.sample import SampleSettings
    from mmlm.data.tokenizer import Tokenizer

    source = source or read_source(options)
    vision = source.model.vision if source.model else internvit_6b_448px()
    data = source.run.data if source.run else DataConfig()
    seq_length = data.seq_length if options.seq_length is None else options.seq_length
    if seq_length < 8:
        raise ConfigError(f"--seq-length {seq_length}: must be at least 8")
    if options.image_size is not None:
        vision = replace(vision, image_size=options.image_size)
    settings = SampleSettings(
        seq_length=seq_length,
        image_size=vision.image_size,
        embeddings_per_image=vision.embeddings_per_image,
        special_literals=options.special_literals or data.special_literals,
    )
    return Tokenizer(source.tokenizer_folder), settings


def _hf_model(folder: Path) -> "tuple[ModelConfig, Path]":
    """The model's sizes and the folder of the tokenizer."""
    from mmlm.conversion.hf_config import read_combined, read_parts

    vision, llm = folder / "vision", folder / "llm"
    if (folder / "config.json").is_file():
        return read_combined(folder).model, folder
    if vision.is_dir() and llm.is_dir():
        return read_parts(vision, llm).model, llm
    found = "has neither config.json nor vision/ and llm/" if folder.is_dir() else "does not exist"
    raise ConfigError(
        f"--load-hf {folder}: {found}; give a combined InternVL-Chat folder, or one that holds "
        "the ViT as vision/ and the LLM as llm/"
    )


def check_meta(meta: str) -> None:
    """Refuse a meta json that does not exist, before anything heavy is imported."""
    if not Path(meta).is_file():
        raise ConfigError(f"META: the file '{meta}' does not exist")


def check_at_least(options: argparse.Namespace, least: int, *names: str) -> None:
    """Refuse numbers that are too small; those that were not given are left alone.

    Raises:
        ConfigError: naming the argument.
    """
    for name in names:
        value = getattr(options, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be at least {least}")


def run_seed(options: argparse.Namespace, source: Source) -> int:
    """Return ``--seed``, or that of the run that made the checkpoint, or the published one."""
    from mmlm.config.schema import TrainConfig

    if options.seed is not None:
        return int(options.seed)
    return (source.run.train if source.run else TrainConfig()).seed
