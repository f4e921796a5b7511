"""``mmlm data show``: a sample on the terminal, a row as a table and a picture."""

import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from mmlm import cli
from tests.tiny_data import conversation, make_playground, make_tokenizer, write_set

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def _one_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Rank 0 of one, in a folder of its own; the logger is left as it was found."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    logger = logging.getLogger("mmlm")
    before = (logger.handlers[:], logger.propagate, logger.level)
    yield
    logger.handlers[:], logger.propagate = before[0], before[1]
    logger.setLevel(before[2])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def meta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_playground(tmp_path_factory.mktemp("playground"), num_samples=12, seed=1)


def show(meta: Path, tokenizer: str, *more: str) -> int:
    sizes = ["--image-size", "56", "--seq-length", "256"]
    return cli.main(["data", "show", str(meta), "--tokenizer", tokenizer, *sizes, *more])


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["data", "show", "--help"])
    out = capsys.readouterr().out
    assert "numbered from 0" in out and "--png work_dirs/row.png" in out and "examples" in out


def test_a_sample_is_printed(
    meta: Path, tokenizer: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert show(meta, tokenizer, "--index", "0") == 0
    out = capsys.readouterr().out
    assert out.startswith("sample 0 of 12: set 'pictured', id '0'\n")
    assert "    + The " in out and "\x1b" not in out
    assert not list(tmp_path.iterdir())  # nothing was measured and nothing written
    assert show(meta, tokenizer, "--index", "0", "--color") == 0
    assert "\x1b[32mThe " in capsys.readouterr().out
    assert show(meta, tokenizer, "--index", "0", "--tokens") == 0
    assert re.search(r"\n +0 +3 +<\|im_start\|> +-\n", capsys.readouterr().out)


def test_the_row_of_a_sample_is_drawn(
    meta: Path, tokenizer: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Every sample of the epoch is found, in the one row that the table of that row names."""
    rows: dict[str, list[int]] = {}
    for sample_id in range(12):
        words = ["--index", str(sample_id), "--global-batch-size", "4", "--png", "pictures/row.png"]
        assert show(meta, tokenizer, *words) == 0
        out = capsys.readouterr().out
        title, _, *lines = out[out.index("\niteration ") + 1 :].splitlines()
        members = [int(line.split()[2]) for line in lines[:-2]]
        assert sample_id in members
        assert rows.setdefault(title, members) == members
        assert re.match(r"written pictures.row\.png \(2080 x \d+ pixels\)", lines[-1])
        with Image.open(tmp_path / "pictures" / "row.png") as image:
            assert image.width == 2080
    assert sorted(number for members in rows.values() for number in members) == list(range(12))
    assert {title.split(",")[0] for title in rows} == {"iteration 0", "iteration 1", "iteration 2"}


def test_a_row_of_an_iteration(
    meta: Path, tokenizer: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["--iteration", "4", "--row", "1", "--global-batch-size", "4"]
    words += ["--data-parallel-size", "2", "--cache-dir", "cache"]
    assert show(meta, tokenizer, *words) == 0
    out = capsys.readouterr().out
    assert re.match(r"iteration 4, row 1 of \d+ \(DP rank \d, microbatch \d, epoch 1\)\n", out)
    weights = {line.split()[-1] for line in out.splitlines()[2:-1]}
    assert len(weights) == 1 and 0 < float(weights.pop()) < 1
    assert list((tmp_path / "cache").iterdir()) and not (tmp_path / "work_dirs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--index", "12"], "sample 12 does not exist; the sets have 12 samples"),
        (["--index", "-1"], "--index -1: must be at least 0"),
        (["--iteration", "0", "--row", "9999"], r"--row 9999: iteration 0 has \d+ rows, from 0"),
        (["--iteration", "0", "--global-batch-size", "0"], "--global-batch-size 0: must be at lea"),
        (["--index", "0", "--epoch", "-1"], "--epoch -1: must be at least 0"),
        (["--iteration", "0", "--png", "/dev/null/x.png"], "--png .*: cannot be written"),
    ],
)
def test_what_cannot_be_shown_is_one_line(
    meta: Path, tokenizer: str, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert show(meta, tokenizer, *words) == 1
    assert re.search(f"error: {message}", capsys.readouterr().err)


def test_a_sample_that_is_left_out_is_in_no_row(
    tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = [{"conversations": conversation("<img>", "a")}]
    meta = write_set(tmp_path / "set", entries)
    assert show(meta, tokenizer, "--index", "0") == 0
    assert "  left out  literal_special_token" in capsys.readouterr().out
    assert show(meta, tokenizer, "--index", "0", "--png", "x.png") == 1
    assert "--png: sample 0 is left out, so no row has it" in capsys.readouterr().err
    assert show(meta, tokenizer, "--index", "0", "--special-literals", "tokens") == 0
    assert "left out" not in capsys.readouterr().out


def test_pictures_of_a_row_are_augmented_as_in_its_epoch(tokenizer: str, tmp_path: Path) -> None:
    source = make_playground(tmp_path / "set", num_samples=1, seed=1)
    meta = source.with_name("augmented.json")
    meta.write_text(source.read_text().replace('"data_augment": false', '"data_augment": true'))
    pictures = []
    for iteration in ("0", "1"):
        words = ["--iteration", iteration, "--global-batch-size", "1", "--png", "row.png"]
        assert show(meta, tokenizer, *words) == 0
        with Image.open(tmp_path / "row.png") as image:
            pictures.append(image.crop((0, 60, image.width, image.height)).tobytes())
    assert pictures[0] != pictures[1]  # the title, which names the epoch, is above


def test_a_picture_that_vanished_since_it_was_measured_is_named(
    tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    meta = make_playground(tmp_path / "set", num_samples=1)
    assert show(meta, tokenizer, "--iteration", "0", "--global-batch-size", "1") == 0
    root = Path(json.loads(meta.read_text())["pictured"]["root"])
    for picture in root.rglob("*.png"):
        picture.unlink()
    assert show(meta, tokenizer, "--iteration", "0", "--global-batch-size", "1") == 1
    message = r"sample 0 \(.*jsonl:1\) was usable when it was measured, and is not any more: image_"
    assert re.search(message, capsys.readouterr().err)


def test_a_reader_that_has_seen_enough_is_no_error(meta: Path, tokenizer: str) -> None:
    words = ["data", "show", str(meta), "--tokenizer", tokenizer, "--index", "0", "--tokens"]
    code = f"import sys; from mmlm import cli; sys.exit(cli.main({words!r}))"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1
