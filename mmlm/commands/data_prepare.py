"""``mmlm data prepare``: from nothing to a meta json, stage by stage."""

import argparse
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from mmlm.commands.recipe_arguments import Commands
from mmlm.errors import ConfigError

if TYPE_CHECKING:
    from mmlm.preparation.layout import Playground
    from mmlm.preparation.sources import PublishedSet

Stage: TypeAlias = "Callable[[Playground, argparse.Namespace], int]"

DESCRIPTION = """\
Lay out the nine published sets below one folder, so that the recipe finds them:
annotations in ROOT/opensource, pictures in ROOT/data, a meta json in ROOT. Every
stage can be run again: it skips what is complete and continues what was stopped.
"""

EPILOG = """\
examples:
  all that is needed from the one dataset repository, then a table of what is there:
    mmlm data prepare all --source repository --root playground
  the commands alone, for a machine with a network:
    mmlm data prepare download --source individual --root playground --print-commands
  what is missing:
    mmlm data prepare status --root playground
  boxes as V1-2-Plus has them, in copies of the annotations:
    mmlm data prepare meta --boxes plus --root playground

The guide with sizes, sources and the resulting tree is docs/data.md.
"""

STAGES = {
    "all": "download, unpack, sam, synthdog, ocr-vqa, meta and status, one after the other",
    "download": "fetch the dataset repository or the individual sources",
    "unpack": "unpack the archives in ROOT/data and ROOT/downloads into the published folders",
    "sam": "of the archives in ROOT/downloads/sam, the pictures that the annotations name",
    "synthdog": "parquet files in ROOT/downloads/synthdog-en into pictures (pyarrow)",
    "ocr-vqa": "pictures of any format in ROOT/downloads/ocr_vqa into .jpg",
    "meta": "count the lines of every set and write the meta json",
    "status": "a table of lines and pictures: there, missing (exit status 1 if any is)",
}


