"""The map in README.md: one line a file, taken from the first line of the file's docstring.

``python tools/readme_map.py`` prints the map; ``--write`` puts it between the markers in README.md.
"""

import argparse
import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("mmlm", "tools", "examples", "benchmarks")
BEGIN = "<!-- map: python tools/readme_map.py --write -->\n"
END = "<!-- end of map -->\n"


def summary(path: Path) -> str:
    """Return what a file says of itself in one line.

    Args:
        path: a Python or shell file.

    Returns:
        The first line of its docstring, or of the comment under its shebang.

    Raises:
        ValueError: the file says nothing of itself.
    """
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        lines = (ast.get_docstring(ast.parse(text)) or "").splitlines()
    else:
        comments = [line for line in text.splitlines() if line.startswith("#")]
        lines = [line.lstrip("# ") for line in comments if not line.startswith("#!")]
    if not lines or not lines[0].strip():
        raise ValueError(f"{path}: the map needs a first line that says what the file is for")
    return lines[0].strip()


def mapped_files(root: Path) -> list[Path]:
    """Return the files that the map names, in its order (``__init__.py`` only re-exports)."""
    found = [
        path
        for folder in FOLDERS
        for path in (root / folder).rglob("*")
        if path.suffix in (".py", ".sh", ".sbatch") and path.name != "__init__.py"
    ]

    def place(path: Path) -> tuple[int, Path, str]:
        return FOLDERS.index(path.relative_to(root).parts[0]), path.parent, path.name

    return sorted(found, key=place)


def make_map(root: Path) -> str:
    """Return the map of the repository at ``root``: a block with a heading for each folder."""
    rooms: dict[str, list[Path]] = {}
    for path in mapped_files(root):
        rooms.setdefault(path.parent.relative_to(root).as_posix(), []).append(path)
    width = max((len(path.name) for room in rooms.values() for path in room), default=0)
    blocks = [
        "\n".join([f"{room}/", *(f"  {path.name:<{width}}  {summary(path)}" for path in files)])
        for room, files in rooms.items()
    ]
    return "```text\n" + "\n\n".join(blocks) + "\n```\n"


def with_map(readme: str, new_map: str) -> str:
    """Return the README's text with the part between the markers replaced.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md must have the lines {BEGIN!r} and {END!r}")
    return before + BEGIN + new_map + END + after


def main() -> None:
    """Print the map, or write it into README.md."""
    parser = argparse.ArgumentParser(description="One line a file, from the files' docstrings.")
    parser.add_argument("--write", action="store_true", help="replace the map in README.md")
    arguments = parser.parse_args()
    new_map = make_map(ROOT)
    if not arguments.write:
        sys.stdout.write(new_map)
        return
    readme = ROOT / "README.md"
    readme.write_text(with_map(readme.read_text(encoding="utf-8"), new_map), encoding="utf-8")


if __name__ == "__main__":
    main()
