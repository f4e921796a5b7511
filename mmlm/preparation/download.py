"""Stage ``download``: the exact commands, printed or run.

Every file comes under a temporary name and is renamed when its command succeeds, so a file that is
there is complete, and each tool continues what it was stopped in.
"""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mmlm.errors import ConfigError, DataError
from mmlm.log import get_logger
from mmlm.preparation.files import make_folder
from mmlm.preparation.layout import Playground
from mmlm.preparation.sources import COLLECTIONS, DATASET_REPOSITORY, SOURCES, Source, Tool

Origin = Literal["repository", "individual"]

_INSTALL = {
    "hf": "pip install 'mmlm[data]'",
    "gdown": "pip install gdown",
    "wget": "install it with the system's package manager",
}


@dataclass(frozen=True, kw_only=True)
class DownloadCommand:
    """One command, and what it makes."""

    name: str
    """Of the source."""
    argv: tuple[str, ...]
    """Program and arguments; no shell is involved."""
    target: Path
    """File or folder that is there afterwards."""
    part: Path | None = None
    """What ``target`` is called until it is complete; None for folders."""
    note: str = ""
    """What a person should know."""

    @property
    def shell(self) -> str:
        """The same for a shell."""
        folder = self.target.parent if self.part else self.target
        steps = [("mkdir", "-p", str(folder)), self.argv]
        if self.part:
            steps.append(("mv", str(self.part), str(self.target)))
        return " && ".join(shlex.join(step) for step in steps)


def download_names(origin: Origin) -> tuple[str, ...]:
    """Return the names that ``--only`` knows."""
    if origin == "repository":
        return ("annotations", *COLLECTIONS)
    return tuple(source.name for source in SOURCES)


def download_commands(
    playground: Playground, origin: Origin, only: Sequence[str] = ()
) -> tuple[DownloadCommand, ...]:
    """Return the commands that fetch the data.

    Args:
        playground: where it goes.
        origin: the one dataset repository, or the individual sources.
        only: names out of `download_names`; all when empty, but for sources that replace others.

    Raises:
        ConfigError: an unknown name.
    """
    names = download_names(origin)
    for name in only:
        if name not in names:
            raise ConfigError(
                f"--only {name}: unknown with --source {origin}; known are {', '.join(names)}"
            )
    if origin == "repository":
        if not only:
            return (_repository_command(playground, "all", ""),)
        return tuple(
            _repository_command(
                playground, name, "opensource/*" if name == "annotations" else f"data/{name}*"
            )
            for name in only
        )
    return tuple(
        _source_command(playground, source)
        for source in SOURCES
        if (source.name in only if only else not source.instead_of)
    )


def run_commands(
    playground: Playground, commands: Sequence[DownloadCommand], *, again: bool = False
) -> None:
    """Run commands one after the other; what is complete is skipped.

    Args:
        playground: where they write.
        commands: of `download_commands`.
        again: run them even if their targets are there (hf then compares with the server).

    Raises:
        DataError: a program is missing or fails; what it has fetched stays.
    """
    logger = get_logger(__name__)
    for number, command in enumerate(commands, start=1):
        place = f"[{number}/{len(commands)}] {command.name}"
        if not again and _is_complete(playground, command):
            logger.info("%s: there already", place)
            continue
        logger.info("%s: %s", place, shlex.join(command.argv))
        if command.note:
            logger.info("    %s", command.note)
        _run(command)
        if command.part:
            if not command.part.is_file():
                raise DataError(
                    f"{command.name}: '{command.argv[0]}' ended well but left no {command.part}"
                )
            command.part.replace(command.target)
        else:
            playground.mark_done("download", command.name)


def _is_complete(playground: Playground, command: DownloadCommand) -> bool:
    if command.part:
        return command.target.is_file()
    return command.target.is_dir() and playground.is_done("download", command.name)


def _run(command: DownloadCommand) -> None:
    program = find_program(command.argv[0])
    if program is None:
        needed = command.argv[0]
        raise DataError(
            f"{command.name}: the program '{needed}' is not there: {_INSTALL.get(needed, '')}; "
            "or take the commands of --print-commands to a machine that has it"
        )
    folder = command.target.parent if command.part else command.target
    make_folder(folder)
    result = subprocess.run([program, *command.argv[1:]], check=False)
    if result.returncode != 0:
        raise DataError(
            f"{command.name}: '{shlex.join(command.argv)}' failed with status {result.returncode}, "
            "its own message is above; run the same `mmlm data prepare` again, it continues"
        )


def find_program(name: str) -> str | None:
    """Return a program's path: on PATH, or beside this Python; None where it is not."""
    places = os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)])
    return shutil.which(name, path=places)


def _repository_command(playground: Playground, name: str, pattern: str) -> DownloadCommand:
    return DownloadCommand(
        name=f"repository-{name}",
        argv=_hf(DATASET_REPOSITORY, playground.root, pattern),
        target=playground.root,
        note="annotations to opensource/, archives of pictures to data/",
    )


def _hf(repository: str, folder: Path, pattern: str) -> tuple[str, ...]:
    argv = ("hf", "download", repository, "--repo-type", "dataset", "--local-dir", str(folder))
    return (*argv, "--include", pattern) if pattern else argv


def _source_command(playground: Playground, source: Source) -> DownloadCommand:
    folder = playground.downloads / source.name
    size = f"about {source.gigabytes:g} GB" if source.gigabytes else ""
    note = "; ".join(part for part in (size, source.note) if part)
    if source.tool in (Tool.HUGGINGFACE, Tool.DRIVE_FOLDER):
        argv = (
            _hf(source.address, folder, source.file)
            if source.tool == Tool.HUGGINGFACE
            else ("gdown", "--continue", "--folder", "--output", f"{folder}/", source.address)
        )
        return DownloadCommand(name=source.name, argv=argv, target=folder, note=note)
    target = folder / source.file
    part = folder / f"{source.file}.part"
    if source.tool == Tool.DRIVE:
        argv = ("gdown", "--continue", "--output", str(part), source.address)
    else:
        argv = ("wget", "--continue", "--tries", "10", "--output-document", str(part))
        argv = (*argv, source.address)
    return DownloadCommand(name=source.name, argv=argv, target=target, part=part, note=note)
