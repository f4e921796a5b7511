"""This rank's part of a save: planned by all ranks together, copied if asked, written by anybody.

The files are those of megatron-core's `torch_dist` format and any megatron-core reads them. Only
the writing differs. megatron-core forks processes for it, starts a spawned manager to collect their
results (seconds a rank, an orphan after a kill, a hang without psutil) and holds every tensor until
the last is written. Here one thread of this process writes one tensor after the other, with pwrite
and SHA-256, which both let the training go on beside it; and nobody needs to be told when the
process is killed.
"""

import hashlib
import io
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.core import CONFIG_FNAME
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.checkpoint.utils import _DistWrapper

from mmlm.checkpoint.integrity import WrittenFile
from mmlm.checkpoint.row_stream import BLOCK_BYTES, write_at
from mmlm.checkpoint.streamed import CONFIG
from mmlm.checkpoint.torch_files import Frame, frame_of
from mmlm.errors import CheckpointError
from mmlm.parallel.agreement import on_rank_zero


@dataclass(frozen=True, kw_only=True)
class _Item:
    """One block of this rank, in the order of the file."""

    index: MetadataIndex
    data: Tensor | bytes


class ShardWriter:
    """What this rank writes of a checkpoint.

    Made by `plan_shards`. `write` is called once, in any thread; then `finish` on all ranks.
    """

    def __init__(
        self,
        directory: Path,
        file_name: str,
        items: list[_Item],
        metadata: Metadata | None,
        common: Mapping[str, Any],
    ) -> None:
        self._directory, self._file_name = directory, file_name
        self._items, self._metadata, self._common = items, metadata, common
        self._results: list[WriteResult] = []
        self._written: dict[str, WrittenFile] = {}
        self._failure: str | None = None

    @property
    def num_bytes(self) -> int:
        """Of this rank's blocks."""
        sizes = (
            len(item.data) if isinstance(item.data, bytes) else item.data.nbytes
            for item in self._items
        )
        return sum(sizes)

    def write(self) -> None:
        """Write the file of this rank; what goes wrong is told by `finish`."""
        try:
            if self._items:
                self._write_file()
        except Exception as error:
            self._failure = one_line(error)
        finally:
            self._items = []  # the copies are not needed any more

    def _write_file(self) -> None:
        file = _HashedFile(self._directory / self._file_name)
        try:
            for item in self._items:
                start = file.end
                if isinstance(item.data, bytes):
                    file.write(item.data)
                else:
                    file.write_tensor(item.data)
                place = _StorageInfo(self._file_name, start, file.end - start)
                self._results.append(WriteResult(item.index, place.length, place))
            file.sync()
        finally:
            file.close()
        self._written[self._file_name] = WrittenFile(
            bytes=file.end, sha256=file.checksum, rank=dist.get_rank()
        )

    def finish(self, group: dist.ProcessGroup | None = None) -> dict[str, WrittenFile]:
        """Collect what all ranks have written and write what says so; collective.

        Args:
            group: all ranks, for small messages.

        Returns:
            On rank 0: file name -> size and SHA-256 of the files of all ranks.

        Raises:
            CheckpointError: on all ranks, when writing failed on any of them.
        """
        own = (self._failure, self._results, self._written)
        gathered: list[Any] | None = [None] * dist.get_world_size() if _is_rank_zero() else None
        dist.gather_object(own, gathered, dst=0, group=group)
        written: dict[str, WrittenFile] = {}

        def complete() -> None:
            assert gathered is not None
            failures = [
                f"rank {rank}: {failure}"
                for rank, (failure, _, _) in enumerate(gathered)
                if failure is not None
            ]
            if failures:
                raise _unwritten(self._directory, ", ".join(failures))
            try:
                self._write_rest([results for _, results, _ in gathered])
            except (OSError, RuntimeError) as error:  # torch.save gives a full disk as the latter
                raise _unwritten(self._directory, f"rank 0: {one_line(error)}") from error
            for _, _, of_rank in gathered:
                written.update(of_rank)

        on_rank_zero(complete, group)
        return written

    def _write_rest(self, results: list[list[WriteResult]]) -> None:
        torch.save(dict(self._common), self._directory / "common.pt")
        assert self._metadata is not None, "rank 0 has it"
        dcp.FileSystemWriter(self._directory).finish(self._metadata, results)
        # last: without it megatron-core takes the directory for no checkpoint
        (self._directory / CONFIG_FNAME).write_text(json.dumps(CONFIG), encoding="utf-8")


