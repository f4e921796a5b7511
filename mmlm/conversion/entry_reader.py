"""Megatron's tensors made out of HuggingFace's, one at a time."""

from collections.abc import Callable

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor

from mmlm.checkpoint.storage import TensorSource
from mmlm.conversion.dtypes import DTYPES, cast
from mmlm.conversion.hf_source import HFSource
from mmlm.conversion.name_map import MODEL_PREFIX, Entry
from mmlm.conversion.vocabulary import (
    EMBEDDING,
    HEAD,
    VocabularyPlan,
    grow_embedding,
    grow_head,
)
from mmlm.errors import CheckpointError


class EntryReader:
    """Makes the Megatron tensor of a key out of HuggingFace's, when it is asked for."""

    def __init__(
        self,
        source: HFSource,
        entries: tuple[Entry, ...],
        plan: VocabularyPlan,
        dtype: torch.dtype | None,
        seed: int,
    ) -> None:
        self._source, self._plan, self._seed = source, plan, seed
        self._entries = {MODEL_PREFIX + entry.megatron_name: entry for entry in entries}
        self.dtypes = {
            key: dtype or _common_dtype(source, entry) for key, entry in self._entries.items()
        }
        """Key -> element type in the checkpoint."""

    @property
    def num_bytes(self) -> int:
        """Size of all tensors in the checkpoint."""
        return sum(
            torch.Size(entry.megatron_shape).numel() * self.dtypes[key].itemsize
            for key, entry in self._entries.items()
        )

    def announced(self) -> dict[str, ShardedTensor]:
        """Shapes and dtypes without data, for `save_sharded`."""
        return {
            key: ShardedTensor.from_rank_offsets(
                key, torch.empty(entry.megatron_shape, dtype=self.dtypes[key], device="meta")
            )
            for key, entry in self._entries.items()
        }

    def counted(self, on_bytes: Callable[[int], object]) -> TensorSource:
        """The function that `save_sharded` takes tensors from.

        Args:
            on_bytes: called with the size of every tensor that was made.
        """

        def read(key: str) -> Tensor:
            tensor = self.read(key)
            on_bytes(tensor.nbytes)
            return tensor

        return read

    def read(self, key: str) -> Tensor:
        """The tensor of a key, in the announced shape and dtype."""
        entry = self._entries[key]
        dtype = self.dtypes[key]
        tensors = [cast(self._source.read(name), dtype, name) for name in entry.hf_names]
        tensor = entry.rule.to_megatron(tensors)
        if entry.megatron_name == EMBEDDING:
            return grow_embedding(tensor, self._plan, self._seed)
        if entry.megatron_name == HEAD:
            return grow_head(tensor, self._plan)
        return tensor


def _common_dtype(source: HFSource, entry: Entry) -> torch.dtype:
    dtypes = [source.dtype(name) for name in entry.hf_names]
    unknown = [dtype for dtype in dtypes if dtype not in DTYPES.values()]
    if unknown:
        raise CheckpointError(
            f"{source.file(entry.hf_names[0])}: tensor '{entry.hf_names[0]}' is {unknown[0]}; "
            "supported are bf16, fp16 and fp32 (--dtype converts others)"
        )
    common = dtypes[0]
    for dtype in dtypes[1:]:
        common = torch.promote_types(common, dtype)
    return common
