"""pretrain.sh: help, refusals of one line, and which of its three paths it takes."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = "examples/internvl_v1_2/pretrain.sh"


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A folder in front of PATH for programs that this machine has not."""
    folder = tmp_path / "bin"
    folder.mkdir()
    return folder


def put(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n", encoding="utf-8")
    (folder / name).chmod(0o755)


def run(tools: Path, *words: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run the script with nothing but ``settings`` in its environment."""
    path = f"{tools}{os.pathsep}{os.defpath}"
    return subprocess.run(
        ["bash", SCRIPT, *words],
        cwd=ROOT,
        env={"PATH": path, "HOME": str(tools), "MMLM_VENV": "none", **settings},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def refusal(result: subprocess.CompletedProcess[str]) -> str:
    """The one line of an error; checks that there is one."""
    errors = [line for line in result.stderr.splitlines() if "ERROR" in line]
    assert result.returncode == 1
    assert len(errors) == 1
    return errors[0]


def test_help_names_every_setting(tools: Path) -> None:
    result = run(tools, "--help")
    assert result.returncode == 0
    for name in (
        *("GPUS", "GPUS_PER_NODE", "PER_DEVICE_BATCH_SIZE", "BATCH_SIZE", "TP", "PP"),
        *("OUTPUT_DIR", "FRESH", "DEMO", "DEMO_DIR", "VISION_MODEL", "LLM", "PROJECTOR", "LOAD"),
        *("META", "RECIPE", "PARTITION", "SRUN_ARGS", "MASTER_PORT", "--set"),
    ):
        assert name in result.stdout


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"GPUS": "three"}, "GPUS='three' must be a whole number of at least 1"),
        ({"GPUS": "0"}, "GPUS='0' must be a whole number"),
        ({"GPUS": "-4"}, "GPUS='-4' must be a whole number"),
        ({"GPUS": "6"}, "GPUS=6 is not a multiple of TP x PP = 2 x 2 = 4"),
        ({"TP": "3", "GPUS": "4"}, "GPUS=4 is not a multiple of TP x PP = 3 x 2 = 6"),
        ({"PP": "2.5"}, "PP='2.5' must be a whole number"),
        ({"BATCH_SIZE": "64 "}, "BATCH_SIZE='64 ' must be a whole number"),
        ({"PER_DEVICE_BATCH_SIZE": "x"}, "PER_DEVICE_BATCH_SIZE='x' must be a whole number"),
        ({"GPUS_PER_NODE": "few"}, "GPUS_PER_NODE='few' must be a whole number"),
        ({"FRESH": "yes"}, "FRESH='yes' must be 0 or 1"),
    ],
)
def test_unreasonable_value_is_one_line(tools: Path, settings: dict[str, str], text: str) -> None:
    assert text in refusal(run(tools, CUDA_VISIBLE_DEVICES="", **settings))


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--what"], "unknown word '--what'"),
        (["--set", "lr"], "--set 'lr' must read section.field=value"),
        (["--set"], "--set '' must read section.field=value"),
    ],
)
def test_unknown_word(tools: Path, words: list[str], text: str) -> None:
    assert text in refusal(run(tools, *words))


def eight_gpus(tools: Path) -> None:
    put(tools, "nvidia-smi", 'for k in 0 1 2 3 4 5 6 7; do echo "GPU $k: a GPU (UUID: x)"; done')


def test_gpus_want_weights(tools: Path, tmp_path: Path) -> None:
    eight_gpus(tools)
    load = str(tmp_path / "converted")
    assert "VISION_MODEL is not set" in refusal(run(tools, LOAD=load))
    assert "LLM is not set" in refusal(run(tools, LOAD=load, VISION_MODEL="x"))
    missing = run(tools, LOAD=load, VISION_MODEL="x", LLM="y")
    assert "VISION_MODEL: the folder 'x' does not exist" in refusal(missing)
    (tmp_path / "vit").mkdir()
    missing = run(tools, LOAD=load, VISION_MODEL=str(tmp_path / "vit"), LLM=str(tmp_path))
    assert "hermes_2_yi_34b.pth' does not exist" in refusal(missing)


def test_more_gpus_than_there_are(tools: Path) -> None:
    eight_gpus(tools)
    assert "this machine shows 8 GPUs" in refusal(run(tools, GPUS="16"))
    shown = run(tools, GPUS="8", CUDA_VISIBLE_DEVICES="0,1,2,3")
    assert "this machine shows 4 GPUs" in refusal(shown)
    assert "must be finetune or second_finetune" in refusal(run(tools, RECIPE="tiny_one"))


def converted(tmp_path: Path) -> dict[str, str]:
    """Settings of a run that has its converted checkpoint and its data."""
    (tmp_path / "load").mkdir(exist_ok=True)
    (tmp_path / "load/latest").write_text("iter_0000000\n", encoding="utf-8")
    (tmp_path / "meta.json").write_text("{}", encoding="utf-8")
    return {
        "LOAD": str(tmp_path / "load"),
        "META": str(tmp_path / "meta.json"),
        "OUTPUT_DIR": str(tmp_path / "out"),
    }


def test_one_machine_starts_one_process_a_gpu(tools: Path, tmp_path: Path) -> None:
    eight_gpus(tools)
    put(tools, "python", 'echo "python $*"')
    result = run(tools, "--set", "optimizer.lr=2e-5", BATCH_SIZE="256", **converted(tmp_path))
    assert result.returncode == 0, result.stderr
    command = next(line for line in result.stderr.splitlines() if "distributed.run" in line)
    assert "--standalone --nproc-per-node 8 -m mmlm train" in command
    assert "--recipe examples/internvl_v1_2/recipe.py:finetune" in command
    assert "--set parallel.tensor_model_parallel_size=4" in command
    assert "--set train.global_batch_size=256" in command
    assert "--set backend.device=cuda" in command
    assert command.endswith("--set optimizer.lr=2e-5")
    assert (tmp_path / "out/training_log.txt").read_text("utf-8").startswith("python")


def test_partition_calls_srun_with_whole_nodes(tools: Path, tmp_path: Path) -> None:
    put(tools, "srun", 'echo "srun $* GPUS=$GPUS TP=$TP"')
    settings = converted(tmp_path)
    result = run(tools, PARTITION="llm", GPUS="32", SRUN_ARGS="--quotatype=spot -x n1", **settings)
    assert result.returncode == 0, result.stderr
    (command,) = (line for line in result.stderr.splitlines() if line.startswith("srun"))
    assert "--nodes=4 --ntasks=4 --ntasks-per-node=1" in command
    assert "--gres=gpu:8 --partition=llm --quotatype=spot -x n1 bash" in command
    assert command.endswith("--phase=node GPUS=32 TP=4")
    uneven = run(tools, PARTITION="llm", GPUS="24", GPUS_PER_NODE="16", **settings)
    assert "GPUS=24 is not a multiple of GPUS_PER_NODE=16" in refusal(uneven)


def test_job_of_several_nodes_converts_on_one(tools: Path, tmp_path: Path) -> None:
    put(tools, "srun", 'echo "srun $*"')
    settings = converted(tmp_path)
    (tmp_path / "load/latest").unlink()
    (tmp_path / "vit/mlp_projector").mkdir(parents=True)
    (tmp_path / "vit/mlp_projector/hermes_2_yi_34b.pth").touch()
    settings |= {"VISION_MODEL": str(tmp_path / "vit"), "LLM": str(tmp_path)}
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "4"}
    result = run(tools, **job, **settings)
    assert result.returncode == 0, result.stderr
    first, second = (
        line for line in (result.stdout + result.stderr).splitlines() if line.startswith("srun")
    )
    assert "--nodes=1 " in first
    assert "--overlap" in first
    assert first.endswith("--phase=convert")
    assert "--nodes=4 " in second
    assert second.endswith("--phase=node")
    small = refusal(run(tools, GPUS="64", **job, **settings))
    assert "needs 8 nodes, the job has 4" in small


def test_node_joins_the_first_host(tools: Path, tmp_path: Path) -> None:
    put(tools, "scontrol", "printf 'node3\\nnode4\\n'")
    put(tools, "python", 'echo "python $*"')
    step = {"SLURM_JOB_NODELIST": "node[3-4]", "SLURM_NNODES": "2", "SLURM_NODEID": "1"}
    node = run(tools, "--phase=node", GPUS="16", GPUS_PER_NODE="8", **step, **converted(tmp_path))
    assert node.returncode == 0, node.stderr
    assert (
        "--nnodes 2 --node-rank 1 --nproc-per-node 8 "
        "--master-addr node3 --master-port 34229 -m mmlm train" in node.stdout
    )
    assert "torch.distributed.run --signals-to-handle SIGTERM,SIGHUP,SIGQUIT,SIGUSR1" in node.stdout


def test_slurm_script_hands_over(tools: Path, tmp_path: Path) -> None:
    put(tools, "srun", 'echo "srun $*"')
    settings = converted(tmp_path)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "8", "SLURM_SUBMIT_DIR": str(ROOT)}
    result = subprocess.run(
        ["bash", "examples/internvl_v1_2/slurm/pretrain.sbatch"],
        cwd=ROOT,
        env={"PATH": f"{tools}{os.pathsep}{os.defpath}", **job, **settings},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "--nodes=8 --ntasks=8" in result.stderr
    assert "--cpus-per-task=80" in result.stderr


def test_failure_of_the_training_is_the_script_s(tools: Path, tmp_path: Path) -> None:
    eight_gpus(tools)
    put(tools, "python", 'echo "error: no" >&2; exit 1')
    result = run(tools, **converted(tmp_path))
    assert result.returncode == 1
    assert "error: no" in result.stderr
    assert "checkpoints:" not in result.stderr  # what a finished run says
