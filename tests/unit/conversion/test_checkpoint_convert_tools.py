"""The two tools as plain scripts; one of them started from somewhere else, as a user does."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_weights import combined_state_dict, read_model_files

ROOT = Path(__file__).parents[3]
TOOLS = ROOT / "tools/checkpoint_convert"


def run_here(monkeypatch: pytest.MonkeyPatch, tool: str, *args: str) -> int:
    """Run a tool in this process, where megatron-core is imported already."""
    monkeypatch.setattr(sys, "argv", [tool, *args])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(TOOLS / tool), run_name="__main__")
    return int(stopped.value.code or 0)


def test_in_and_out(tmp_path, write_tiny_parts, monkeypatch, capsys):
    parts = write_tiny_parts()
    projector = "in/vision/mlp_projector/hermes_2_yi_34b.pth"
    arguments = f"--vision in/vision --llm in/llm --projector {projector} --output ckpt"
    result = subprocess.run(
        [sys.executable, str(TOOLS / "hf_to_megatron.py"), *arguments.split()],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "wrote ckpt/iter_0000000 in" in result.stdout
    assert "Warning" not in result.stderr
    monkeypatch.chdir(tmp_path)
    options = ["--load", "ckpt", "--output", "out", "--parts", "--max-shard-size-gb", "1e-4"]
    assert run_here(monkeypatch, "megatron_to_hf.py", *options) == 0
    assert "wrote out in" in capsys.readouterr().out
    names = combined_state_dict(parts).keys()
    assert read_model_files(tmp_path / "out").keys() == names
    assert combined_state_dict(tmp_path / "out").keys() == names


@pytest.mark.parametrize(
    ("tool", "args", "message"),
    [
        (
            "megatron_to_hf.py",
            ("--load", "ckpt", "--output", "out"),
            "error: ckpt: does not exist; a checkpoint is a folder",
        ),
        (
            "hf_to_megatron.py",
            ("--vision", "v", "--llm", "l", "--output", "out"),
            "error: v/config.json: missing",
        ),
    ],
)
def test_an_error_is_one_line_and_status_1(tmp_path, monkeypatch, capsys, tool, args, message):
    monkeypatch.chdir(tmp_path)
    assert run_here(monkeypatch, tool, *args) == 1
    written = capsys.readouterr().err
    assert written.startswith(message)
    assert len(written.splitlines()) == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--no-combined",), "--no-combined without --parts leaves nothing to write"),
        (("--max-shard-size-gb", "0"), "--max-shard-size-gb must be above 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(monkeypatch, capsys, args, message):
    assert run_here(monkeypatch, "megatron_to_hf.py", "--load", "a", "--output", "b", *args) == 2
    assert message in capsys.readouterr().err


def test_help_says_what_is_written(monkeypatch, capsys):
    for tool in ("hf_to_megatron.py", "megatron_to_hf.py"):
        assert run_here(monkeypatch, tool, "--help") == 0
        assert "example" in capsys.readouterr().out
