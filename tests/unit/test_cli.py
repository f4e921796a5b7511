"""The command line: help, one line for what a user can mend, and what the commands call."""

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mmlm import cli
from mmlm.checkpoint.manifest import Manifest
from mmlm.commands import train as commands_train
from mmlm.config.load import to_json
from mmlm.config.presets import tiny
from mmlm.config.schema import CheckpointConfig, DataConfig, ParallelConfig, RunConfig, TrainConfig
from mmlm.errors import DataError

ROOT = Path(__file__).resolve().parents[2]

GRADIENTS = ["debug", "gradients", "--data", "{meta}", "--output", "{output}"]

RECIPE = """
from mmlm.config.presets import tiny
from mmlm.config.schema import DataConfig, RunConfig

def small():
    return RunConfig(model=tiny(), data=DataConfig(meta="gone.json", tokenizer="t"))
"""


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


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    """A recipe whose meta file is missing."""
    file = tmp_path / "some_recipe.py"
    file.write_text(RECIPE)
    return f"{file}:small"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], ["train", "evaluate", "3D-parallel training"]),
        (["train", "--help"], ["--recipe FILE:FUNCTION", "--set a.b=c", "torchrun"]),
        (["evaluate", "--help"], ["--load", "--data", "--output", "--set"]),
        (["debug", "--help"], ["gradients", "every gradient of one global batch"]),
        (
            ["debug", "gradients", "--help"],
            ["--load-hf DIR", "--ids", "--drop-path", "torchrun", "gradient/<name>", "float64"],
        ),
    ],
)
def test_help(arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert all(word in out for word in words)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["tran"],
        ["train"],
        ["evaluate", "--load", "x"],
        ["debug"],
        ["debug", "gradients", "--data", "m", "--output", "o"],
        ["debug", "gradients", "--load", "x", "--load-hf", "y", "--data", "m", "--output", "o"],
    ],
)
def test_misuse_is_explained_by_argparse(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: mmlm" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["train", "--recipe", "gone.py:f"], "error: --recipe: the file 'gone.py' does not exist"),
        (
            ["train", "--recipe", "{recipe}", "--set", "trian.seed=1"],
            "error: --set trian.seed: there is no field 'trian'; the nearest is 'train'",
        ),
        (
            ["train", "--recipe", "{recipe}"],
            "error: data.meta: the file 'gone.json' does not exist",
        ),
        (
            ["evaluate", "--load", "x", "--data", "gone.json"],
            "error: --data: the file 'gone.json' does not exist",
        ),
        (
            ["debug", "gradients", "--load", "x", "--data", "gone.json", "--output", "o"],
            "error: --data: the file 'gone.json' does not exist",
        ),
        (
            [*GRADIENTS, "--load", "x", "--ids", "3;17"],
            "error: --ids '3;17': must be numbers with commas between them, e.g. 3,17",
        ),
        (
            [*GRADIENTS, "--load", "x", "--iteration", "-1"],
            "error: --iteration -1: must be at least 0",
        ),
        ([*GRADIENTS, "--load", "gone"], "error: gone: does not exist"),
        (
            [*GRADIENTS, "--load-hf", "gone"],
            "error: gone: does not exist; give a combined InternVL-Chat folder",
        ),
        (
            ["debug", "gradients", "--load", "x", "--data", "{meta}", "--output", "{meta}"],
            "error: --output {meta}: exists already; give another name or --overwrite",
        ),
    ],
)
def test_mendable_errors_are_one_line(
    arguments: list[str],
    line: str,
    recipe: str,
    tmp_path: Path,
    held_out: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = {"recipe": recipe, "meta": str(held_out), "output": str(tmp_path / "new")}
    assert cli.main([word.format(**names) for word in arguments]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(line.format(**names)) and err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "printed"), [(DataError("line 3 of a.jsonl"), True), (None, False)]
)
def test_other_ranks_print_only_what_rank_zero_may_not_know(
    error: DataError | None,
    printed: bool,
    recipe: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    if error is not None:

        def fail(options: object) -> int:
            raise error

        monkeypatch.setattr(commands_train, "run_train", fail)
    assert cli.main(["train", "--recipe", recipe]) == 1
    assert capsys.readouterr().err == ("[rank 2] error: line 3 of a.jsonl\n" if printed else "")


def test_bugs_keep_their_traceback(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands_train, "run_train", lambda options: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["train", "--recipe", recipe])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Put recorders where the work would be done."""
    from mmlm.parallel import topology
    from mmlm.train import evaluation_run, trainer

    done: list[Any] = []
    place = SimpleNamespace(rank=0)

    def evaluate(config: RunConfig, meta: str, *rest: Any) -> dict[str, Any]:
        done.append(("evaluate", config, meta))
        return {"total": {"loss": 0.5}, "sets": {"bücher": {}}}

    monkeypatch.setattr(topology, "initialize", lambda parallel: done.append(parallel) or place)
    monkeypatch.setattr(topology, "destroy", lambda: done.append("destroy"))
    monkeypatch.setattr(trainer, "train", lambda config, *rest: done.append(("train", config)))
    monkeypatch.setattr(evaluation_run, "evaluate_checkpoint", evaluate)
    return done


def test_train_hands_on_the_overridden_recipe(
    calls: list[Any], recipe: str, tmp_path: Path
) -> None:
    meta = tmp_path / "meta.json"
    meta.write_text("{}")
    options = ["--set", f"data.meta={meta}", "--set", "parallel.tensor_model_parallel_size=2"]
    assert cli.main(["train", "--recipe", recipe, *options]) == 0
    parallel, (command, config), end = calls
    assert command == "train" and end == "destroy"
    assert config.parallel == parallel and parallel.tensor_model_parallel_size == 2
    assert config.data.meta == str(meta)


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A checkpoint (without tensors) of a run with settings of its own, at TP 2."""
    folder = tmp_path / "iter_0000009"
    folder.mkdir()
    run = RunConfig(
        parallel=ParallelConfig(tensor_model_parallel_size=2),
        data=DataConfig(meta="its.json", seq_length=96),
        train=TrainConfig(dtype="fp32", global_batch_size=4),
        checkpoint=CheckpointConfig(load="older"),
    )
    Manifest(
        iteration=9,
        consumed_samples=36,
        dtype="fp32",
        model=tiny(),
        run_config=to_json(run),
        has_optimizer=True,
    ).write(folder)
    return folder


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    """A meta json."""
    meta = tmp_path / "held_out.json"
    meta.write_text("{}")
    return meta


def test_evaluate_prints_and_writes_the_report(
    calls: list[Any],
    trained: Path,
    held_out: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Into a folder that is made for it."""
    output = tmp_path / "reports" / "new" / "report.json"
    arguments = ["--load", str(trained), "--data", str(held_out), "--output", str(output)]
    assert cli.main(["evaluate", *arguments, "--set", "data.seq_length=64"]) == 0
    _, (command, config, given), end = calls
    assert (command, given, end) == ("evaluate", str(held_out), "destroy")
    assert config.checkpoint.load == str(trained) and config.data.seq_length == 64
    printed = capsys.readouterr().out
    assert output.read_text("utf-8") == printed and "bücher" in printed
    assert json.loads(printed)["total"] == {"loss": 0.5}


def test_evaluate_takes_the_settings_of_the_checkpoint(
    calls: list[Any], trained: Path, held_out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the layout: it runs in one process, or in as many as are started."""
    from mmlm.parallel import backend

    asked: list[Any] = []
    monkeypatch.setattr(backend, "resolve_backend", lambda *given: asked.append(given))
    assert cli.main(["evaluate", "--load", str(trained), "--data", str(held_out)]) == 0
    parallel, (_, config, _), _ = calls
    assert parallel == config.parallel == ParallelConfig()
    assert (config.train.dtype, config.train.global_batch_size) == ("fp32", 4)
    assert config.data.seq_length == 96
    assert config.checkpoint.load == str(trained)
    assert asked == [(config.backend, "fp32")]


def test_evaluate_prefers_the_recipe(
    calls: list[Any], trained: Path, held_out: Path, recipe: str
) -> None:
    arguments = ["--load", str(trained), "--data", str(held_out), "--recipe", recipe]
    assert cli.main(["evaluate", *arguments]) == 0
    _, (_, config, _), _ = calls
    assert config.model == tiny() and config.train == TrainConfig()
    assert config.checkpoint.load == str(trained)


def test_output_that_cannot_be_is_known_before_the_work(
    calls: list[Any], trained: Path, held_out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = held_out / "report.json"  # below a file
    arguments = ["--load", str(trained), "--data", str(held_out), "--output", str(output)]
    assert cli.main(["evaluate", *arguments]) == 1
    assert calls == []
    assert capsys.readouterr().err == f"error: --output {output}: File exists\n"


def test_evaluate_names_a_checkpoint_that_is_not_there(
    calls: list[Any], held_out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["evaluate", "--load", "nowhere", "--data", str(held_out)]) == 1
    assert calls == []
    assert capsys.readouterr().err.startswith("error: nowhere: does not exist; a checkpoint is a")


def test_help_and_wrong_settings_need_no_megatron() -> None:
    """Nobody waits seconds for imports to read that a file is missing."""
    program = (
        "import sys; from mmlm.cli import main; code = main(['train', '--recipe', 'gone.py:f']);"
        "sys.exit(code if not {'megatron', 'torch'} & sys.modules.keys() else 9)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1, result.stderr
    assert result.stderr == "error: --recipe: the file 'gone.py' does not exist\n"
