"""Weights and exports of ``mmlm train`` on the command line."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mmlm import cli
from mmlm.config.schema import CheckpointConfig

RECIPE = """
from mmlm.config.schema import CheckpointConfig, DataConfig, RunConfig

def run():
    return RunConfig(
        data=DataConfig(meta={meta!r}),
        checkpoint=CheckpointConfig(load="named", save_total_limit=5),
    )
"""


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[CheckpointConfig]:
    """What reaches the training."""
    from mmlm.parallel import topology
    from mmlm.train import trainer

    found: list[CheckpointConfig] = []
    monkeypatch.setattr(topology, "initialize", lambda parallel: SimpleNamespace(rank=0))
    monkeypatch.setattr(topology, "destroy", lambda: None)
    monkeypatch.setattr(trainer, "train", lambda config, *rest: found.append(config.checkpoint))
    return found


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], {"load": "named"}),
        (["--load-hf", "hf"], {"load_hf": "hf"}),
        (["--export-hf-every", "50"], {"load": "named", "export_hf_interval": 50}),
        (
            ["--load-hf", "hf", "--export-hf-every", "7", "--set", "checkpoint.save_interval=3"],
            {"load_hf": "hf", "export_hf_interval": 7, "save_interval": 3},
        ),
    ],
)
def test_flags_take_the_place_of_settings(
    seen: list[CheckpointConfig], tmp_path: Path, words: list[str], expected: dict[str, Any]
) -> None:
    (tmp_path / "meta.json").write_text("{}")
    recipe = tmp_path / "recipe.py"
    recipe.write_text(RECIPE.format(meta=str(tmp_path / "meta.json")))
    assert cli.main(["train", "--recipe", f"{recipe}:run", *words]) == 0
    assert seen == [CheckpointConfig(**{"save_total_limit": 5, **expected})]


def test_an_interval_below_nothing_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.py"
    recipe.write_text(RECIPE.format(meta=""))
    assert cli.main(["train", "--recipe", f"{recipe}:run", "--export-hf-every", "-1"]) == 1
    assert "export_hf_interval -1 must be at least 0" in capsys.readouterr().err