def add_prepare_parser(topics: Commands) -> None:
    """Add ``prepare`` and its stages to the topics of ``mmlm data``."""
    prepare = topics.add_parser(
        "prepare",
        help="download, unpack and convert the published data, and write its meta json",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    stages = prepare.add_subparsers(dest="stage", required=True, metavar="STAGE")
    for name, text in STAGES.items():
        stage = stages.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        stage.set_defaults(run=run)
        stage.add_argument(
            "--root",
            default="playground",
            metavar="ROOT",
            help="folder of the data (default: playground)",
        )
        _add_stage_arguments(name, stage)


def _add_stage_arguments(name: str, stage: argparse.ArgumentParser) -> None:
    if name in ("all", "download"):
        stage.add_argument(
            "--source",
            choices=("repository", "individual"),
            default="repository",
            help="repository: one dataset on HuggingFace has everything (default). individual: "
            "each publisher's own files; a few need a person (docs/data.md)",
        )
        stage.add_argument(
            "--print-commands",
            action="store_true",
            help="print the commands for a shell and do nothing",
        )
    if name == "download":
        stage.add_argument(
            "--only",
            nargs="+",
            default=[],
            metavar="NAME",
            help="some of the sources: annotations, coco, vg, ...; an unknown name lists them",
        )
    if name in ("meta", "status"):
        stage.add_argument(
            "--only", nargs="+", default=[], metavar="SET", help="some of the nine sets"
        )
    if name in ("all", "download", "unpack"):
        stage.add_argument(
            "--again", action="store_true", help="look again at what is noted as done"
        )
    if name in ("all", "unpack"):
        stage.add_argument(
            "--remove-archives",
            action="store_true",
            help="delete each archive when all of it is unpacked (default: keep)",
        )
    if name in ("all", "sam", "synthdog", "ocr-vqa"):
        if name != "all":
            stage.add_argument(
                "--input", metavar="DIR", help="take the files from here (default: see above)"
            )
        stage.add_argument(
            "--workers", type=int, metavar="N", help="processes (default: one a processor)"
        )
    if name in ("all", "meta"):
        _add_meta_arguments(stage)


def _add_meta_arguments(stage: argparse.ArgumentParser) -> None:
    stage.add_argument(
        "--boxes",
        choices=("published", "plus"),
        default="published",
        help="published: as V1-2, [x1, y1, x2, y2] in 0-1 (default). plus: as V1-2-Plus, "
        "<box>[[x1, y1, x2, y2]]</box> in 0-1000, in copies below ROOT/opensource/plus",
    )
    stage.add_argument(
        "--output",
        metavar="FILE",
        help="the meta json (default: ROOT/internvl_1_2_finetune.json, with --boxes plus "
        "ROOT/internvl_1_2_plus_finetune.json)",
    )
    stage.add_argument(
        "--own",
        nargs=3,
        action="append",
        default=[],
        metavar=("NAME", "JSONL", "IMAGE_ROOT"),
        help="add a set of your own; may be repeated",
    )
    stage.add_argument(
        "--only-own", action="store_true", help="leave the published sets out of the meta json"
    )


def run(options: argparse.Namespace) -> int:
    """``mmlm data prepare``: run one stage.

    Returns:
        The exit status: 1 where ``status`` finds something missing.
    """
    from mmlm.preparation.layout import Playground

    playground = Playground(root=Path(options.root))
    if getattr(options, "workers", None) is not None and options.workers < 1:
        raise ConfigError(f"--workers {options.workers}: must be at least 1")
    if getattr(options, "print_commands", False):
        return _print_commands(playground, options)
    stages: dict[str, Stage] = {
        "all": _run_all,
        "download": _run_download,
        "unpack": _run_unpack,
        "sam": _run_sam,
        "synthdog": _run_synthdog,
        "ocr-vqa": _run_ocr_vqa,
        "meta": _run_meta,
        "status": _run_status,
    }
    if options.stage == "status":  # reads only
        return _run_status(playground, options)
    with playground.locked():
        return stages[options.stage](playground, options)


def _print_commands(playground: "Playground", options: argparse.Namespace) -> int:
    from mmlm.preparation.download import download_commands

    for command in download_commands(playground, options.source, getattr(options, "only", [])):
        print(f"# {command.name}" + (f": {command.note}" if command.note else ""))
        print(command.shell)
    if options.stage == "all":
        print("# the rest is done here")
        for stage in ("unpack", "sam", "synthdog", "ocr-vqa", "meta", "status"):
            print(shlex.join(["mmlm", "data", "prepare", stage, "--root", str(playground.root)]))
    return 0


def _run_all(playground: "Playground", options: argparse.Namespace) -> int:
    options.only, options.input = [], None
    for stage in (_run_download, _run_unpack, _run_sam, _run_synthdog, _run_ocr_vqa, _run_meta):
        stage(playground, options)
    return _run_status(playground, options)


def _run_download(playground: "Playground", options: argparse.Namespace) -> int:
    from mmlm.preparation.download import download_commands, run_commands

    commands = download_commands(playground, options.source, options.only)
    run_commands(playground, commands, again=options.again)
    return 0


def _run_unpack(playground: "Playground", options: argparse.Namespace) -> int:
    from mmlm.preparation.unpack import unpack_all

    count = unpack_all(playground, again=options.again, remove=options.remove_archives)
    _say(f"unpack: {count} archives")
    return 0


def _run_sam(playground: "Playground", options: argparse.Namespace) -> int:
    from mmlm.preparation.sam import unpack_sam

    source = _input(playground, options, "sam")
    missing = unpack_sam(playground, source)
    if missing:
        _say(f"sam: {missing} named pictures are in none of the archives of {source}")
    return 0


def _run_synthdog(playground: "Playground", options: argparse.Namespace) -> int:
    from mmlm.preparation.synthdog import convert_parquet

    source = _input(playground, options, "synthdog-en")
    count = convert_parquet(playground, source, workers=_workers(options))
    _say(f"synthdog: {count} pictures from {source}")
    return 0


def _run_ocr_vqa(playground: "Playground", options: argparse.Namespace) -> int:
    from mmlm.preparation.ocr_vqa import convert_ocr_vqa

    source = _input(playground, options, "ocr_vqa")
    count = convert_ocr_vqa(playground, source, workers=_workers(options))
    _say(f"ocr-vqa: {count} new pictures from {source}")
    return 0


def _run_meta(playground: "Playground", options: argparse.Namespace) -> int:
    from mmlm.preparation.meta import (
        META_NAME,
        META_NAME_PLUS,
        MetaEntry,
        published_entries,
        write_meta,
    )

    plus = options.boxes == "plus"
    default = playground.root / (META_NAME_PLUS if plus else META_NAME)
    path = Path(options.output) if options.output else default
    sets = () if options.only_own else _sets(options)
    entries = [
        *published_entries(playground, sets, plus_boxes=plus),
        *(
            MetaEntry(name=name, annotation=Path(annotation), root=image_root)
            for name, annotation, image_root in options.own
        ),
    ]
    count = write_meta(path, entries)
    _say(f"meta: {path}, {len(entries)} sets, {count:,} samples")
    return 0


def _run_status(playground: "Playground", options: argparse.Namespace) -> int:
    from mmlm.preparation.status import look

    status = look(playground, _sets(options))
    print(status.text)
    return 0 if status.complete else 1


def _sets(options: argparse.Namespace) -> "tuple[PublishedSet, ...]":
    from mmlm.preparation.sources import PUBLISHED_SETS

    names = {one.name for one in PUBLISHED_SETS}
    for name in options.only:
        if name not in names:
            raise ConfigError(f"--only {name}: no such set; known are {', '.join(sorted(names))}")
    return tuple(one for one in PUBLISHED_SETS if not options.only or one.name in options.only)


def _input(playground: "Playground", options: argparse.Namespace, name: str) -> Path:
    if not options.input:
        return playground.downloads / name
    if not Path(options.input).is_dir():
        raise ConfigError(f"--input {options.input}: is not a folder")
    return Path(options.input)


def _workers(options: argparse.Namespace) -> int:
    from mmlm.preparation.pool import default_workers

    return int(options.workers or default_workers())


def _say(text: str) -> None:
    from mmlm.log import get_logger

    get_logger(__name__).info(text)
