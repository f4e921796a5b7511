"""Megatron's tensors made out of HuggingFace's, under the keys of a checkpoint."""

from collections.abc import Callable

import torch
from torch import Tensor

from mmlm.checkpoint.metadata import TensorInfo
from mmlm.checkpoint.row_stream import RowSource
from mmlm.conversion.block_reader import BlockReader
from mmlm.conversion.dtypes import DTYPES
from mmlm.conversion.finite import FiniteCheck
from mmlm.conversion.hf_source import HFTensors
from mmlm.conversion.name_map import MODEL_PREFIX, Entry
from mmlm.conversion.vocabulary import VocabularyPlan
from mmlm.errors import CheckpointError


class EntryReader:
    """Makes the Megatron tensor of a key out of HuggingFace's, when it is asked for.

    Args:
        source: the files.
        entries: every tensor of the model.
        plan: what becomes of the vocabulary.
        dtype: of all tensors; None keeps each as it is.
        seed: of new embedding rows.
        strict: refuse NaN and infinity instead of a warning.
    """

    def __init__(
        self,
        source: HFTensors,
        entries: tuple[Entry, ...],
        plan: VocabularyPlan,
        dtype: torch.dtype | None,
        seed: int,
        *,
        strict: bool = False,
    ) -> None:
        self._source, self._entries, self._plan, self._seed = source, entries, plan, seed
        self._shapes = {
            MODEL_PREFIX + entry.megatron_name: entry.megatron_shape for entry in entries
        }
        self.dtypes = {
            MODEL_PREFIX + entry.megatron_name: dtype or _common_dtype(source, entry)
            for entry in entries
        }
        """Key -> element type in the checkpoint."""
        self.check = FiniteCheck(strict=strict)
        """Has looked at everything that was read."""
        self._blocks = self.fresh_blocks()

    @property
    def num_bytes(self) -> int:
        """Size of all tensors in the checkpoint."""
        return sum(
            torch.Size(shape).numel() * self.dtypes[key].itemsize
            for key, shape in self._shapes.items()
        )

    def fresh_blocks(self) -> BlockReader:
        """A reader of single blocks of the same tensors, under global names."""
        dtypes = {key.removeprefix(MODEL_PREFIX): dtype for key, dtype in self.dtypes.items()}
        return BlockReader(self._source, self._entries, dtypes, self._plan, self._seed, self.check)

    @property
    def infos(self) -> dict[str, TensorInfo]:
        """Key -> shape and element type in the checkpoint."""
        return {
            key: TensorInfo(shape=shape, dtype=self.dtypes[key])
            for key, shape in self._shapes.items()
        }

    def counted(self, on_bytes: Callable[[int], object]) -> RowSource:
        """The function that `write_streamed` takes rows from.

        Args:
            on_bytes: called with the size of every block that was made.
        """

        def read_rows(key: str, start: int, stop: int) -> Tensor:
            block = self.read_rows(key, start, stop)
            on_bytes(block.nbytes)
            return block

        return read_rows

    def read(self, key: str) -> Tensor:
        """The tensor of a key, in the announced shape and dtype."""
        return self.read_rows(key, 0, self._shapes[key][0])

    def read_rows(self, key: str, start: int, stop: int) -> Tensor:
        """Rows ``start:stop`` of the tensor of a key."""
        columns = (slice(0, size) for size in self._shapes[key][1:])
        return self._blocks.read(key.removeprefix(MODEL_PREFIX), (slice(start, stop), *columns))


def _common_dtype(source: HFTensors, entry: Entry) -> torch.dtype:
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
