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
from mmlm.errors import MmlmError
from mmlm.parallel import topology
from tests.distributed.launch import run_ranks


def state(data: torch.Tensor) -> dict[str, Any]:
    """One tensor that the ranks hold halves of."""
    place = (0, dist.get_rank(), dist.get_world_size())
    return {"model": {"weight": ShardedTensor.from_rank_offsets("model.weight", data, place)}}


def _save(root: str, iteration: int, assets: dict[str, bytes], keep: int) -> str:
    place = topology.initialize(ParallelConfig(tensor_model_parallel_size=2))
    manifest = Manifest(
        iteration=iteration,
        consumed_samples=0,
        dtype="fp32",
        model=tiny(),
        run_config=None,
        has_optimizer=True,
    )
    data = torch.full((2, 3), float(10 * iteration + dist.get_rank()))
    try:
        path = save_checkpoint(
            Path(root),
            state(data),
            manifest,
            assets=assets,
            save_total_limit=keep,
            control_group=place.control_group if iteration % 2 else None,
        )
    except MmlmError as error:
        return str(error)
    assert path == resolve(Path(root))
    loaded = load_sharded(state(torch.zeros(2, 3)), path)
    assert torch.equal(loaded["model"]["weight"], data)
    return path.name


@pytest.mark.distributed
def test_failure_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    root, assets = tmp_path / "checkpoints", {"tokenizer.model": b"pieces"}
    for iteration in (1, 2, 3):
        expected = f"iter_{iteration:07d}"
        assert run_ranks(2, _save, str(root), iteration, assets, 2) == [expected] * 2
    assert sorted(path.name for path in root.glob("iter_*")) == ["iter_0000002", "iter_0000003"]
    assert (root / "iter_0000003" / ASSETS_DIR / "tokenizer.model").read_text() == "pieces"

    unwritable = {**assets, "no/such/folder": b""}
    for message in run_ranks(2, _save, str(root), 4, unwritable, 2):
        assert message.startswith(str(root))
        assert message.endswith(f"{ASSETS_DIR}/no/such/folder: No such file or directory")
    assert resolve(root).name == "iter_0000003"
    # the next attempt is not disturbed by what the failed one left
    assert run_ranks(2, _save, str(root), 4, assets, 2) == ["iter_0000004"] * 2


@pytest.mark.distributed
def test_without_assets_there_is_no_folder_for_them(tmp_path: Path) -> None:
    run_ranks(2, _save, str(tmp_path), 1, {}, 0)
    assert not (resolve(tmp_path) / ASSETS_DIR).exists()


def _save_on_two_disks(root: str) -> str:
    topology.initialize(ParallelConfig(tensor_model_parallel_size=2))
    manifest = Manifest(
        iteration=2,
        consumed_samples=0,
        dtype="fp32",
        model=tiny(),
        run_config=None,
        has_optimizer=True,
    )
    own = Path(root) if dist.get_rank() == 0 else Path(root + "_of_node_1")
    data = torch.zeros(2, 3)
    try:
        save_checkpoint(own, state(data), manifest, assets={}, save_total_limit=1)
    except MmlmError as error:
        return str(error)
    return "saved"


@pytest.mark.distributed
def test_without_a_shared_file_system_nothing_is_published_or_pruned(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    run_ranks(2, _save, str(root), 1, {}, 1)
    found = run_ranks(2, _save_on_two_disks, str(root))
    assert found[0] == found[1]
    assert "__1_0.distcp: missing (by rank 1)" in found[0]
    assert "Every rank must write to one shared file system" in found[0]
    assert resolve(root).name == "iter_0000001"
    assert [each.name for each in root.glob("*iter_*")] == ["iter_0000001"]
