"""``checkpoint.export_hf_interval``: a HuggingFace folder straight from a training, in any layout.

Every rank sends its blocks to rank 0, which writes one tensor after the other. The folder is the
one that ``megatron_to_hf.py`` makes of a checkpoint of the same iteration, to the byte.
"""

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import is_main_replica
from torch import Tensor

from mmlm.checkpoint.assets import write_assets
from mmlm.checkpoint.manifest import ASSETS_DIR, iteration_name
from mmlm.config.model import ModelConfig
from mmlm.conversion.dtypes import torch_name
from mmlm.conversion.export import write_small_files
from mmlm.conversion.hf_writer import (
    MAX_SHARD_BYTES,
    TensorSpec,
    atomic_folder,
    check_free_space,
    write_weights,
)
from mmlm.conversion.name_map import Entry, expand
from mmlm.errors import MmlmError
from mmlm.models.internvl_model import InternVLModel
from mmlm.models.model_provider import parameter_blocks
from mmlm.parallel.agreement import on_rank_zero
from mmlm.parallel.topology import Topology
from mmlm.train.gradients import gather_tensors

_ITERATION = re.compile(r"iter_\d{7,}")


def export_hf(
    root: Path,
    iteration: int,
    chunks: Sequence[InternVLModel],
    model: ModelConfig,
    assets: Mapping[str, bytes],
    topology: Topology,
    *,
    save_total_limit: int,
) -> Path:
    """Write the combined InternVL-Chat folder of the present weights; collective.

    The weights must be whole: call `gather_parameters` first. A folder of the same iteration is
    replaced when the new one is complete.

    Args:
        root: gets ``iter_XXXXXXX``.
        iteration: iterations done.
        chunks: this rank's model, not wrapped.
        model: sizes.
        assets: as in a checkpoint, file name -> content; used on rank 0.
        topology: this rank's place.
        save_total_limit: newest exports that stay; 0 for all.

    Returns:
        The folder.

    Raises:
        MmlmError: on every rank, if rank 0 cannot write; nothing is left under the final name.
    """
    target = root / iteration_name(iteration)
    entries = expand(model)
    dtype = next(chunks[0].parameters()).dtype
    specs = [
        TensorSpec(name=name, shape=shape, dtype=dtype)
        for entry in entries
        for name, shape in zip(entry.hf_names, entry.hf_shapes, strict=True)
    ]
    group = topology.control_group
    # before anything is sent
    on_rank_zero(lambda: check_free_space(root, sum(spec.num_bytes for spec in specs)), group)
    stream = _stream(entries, parameter_blocks(chunks, topology.groups), topology)
    failure: Exception | None = None
    if topology.rank == 0:
        try:
            with atomic_folder(target, overwrite=True) as folder, TemporaryDirectory() as small:
                write_weights(folder, specs, stream, MAX_SHARD_BYTES)
                write_assets(Path(small) / ASSETS_DIR, assets)
                write_small_files(folder, model, Path(small) / ASSETS_DIR, torch_name([dtype]))
        except (OSError, MmlmError) as error:
            failure = error
    for _ in stream:  # to the end, so that no rank waits for one that has failed
        pass

    def complete() -> Path:
        if failure is not None:
            raise failure
        _prune(root, save_total_limit)
        return target

    return on_rank_zero(complete, group)


def remove_leftovers(root: Path) -> None:
    """Delete what killed exports have left; for one rank, while no other run is here.

    Args:
        root: as for `export_hf`; it may be missing.
    """
    for each in root.glob(".iter_*.tmp"):
        shutil.rmtree(each, ignore_errors=True)


def _stream(
    entries: Sequence[Entry], shards: Sequence[ShardedTensor], topology: Topology
) -> Iterator[tuple[str, Tensor]]:
    """Bring one tensor after the other to rank 0, which yields it; the others yield nothing."""
    blocks: dict[str, list[ShardedTensor]] = {}
    for shard in shards:
        if is_main_replica(shard.replica_id):
            blocks.setdefault(shard.key, []).append(shard)
    for entry in entries:
        whole = gather_tensors(blocks.get(entry.megatron_name, []), topology.control_group)
        for tensor in whole.values():
            yield from zip(entry.hf_names, entry.rule.to_hf(tensor), strict=True)


def _prune(root: Path, save_total_limit: int) -> None:
    """Delete all but the newest exports."""
    done = [each for each in root.iterdir() if _ITERATION.fullmatch(each.name)]
    done.sort(key=lambda each: int(each.name.removeprefix("iter_")))
    for each in done[:-save_total_limit] if save_total_limit else ():
        shutil.rmtree(each)
