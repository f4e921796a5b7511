"""``mmlm data check``: exit status, files, a real kill, and a training that uses its cache."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmlm import cli
from mmlm.data.dataset import cache_folder, open_dataset
from mmlm.data.sample import SampleSettings
from mmlm.data.tokenizer import Tokenizer
from tests.tiny_data import conversation, make_playground, make_tokenizer, write_set

ROOT = Path(__file__).resolve().parents[3]
SOUND = conversation("q", "a")


@pytest.fixture(autouse=True)
def _one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Rank 0 of one; the logger is left as it was found."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    logger = logging.getLogger("mmlm")
    before = (logger.handlers[:], logger.propagate, logger.level)
    yield
    logger.handlers[:], logger.propagate = before[0], before[1]
    logger.setLevel(before[2])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def check(meta: Path, tokenizer: str, *more: str) -> int:
    words = ["data", "check", str(meta), "--tokenizer", tokenizer, "--image-size", "56"]
    return cli.main([*words, "--num-workers", "1", *more])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["data", "--help"], ["check", "prepare", "judge every record"]),
        (
            ["data", "check", "--help"],
            [
                *("--tokenizer DIR | --load CKPT | --load-hf DIR", "--policy {strict,skip}"),
                *("--reuse", "--num-workers N", "report.json", "data_ledger.jsonl"),
                *("exit status", "examples"),
            ],
        ),
    ],
)
def test_help(arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert all(word in out for word in words)


def test_help_is_quick() -> None:
    code = (
        "import sys; from mmlm import cli\n"
        "try: cli.main(['data', 'check', '--help'])\n"
        "except SystemExit: print(sorted({'torch', 'numpy', 'PIL', 'matplotlib'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.endswith("\n[]\n"), done.stderr


def test_sound_data_pass(
    tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    meta = make_playground(tmp_path / "playground", num_samples=12)
    output = tmp_path / "report"
    assert check(meta, tokenizer, "--output", str(output)) == 0
    out = capsys.readouterr().out
    assert "pictures of 56 pixels take 4 tokens" in out and "cut at 2048 tokens" in out
    assert "result      every record can be used" in out and f"written     {output}: rep" in out
    names = ["cache", "data_ledger.jsonl", "lengths.png", "report.json", "report.txt"]
    assert sorted(file.name for file in output.iterdir()) == names
    content = json.loads((output / "report.json").read_text())
    assert content["passed"] and content["total"]["num_records"] == 12


@pytest.mark.parametrize(("policy", "status"), [("strict", 1), ("skip", 0)])
def test_broken_data_fail_unless_the_policy_accepts_them(
    policy: str, status: int, tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    entries: list[dict[str, Any]] = [
        {"id": "sound", "conversations": SOUND},
        {"id": "gone", "image": "gone.png", "conversations": SOUND},
    ]
    meta = write_set(tmp_path, entries)
    output = tmp_path / "report"
    words = ["--output", str(output), "--policy", policy, "--seq-length", "64"]
    assert check(meta, tokenizer, *words) == status
    out = capsys.readouterr().out
    assert "result      1 of 2 records cannot be used" in out
    assert "tiny.jsonl:2 (set 'tiny', id 'gone') image_unreadable: " in out
    content = json.loads((output / "report.json").read_text())
    assert content["passed"] is (policy == "skip") and content["seq_length"] == 64
    ledger = [json.loads(line) for line in (output / "data_ledger.jsonl").open()]
    assert [(entry["id"], entry["action"]) for entry in ledger] == [("gone", "excluded")]


def test_what_is_cut_or_repaired_does_not_fail(tmp_path: Path, tokenizer: str) -> None:
    late = [{"from": "gpt", "value": "hello"}, *SOUND]
    meta = write_set(
        tmp_path, [{"conversations": late}, {"conversations": conversation("q", "ab " * 99)}]
    )
    output = tmp_path / "report"
    assert check(meta, tokenizer, "--output", str(output), "--seq-length", "100") == 0
    found = json.loads((output / "report.json").read_text())["total"]["found"]
    assert found == {
        "truncated": {"longer_than_seq_length": 1},
        "repaired": {"first_turn_dropped": 1},
    }


def test_a_training_finds_what_the_check_has_measured(tmp_path: Path, tokenizer: str) -> None:
    meta = write_set(tmp_path, [{"conversations": SOUND}])
    words = ["--output", str(tmp_path / "report"), "--cache-dir", str(tmp_path / "data_cache")]
    assert check(meta, tokenizer, *words) == 0
    settings = SampleSettings(seq_length=2048, image_size=56, embeddings_per_image=4)
    cache = cache_folder(tmp_path / "data_cache", meta)
    dataset = open_dataset(meta, Tokenizer(tokenizer), settings, cache_dir=cache, build=False)
    assert len(dataset.table.usable) == 1


def test_reuse_does_not_look_at_pictures_again(tmp_path: Path, tokenizer: str) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    meta = write_set(tmp_path, [{"image": "a.png", "conversations": SOUND}])
    words = ["--output", str(tmp_path / "report")]
    assert check(meta, tokenizer, *words) == 0
    (tmp_path / "a.png").unlink()
    assert check(meta, tokenizer, *words, "--reuse") == 0
    assert check(meta, tokenizer, *words) == 1


def test_a_check_that_was_killed_goes_on(tmp_path: Path, tokenizer: str) -> None:
    # opening a pipe that nobody writes to waits for ever: the check stops there and can be killed
    pipe, output = tmp_path / "pipe.png", tmp_path / "report"
    os.mkfifo(pipe)
    entries: list[dict[str, Any]] = [{"id": n, "conversations": SOUND} for n in range(150)]
    entries[140]["image"] = "pipe.png"
    meta = write_set(tmp_path, entries)
    words = ["--tokenizer", tokenizer, "--image-size", "56", "--output", str(output)]
    command = [sys.executable, "-m", "mmlm", "data", "check", str(meta), *words]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while sum(file.read_bytes().count(b"\n") for file in output.glob("cache/*/*.partial")) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (output / "report.json").exists()
    pipe.unlink()
    Image.new("RGB", (8, 8)).save(pipe)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "85%" in done.stderr  # where the bar begins: 128 of 150
    content = json.loads((output / "report.json").read_text())
    assert content["total"]["num_usable"] == 150 and content["total"]["num_images"] == 1


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["gone.json"], "error: META: the file 'gone.json' does not exist"),
        (["{meta}", "--num-workers", "0"], "error: --num-workers 0: must be at least 1"),
        (["{meta}"], "error: {meta}: the meta must be a JSON object with at least one set"),
        (["{meta}", "--image-size", "15"], "error: vision: image_size // patch_size = 1 must be"),
    ],
)
def test_mendable_errors_are_one_line(
    words: list[str],
    line: str,
    tmp_path: Path,
    tokenizer: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    meta = tmp_path / "meta.json"
    meta.write_text("{}")
    arguments = ["data", "check", "--tokenizer", tokenizer, "--output", str(tmp_path / "out")]
    arguments += [word.format(meta=meta) for word in words]
    assert cli.main(arguments) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(line.format(meta=meta)) and err.count("\n") == 1
