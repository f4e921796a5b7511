"""The example that embeds a layer runs as the README says."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def test_example_runs() -> None:
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    }
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "examples/embed_vision_layer.py"],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "TP 1 x PP 1 x DP 1 = 1 processes: (34, 1, 40) -> (34, 1, 40)" in result.stdout
    assert "5 head slots for 5 heads" in result.stdout
