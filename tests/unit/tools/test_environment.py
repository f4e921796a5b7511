"""The shell around the project: tools/environment.sh with a stand-in for python, and syntax.

The stand-in answers what the script asks an interpreter and records each `pip install`, so that
these tests need no network and no time.
"""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SHELL_FILES = sorted(
    path
    for folder in ("tools", "tests", "examples", "benchmarks", ".ci")
    for path in (ROOT / folder).rglob("*")
    if path.suffix == ".sh" or path == ROOT / ".ci/run"
)

FAKE_PYTHON = """#!/usr/bin/env bash
case "$1 ${2:-}" in
"-c import sys"*) [[ -n "${FAKE_OLD:-}" ]] || echo "$0" ;;
"-c import ensurepip"*) [[ -z "${FAKE_NO_VENV:-}" ]] ;;
"-c import torch"*) echo "${FAKE_CUDA_TORCH:-}" ;;
"- "*) echo "torch==$3" ;;
"-I -") [[ -n "${FAKE_HAS_ALL:-}" ]] ;;
"--version "*) echo "Python 3.11.0" ;;
"-m venv")
    venv="${@: -1}"
    echo "venv $*" >>"$FAKE_CALLS"
    mkdir -p "$venv/bin"
    cp "$0" "$venv/bin/python"
    echo "version = 3.11.0" >"$venv/pyvenv.cfg"
    echo "export VIRTUAL_ENV='$venv' PATH='$venv/bin':\\"\\$PATH\\"" >"$venv/bin/activate"
    ;;
"-m pip")
    [[ "$3" == install ]] || exit 0
    echo "$*" >>"$FAKE_CALLS"
    echo "pip said so"
    [[ -z "${FAKE_PIP_FAILS:-}" ]]
    ;;
*) exit 9 ;;
esac
"""


@dataclass(frozen=True, kw_only=True)
class Sandbox:
    """A copy of what the script reads, with the stand-in as the interpreter."""

    root: Path

    @property
    def script(self) -> Path:
        """The copy of the script."""
        return self.root / "repo/tools/environment.sh"

    @property
    def venv(self) -> Path:
        """Where the script puts the environment when it is not told."""
        return self.root / "repo/.venv"

    def bash(self, command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a bash command outside the repository, with the stand-in as MMLM_PYTHON."""
        environment = {
            "PATH": os.environ["PATH"],
            "MMLM_PYTHON": str(self.root / "python"),
            "FAKE_CALLS": str(self.root / "calls"),
            **variables,
        }
        return subprocess.run(
            ["bash", "-c", command],
            cwd=self.root,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def run(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Execute the script."""
        return self.bash(" ".join([f"bash '{self.script}'", *words]), **variables)

    def calls(self) -> list[str]:
        """What was asked of venv and pip since the last call, one line each."""
        record = self.root / "calls"
        lines = record.read_text().splitlines() if record.exists() else []
        record.write_text("")
        return lines


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    """An empty sandbox; its path has a space, as a user's may."""
    root = tmp_path / "some where"
    (root / "repo/tools").mkdir(parents=True)
    for name in ("setup.py", "constraints.txt", "tools/environment.sh"):
        shutil.copy(ROOT / name, root / "repo" / name)
    (root / "python").write_text(FAKE_PYTHON)
    (root / "python").chmod(0o755)
    return Sandbox(root=root)


@pytest.mark.parametrize("path", SHELL_FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_shell_file_parses(path: Path) -> None:
    result = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_first_call_installs_torch_alone_and_then_mmlm(sandbox: Sandbox) -> None:
    result = sandbox.run("dev")
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{sandbox.venv}\n"
    made, torch, mmlm = sandbox.calls()
    assert made.startswith("venv -m venv --clear ")
    assert torch.endswith("torch==2.13.0") and "-e" not in torch.split()
    assert mmlm.endswith(f"-e {sandbox.root}/repo[dev]")
    assert all("constraints.txt" in call for call in (torch, mmlm))


def test_second_call_does_nothing(sandbox: Sandbox) -> None:
    sandbox.run("dev")
    sandbox.calls()
    for words in (("dev",), ()):
        result = sandbox.run(*words)
        assert (result.returncode, result.stdout) == (0, f"{sandbox.venv}\n")
        assert result.stderr == ""
    assert sandbox.calls() == []


def test_changed_constraints_install_again_with_the_extras_that_were_there(
    sandbox: Sandbox,
) -> None:
    sandbox.run("dev")
    sandbox.calls()
    with (sandbox.root / "repo/constraints.txt").open("a") as file:
        file.write("# a change\n")
    assert sandbox.run().returncode == 0
    torch, mmlm = sandbox.calls()
    assert torch.endswith("torch==2.13.0")
    assert mmlm.endswith("[dev]")


def test_gpu_extra_builds_against_the_installed_torch(sandbox: Sandbox) -> None:
    assert sandbox.run("gpu").returncode == 0
    *_, gpu = sandbox.calls()
    assert "--no-build-isolation" in gpu and gpu.endswith("[gpu]")


def test_cuda_torch_of_the_interpreter_is_kept(sandbox: Sandbox) -> None:
    result = sandbox.run(FAKE_CUDA_TORCH="2.11.0+cu130")
    assert result.returncode == 0, result.stderr
    made, mmlm = sandbox.calls()
    assert "--system-site-packages" in made
    assert "torch==" not in mmlm
    assert f"-c {sandbox.venv}/constraints.txt" in mmlm
    assert "torch==2.11.0+cu130" in (sandbox.venv / "constraints.txt").read_text()


def test_failing_pip_shows_its_log_and_leaves_no_stamp(sandbox: Sandbox) -> None:
    result = sandbox.run(FAKE_PIP_FAILS="1")
    assert result.returncode == 1
    assert "pip said so" in result.stderr
    assert "ERROR: pip could not install this" in result.stderr
    assert result.stdout == ""
    sandbox.calls()
    assert sandbox.run().returncode == 0
    assert len(sandbox.calls()) == 2


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"MMLM_PYTHON": "/no/such/python"}, "no Python 3.11 or 3.12 among: /no/such/python"),
        ({"FAKE_OLD": "1"}, "no Python 3.11 or 3.12 among"),
        ({"FAKE_NO_VENV": "1"}, "has no venv module: install it"),
    ],
)
def test_interpreter_that_does_not_fit(
    sandbox: Sandbox, variables: dict[str, str], message: str
) -> None:
    result = sandbox.run(**variables)
    assert result.returncode == 1
    assert message in result.stderr