def plan_shards(
    sharded_state_dict: Mapping[str, Any],
    directory: Path,
    *,
    copies: Callable[[str], bool] | None = None,
    group: dist.ProcessGroup | None = None,
) -> ShardWriter:
    """Decide what every rank writes; collective.

    Args:
        sharded_state_dict: as for `megatron.core.dist_checkpointing.save`.
        directory: a new or empty directory on a file system that all ranks share.
        copies: which keys are copied to host memory, because their tensors change before they are
            written; None for no key: `ShardWriter.write` follows at once.
        group: all ranks, for small messages.

    Returns:
        The work of this rank.

    Raises:
        CheckpointError: on all ranks, when the directory cannot be made.
    """

    def make() -> None:
        directory.mkdir(parents=True, exist_ok=True)

    on_rank_zero(make, group)
    sharded, common = save_preprocess(dict(sharded_state_dict))
    by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, True)
    planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    plan, metadata = _agree(mcore_to_pyt_state_dict(by_key, False), directory, planner, group)
    return ShardWriter(
        directory, f"{plan.storage_data.prefix}0.distcp", _items(plan, planner, copies), metadata,
        common,
    )  # fmt: skip


def _agree(
    state: dict[str, Any],
    directory: Path,
    planner: MCoreSavePlanner,
    group: dist.ProcessGroup | None,
) -> tuple[SavePlan, Metadata | None]:
    """The plan of this rank and, on rank 0, the metadata of the whole; collective."""
    ranks = _DistWrapper(group, True, 0)
    writer = dcp.FileSystemWriter(directory)
    metadata: Metadata | None = None

    def local() -> SavePlan:
        planner.set_up_planner(state, writer.storage_meta(), ranks.is_coordinator)
        writer.set_up_storage_writer(ranks.is_coordinator)
        return writer.prepare_local_plan(planner.create_local_plan())

    def whole(plans: list[SavePlan]) -> list[SavePlan]:
        nonlocal metadata
        plans, metadata = planner.create_global_plan(plans)
        return writer.prepare_global_plan(plans)

    plan: SavePlan = ranks.reduce_scatter("plan", local, whole)
    return planner.finish_plan(plan), metadata


def _items(
    plan: SavePlan, planner: MCoreSavePlanner, copies: Callable[[str], bool] | None
) -> list[_Item]:
    """The blocks of a plan, detached; those that are to be copied are when this returns."""
    items, on_device = [], False
    for planned in plan.items:
        data = planner.resolve_data(planned)
        if isinstance(data, io.BytesIO):
            items.append(_Item(index=planned.index, data=data.getvalue()))
            continue
        data = data.detach()
        if copies is not None and copies(planned.index.fqn):
            on_device |= data.is_cuda
            data = _copy(data)
        items.append(_Item(index=planned.index, data=data))
    if on_device:
        torch.cuda.synchronize()
    return items


def _copy(data: Tensor) -> Tensor:
    """A copy in host memory; from a GPU into pinned memory, complete after a synchronisation."""
    if not data.is_cuda:
        return data.clone(memory_format=torch.contiguous_format)
    copy = torch.empty(data.shape, dtype=data.dtype, pin_memory=True)
    return copy.copy_(data, non_blocking=True)


class _HashedFile:
    """A file written from its beginning to its end, and the checksum of what was written."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        self._digest = hashlib.sha256()
        self._frames: dict[tuple[torch.Size, torch.dtype], Frame] = {}
        self.end = 0
        """Bytes written so far."""

    def write(self, content: memoryview | bytes) -> None:
        """Append some bytes."""
        view = memoryview(content)
        for start in range(0, len(view), BLOCK_BYTES):
            block = view[start : start + BLOCK_BYTES]
            write_at(self._descriptor, block, self.end)
            self._digest.update(block)
            self.end += len(block)

    def write_tensor(self, tensor: Tensor) -> None:
        """Append what torch.save would, but for checksums in the archive, which nobody reads."""
        kind = (tensor.shape, tensor.dtype)
        if kind not in self._frames:
            self._frames[kind] = frame_of(torch.empty(tensor.shape, dtype=tensor.dtype))
        frame, elements = self._frames[kind], tensor.to("cpu").contiguous()
        start, (hole,) = self.end, frame.offsets
        raw = elements.view(-1).view(torch.uint8).numpy().data if elements.numel() else b""
        for at, piece in frame.pieces:
            if raw and self.end == start + hole:
                self.write(raw)
            assert self.end == start + at, "the pieces and the elements follow each other"
            self.write(piece)

    def sync(self) -> None:
        """Wait until everything is on the disk."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """End the file."""
        os.close(self._descriptor)

    @property
    def checksum(self) -> str:
        """SHA-256 in hexadecimal digits of what was written."""
        return self._digest.hexdigest()


def one_line(error: BaseException) -> str:
    """The class of an error and the first line of its text."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def _unwritten(directory: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{directory}: the checkpoint could not be written: {reason}")


def _is_rank_zero() -> bool:
    return dist.get_rank() == 0
