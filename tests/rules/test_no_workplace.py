"""Nothing that is tracked names somebody's machine: no home folders, no registry hosts."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FORBIDDEN = {
    "an absolute path of one machine": r"(?<![\w.$)}\]/-])/(?:home|root|work|opt|Users|farm)/",
    "a folder beside the repository": r"\.\./shared\b",
    "the host of a package registry": (
        r"\b(?:test\.)?pypi\.org|pythonhosted\.org|download\.pytorch\.org|pypi\.nvidia\.com"
    ),
}


def tracked_texts() -> dict[str, str]:
    """Every file that git tracks or would, with its text; binary files are left out."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if listing.returncode != 0:
        pytest.skip("this copy is not a git checkout")
    texts = {}
    for name in listing.stdout.decode().split("\0"):
        path = ROOT / name
        if not name or not path.is_file():
            continue
        data = path.read_bytes()
        if b"\0" not in data:
            texts[name] = data.decode("utf-8")
    return texts


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_file_names(what: str) -> None:
    pattern = re.compile(FORBIDDEN[what])
    found = [
        f"{name}:{number}: {line.strip()[:120]}"
        for name, text in tracked_texts().items()
        for number, line in enumerate(text.splitlines(), 1)
        if pattern.search(line)
    ]
    assert not found, f"{what}:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("an absolute path of one machine", "see " + "/home" + "/someone/x"),
        ("a folder beside the repository", ".." + "/shared/notes"),
        ("the host of a package registry", "https://" + "pypi" + ".org/simple"),
    ],
)
def test_rule_sees(what: str, text: str) -> None:
    assert re.search(FORBIDDEN[what], text)


def test_rule_leaves_relative_paths_alone() -> None:
    text = "tests/work/data, $ROOT/home/x, playground/opt/y"
    assert not re.search(FORBIDDEN["an absolute path of one machine"], text)
