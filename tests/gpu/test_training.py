"""The command on one GPU against the command on the CPU: same weights, same data, same curve.

Skipped, with the reason, where there is no GPU or a backend's package is missing.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmlm.conversion.convert import hf_to_megatron
from mmlm.parallel.backend import optional_packages
from tests.tiny_data import make_playground, make_tokenizer
from tests.tiny_weights import tiny_llm_config, tiny_vision_config, write_parts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

RECIPE = """
from mmlm.config.schema import *

def run():
    return RunConfig(
        data=DataConfig(meta={meta!r}, seq_length=128, num_workers=0),
        train=TrainConfig(global_batch_size=8, train_iters=6, vision_drop_path_rate=0.3),
        optimizer=OptimizerConfig(lr=1e-3, adam_eps=1e-6),
        checkpoint=CheckpointConfig(load={load!r}, save_interval=3),
    )
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights (head size 16 everywhere, which the fast kernels want), data and a recipe."""
    folder = tmp_path_factory.mktemp("world")
    make_tokenizer(folder / "llm")
    vision = tiny_vision_config(hidden_size=80, intermediate_size=160)
    language = tiny_llm_config(448, hidden_size=64)
    write_parts(folder, vision, language)
    hf_to_megatron(vision=folder / "vision", llm=folder / "llm", output=folder / "start")
    meta = make_playground(folder / "playground", 40)
    text = RECIPE.format(meta=str(meta), load=str(folder / "start"))
    (folder / "recipe.py").write_text(text)
    return folder


def losses(world: Path, output: Path, *settings: str, on_cpu: bool = False) -> list[float]:
    """Train in a process of its own and read the curve."""
    command = [sys.executable, "-m", "mmlm", "train", "--recipe", f"{world / 'recipe.py'}:run"]
    for setting in (f"output_dir={output}", *settings):
        command += ["--set", setting]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if on_cpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.fixture(scope="module")
def truth(world: Path) -> list[float]:
    """The curve on the CPU in fp32."""
    return losses(world, world / "cpu", "train.dtype=fp32", on_cpu=True)


def test_fp32_is_the_curve_of_the_cpu(world: Path, truth: list[float], tmp_path: Path) -> None:
    assert losses(world, tmp_path, "train.dtype=fp32") == pytest.approx(truth, rel=1e-4)


@pytest.mark.parametrize("impl", ["local", "transformer_engine"])
@pytest.mark.parametrize("attention", ["sdpa", "flash", "transformer_engine"])
def test_bf16_is_close(
    world: Path, truth: list[float], tmp_path: Path, impl: str, attention: str
) -> None:
    packages = {"flash": "flash_attn", "transformer_engine": "transformer_engine"}
    for package in {packages.get(impl), packages.get(attention)} - {None}:
        version = optional_packages()[package]
        if version.startswith(("not installed", "broken")):
            pytest.skip(f"{package} is {version}")
    settings = (f"backend.transformer_impl={impl}", f"backend.attention_backend={attention}")
    found = losses(world, tmp_path, "train.dtype=bf16", *settings)
    assert found == pytest.approx(truth, rel=2e-2)


def test_run_saved_on_the_gpu_continues_on_the_cpu(
    world: Path, truth: list[float], tmp_path: Path
) -> None:
    losses(world, tmp_path, "train.dtype=fp32", "train.train_iters=6")
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / "latest").write_text("iter_0000003\n")
    curve = losses(world, tmp_path, "train.dtype=fp32", on_cpu=True)
    assert curve == pytest.approx(truth, rel=1e-4)
