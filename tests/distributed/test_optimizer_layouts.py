"""One checkpoint with optimizer state, resumed at layouts up to TP 8: same curve, same moments."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from mmlm.checkpoint.manifest import resolve
from mmlm.checkpoint.tensor_reader import TensorReader
from mmlm.conversion.convert import hf_to_megatron
from tests.distributed.launch import run_ranks
from tests.distributed.test_trainer import assert_same_curve, config, curve, train_rank
from tests.tiny_data import make_playground, make_tokenizer
from tests.tiny_weights import tiny_llm_config, tiny_vision_config, write_parts

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As in test_trainer, with eight heads and groups in the decoder; the ViT keeps its five."""
    folder = tmp_path_factory.mktemp("world")
    make_tokenizer(folder / "hf" / "llm")
    llm = tiny_llm_config(448, num_attention_heads=8, num_key_value_heads=8)
    write_parts(folder / "hf", tiny_vision_config(), llm)
    hf_to_megatron(
        vision=folder / "hf" / "vision", llm=folder / "hf" / "llm", output=folder / "start"
    )
    make_playground(folder / "playground", 24)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(world: Path) -> Path:
    """Four iterations at TP 2 x DP 2, saved after the third and at the end."""
    output = world / "uninterrupted"
    run_ranks(4, train_rank, config(world, output, tp=2, train_iters=4))
    return output


@pytest.mark.parametrize(
    ("layout", "num_ranks"),
    [
        ({"tp": 8}, 8),  # three ranks hold no head of the ViT
        ({"tp": 4, "pp": 2}, 8),
        ({"pp": 3}, 3),
        ({"pp": 2, "vpp": 2}, 2),
    ],
    ids=str,
)
def test_every_layout_reads_the_same_state(
    world: Path, uninterrupted: Path, tmp_path: Path, layout: dict[str, Any], num_ranks: int
) -> None:
    middle = "iter_0000003"
    shutil.copytree(uninterrupted / "checkpoints" / middle, tmp_path / "checkpoints" / middle)
    (tmp_path / "checkpoints" / "latest").write_text(middle)
    run_ranks(num_ranks, train_rank, config(world, tmp_path, train_iters=4, **layout))
    assert_same_curve(curve(tmp_path), curve(uninterrupted)[3:])
    truth = TensorReader(resolve(uninterrupted / "checkpoints"))
    found = TensorReader(resolve(tmp_path / "checkpoints"))
    assert found.infos == truth.infos, "names, true shapes and types do not depend on the layout"
    assert sum(key.startswith("optimizer.state.exp_avg_sq.") for key in found.infos) == 70
    for key in truth.infos:
        value, wanted = found.read(key).double(), truth.read(key).double()
        assert (value - wanted).norm() <= 1e-5 * wanted.norm() + 1e-12, key
