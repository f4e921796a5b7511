"""Makes the whole demo world once: playground, tokenizer and tiny weights, cached by a fingerprint.

``python -m examples.internvl_v1_2.demo.world --output FOLDER`` from the repository's root. The
folder appears complete or not at all; a second call with the same settings finds it and returns.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from examples.internvl_v1_2.demo import playground, tokenizer, weights
from examples.internvl_v1_2.demo.playground import PlaygroundSettings

MARKER = "world.json"
PRETRAINED = "pretrained"
_SOURCES = ("pictures.py", "tasks.py", "playground.py", "tokenizer.py", "weights.py", "world.py")


@dataclass(frozen=True, kw_only=True)
class WorldSettings:
    """Everything that decides what is made."""

    playground: PlaygroundSettings = field(default_factory=PlaygroundSettings)
    """Pictures and conversations."""
    vocab_size: int = 700
    """Pieces of the tokenizer; fewer when the text has not enough."""
    seed: int = 0
    """Seed of the weights."""


def fingerprint(folder: Path, settings: WorldSettings) -> str:
    """Return a digest of the settings, of the code that draws, and of the place.

    The place counts because the meta files name absolute paths.
    """
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(settings), sort_keys=True).encode())
    digest.update(os.fsencode(folder.resolve()))
    for name in _SOURCES:
        digest.update((Path(__file__).parent / name).read_bytes())
    return digest.hexdigest()


def is_current(folder: Path, settings: WorldSettings) -> bool:
    """Return whether ``folder`` holds exactly the world of these settings."""
    marker = folder / MARKER
    if not marker.is_file():
        return False
    try:
        content = json.loads(marker.read_text("utf-8"))
    except ValueError:  # a marker cut short by a full disk: make the world again
        return False
    return isinstance(content, dict) and content.get("fingerprint") == fingerprint(folder, settings)


def make(folder: Path, settings: WorldSettings) -> bool:
    """Make the world at ``folder`` unless it is there.

    Args:
        folder: a folder that holds a demo world or nothing; an older world is replaced.
        settings: what to make.

    Returns:
        True when something was made, False when the cache was used.

    Raises:
        FileExistsError: if the folder holds something else, which is left alone.
    """
    folder = folder.resolve()
    if is_current(folder, settings):
        return False
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARKER).is_file():
        raise FileExistsError(
            f"{folder}: is not empty and holds no demo world ({MARKER} is missing); name another "
            "folder or remove it"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    # not mkdtemp: that folder would be closed to everybody else, whatever the umask says
    temporary = folder.parent / f".{folder.name}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)  # of a killed process of that number
    temporary.mkdir()
    try:
        playground.write(temporary, settings.playground, folder)
        model = tokenizer.train(playground.read_texts(temporary), settings.vocab_size)
        num_parameters = weights.write(temporary / PRETRAINED, model, settings.seed)
        marker = {
            "fingerprint": fingerprint(folder, settings),
            "settings": dataclasses.asdict(settings),
            "num_parameters": num_parameters,
        }
        (temporary / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return True


def main() -> None:
    """Make the world and say where its parts are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the world")
    defaults = WorldSettings()
    parser.add_argument("--samples", type=int, default=defaults.playground.training_samples)
    parser.add_argument("--held-out", type=int, default=defaults.playground.held_out_samples)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    arguments = parser.parse_args()
    settings = WorldSettings(
        playground=PlaygroundSettings(
            training_samples=arguments.samples,
            held_out_samples=arguments.held_out,
            seed=arguments.seed,
        ),
        seed=arguments.seed,
    )
    try:
        made = make(arguments.output, settings)
    except FileExistsError as error:
        parser.exit(1, f"{error}\n")
    print(f"demo world: {'made' if made else 'cached'} in {arguments.output}")


if __name__ == "__main__":
    main()