def test_active_environment_that_has_everything_is_used(sandbox: Sandbox) -> None:
    active = sandbox.root / "active"
    sandbox.bash(f"'{sandbox.root}/python' -m venv '{active}'")
    sandbox.calls()
    result = sandbox.run("dev", VIRTUAL_ENV=str(active), FAKE_HAS_ALL="1")
    assert (result.returncode, result.stdout) == (0, f"{active}\n")
    assert sandbox.calls() == []


def test_active_environment_that_lacks_something_is_left_alone(sandbox: Sandbox) -> None:
    active = sandbox.root / "active"
    sandbox.bash(f"'{sandbox.root}/python' -m venv '{active}'")
    result = sandbox.run(VIRTUAL_ENV=str(active))
    assert (result.returncode, result.stdout) == (0, f"{sandbox.venv}\n")
    assert f"the active {active} has not all of mmlm's dependencies" in result.stderr


def test_unknown_word_is_refused(sandbox: Sandbox) -> None:
    result = sandbox.run("dve")
    assert result.returncode == 1
    assert "unknown word 'dve': dev, gpu or nothing" in result.stderr


def test_help_explains_and_installs_nothing(sandbox: Sandbox) -> None:
    result = sandbox.run("--help")
    assert result.returncode == 0
    for word in ("dev", "gpu", "MMLM_VENV", "MMLM_PYTHON"):
        assert word in result.stdout
    assert sandbox.calls() == []


def test_sourcing_activates_and_leaves_the_caller_alone(sandbox: Sandbox) -> None:
    result = sandbox.bash(
        f"set -euo pipefail; set -- --help mine; source '{sandbox.script}'; "
        'echo "$VIRTUAL_ENV|$*|$-|$(compgen -v | grep -c ^_mmlm || true)"'
    )
    assert result.returncode == 0, result.stderr
    venv, words, options, left_over = result.stdout.strip().split("|")
    assert venv == str(sandbox.venv)
    assert words == "--help mine"
    assert "e" in options and "u" in options
    assert left_over == "0"


def test_sourcing_fails_without_ending_the_shell(sandbox: Sandbox) -> None:
    result = sandbox.bash(
        f"source '{sandbox.script}' || echo \"status $?\"", MMLM_PYTHON="/no/such/python"
    )
    assert result.stdout == "status 1\n"


def test_no_environment_of_its_own(sandbox: Sandbox) -> None:
    result = sandbox.bash(
        f"source '{sandbox.script}' dev; echo \"$PYTHONPATH|${{VIRTUAL_ENV:-}}\"", MMLM_VENV="none"
    )
    assert result.stdout == f"{sandbox.root}/repo|\n"
    assert sandbox.calls() == []
