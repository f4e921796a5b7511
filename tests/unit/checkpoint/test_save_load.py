"""A checkpoint is published whole; a failure on one rank is an error on all, and harms nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor

from mmlm.checkpoint.manifest import ASSETS_DIR, Manifest, resolve
from mmlm.checkpoint.save_load import save_checkpoint
from mmlm.checkpoint.storage import load_sharded
from mmlm.config.presets import tiny
from mmlm.config.schema import ParallelConfig
from mmlm.errors import CheckpointError
from mmlm.parallel import topology
from tests.distributed.launch import run_ranks


def state(data: torch.Tensor) -> dict[str, Any]:
    """One tensor that the ranks hold halves of."""
    place = (0, dist.get_rank(), dist.get_world_size())
    return {"model": {"weight": ShardedTensor.from_rank_offsets("model.weight", data, place)}}


def _save(root: str, iteration: int, assets: str | None, keep: int) -> str:
    topology.initialize(ParallelConfig(tensor_model_parallel_size=2))
    manifest = Manifest(
        iteration=iteration,
        consumed_samples=0,
        dtype="fp32",
        model=tiny(),
        run_config=None,
        has_optimizer=True,
    )
    data = torch.full((2, 3), float(10 * iteration + dist.get_rank()))
    folder = None if assets is None else Path(assets)
    try:
        path = save_checkpoint(Path(root), state(data), manifest, assets=folder, keep=keep)
    except CheckpointError as error:
        return str(error)
    assert path == resolve(Path(root))
    loaded = load_sharded(state(torch.zeros(2, 3)), path)
    assert torch.equal(loaded["model"]["weight"], data)
    return path.name


@pytest.mark.distributed
def test_failure_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    root, assets = tmp_path / "checkpoints", tmp_path / "assets"
    assets.mkdir()
    (assets / "tokenizer.model").write_text("pieces")
    for iteration in (1, 2, 3):
        expected = f"iter_{iteration:07d}"
        assert run_ranks(2, _save, str(root), iteration, str(assets), 2) == [expected] * 2
    assert sorted(path.name for path in root.glob("iter_*")) == ["iter_0000002", "iter_0000003"]
    assert (root / "iter_0000003" / ASSETS_DIR / "tokenizer.model").read_text() == "pieces"

    for message in run_ranks(2, _save, str(root), 4, str(tmp_path / "gone"), 2):
        assert message.startswith(f"{root}: the checkpoint could not be completed: ")
    assert resolve(root).name == "iter_0000003"
    # the next attempt is not disturbed by what the failed one left
    assert run_ranks(2, _save, str(root), 4, str(assets), 2) == ["iter_0000004"] * 2
