"""The file of ``mmlm debug gradients``: what is in it, and writing it tensor by tensor.

Every rank takes part, because tensors come from wherever they are; rank 0 holds one at a time.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from safetensors import safe_open
from torch import Tensor

from mmlm.config.model import ModelConfig
from mmlm.conversion.hf_writer import TensorSpec, check_free_space, write_safetensors
from mmlm.conversion.name_map import Entry, expand
from mmlm.data.step_plan import SampleTable
from mmlm.errors import ConfigError, MmlmError
from mmlm.parallel.agreement import on_rank_zero
from mmlm.parallel.collect import bring_to_rank_zero
from mmlm.parallel.topology import Topology
from mmlm.train.gradients import gather_tensors

GRADIENT_PREFIX = "gradient/"
"""Before the HuggingFace name of a parameter."""

GRAD_NORM = "grad_norm"
"""Norm of all gradients together, before any clipping."""


def check_output(path: Path, *, overwrite: bool) -> None:
    """Refuse, before anything is computed, a file that cannot be written.

    Raises:
        ConfigError: if the file exists and may not be replaced, or its folder cannot be written.
    """
    if path.is_dir():
        raise ConfigError(f"--output {path}: is a folder; name a file in it")
    if path.exists() and not overwrite:
        raise ConfigError(f"--output {path}: exists already; give another name or --overwrite")
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        temporary.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"--output {path}: {error.strerror}") from error


def batch_specs(num_samples: int) -> list[TensorSpec]:
    """The losses of a global batch; samples are in its order."""
    count = (num_samples,)
    return [
        TensorSpec(name="loss", shape=(), dtype=torch.float64),
        TensorSpec(name="sample_ids", shape=count, dtype=torch.int64),
        TensorSpec(name="sample_num_tokens", shape=count, dtype=torch.int64),
        TensorSpec(name="sample_losses", shape=count, dtype=torch.float32),
    ]


def sample_specs(sample_id: int, table: SampleTable, model: ModelConfig) -> list[TensorSpec]:
    """Inputs and activations of one sample; see `mmlm.train.step_record.StepRecord`."""
    vision, language = model.vision, model.language
    images = int(table.num_images[sample_id])
    tokens = int(table.num_tokens[sample_id])
    supervised = int(table.num_supervised_tokens[sample_id])
    numbers = {"input_ids": (tokens,), "label_positions": (supervised,), "labels": (supervised,)}
    values: dict[str, tuple[int, ...]] = {"logits": (supervised, language.vocab_size)}
    if images:
        values |= {
            "pixel_values": (images, 3, vision.image_size, vision.image_size),
            "vision_output": (images, vision.tokens_per_image, vision.hidden_size),
            "image_embeddings": (images, vision.embeddings_per_image, language.hidden_size),
        }
    return [
        TensorSpec(name=f"sample/{sample_id}/{name}", shape=shape, dtype=dtype)
        for dtype, shapes in ((torch.int64, numbers), (torch.float32, values))
        for name, shape in shapes.items()
    ]


@dataclass(frozen=True, kw_only=True)
class GradientFile:
    """What is written: the same on every rank, and in every layout."""

    path: Path
    """Where."""
    model: ModelConfig
    """Sizes."""
    trained_parts: frozenset[str]
    """Parts that have gradients."""
    tensors: Sequence[TensorSpec]
    """Everything but the gradients and their norm."""
    metadata: Mapping[str, Any]
    """Settings that decide the numbers; each value becomes JSON."""

    @property
    def entries(self) -> list[Entry]:
        """Parameters that have a gradient, in the order of the forward pass."""
        return [entry for entry in expand(self.model) if entry.part in self.trained_parts]

    def write(
        self,
        local_tensors: Mapping[str, Tensor],
        local_gradients: Sequence[ShardedTensor],
        topology: Topology,
    ) -> None:
        """Write under a temporary name and rename when complete; collective.

        Args:
            local_tensors: on the CPU by name; each of `tensors` is on one rank at least.
            local_gradients: this rank's blocks; together the ranks hold every element once.
            topology: this rank's place.

        Raises:
            MmlmError: on every rank, if rank 0 cannot write.
        """
        # readers map the file into memory and want wide elements before narrow ones
        first = sorted(self.tensors, key=lambda spec: -spec.dtype.itemsize)
        stream = self._stream(first, local_tensors, local_gradients, topology)
        failure: Exception | None = None
        if topology.rank == 0:
            try:
                self._write(first, stream)
            except (OSError, MmlmError) as error:
                failure = error
        for _ in stream:  # to the end, so that no rank waits for one that has failed
            pass

        def report() -> None:
            if failure is not None:
                raise failure

        on_rank_zero(report, topology.control_group)

    def _write(self, first: Sequence[TensorSpec], stream: Iterator[tuple[str, Tensor]]) -> None:
        gradients = [
            TensorSpec(name=GRADIENT_PREFIX + name, shape=shape, dtype=torch.float32)
            for entry in self.entries
            for name, shape in zip(entry.hf_names, entry.hf_shapes, strict=True)
        ]
        specs = [*first, *gradients, TensorSpec(name=GRAD_NORM, shape=(), dtype=torch.float32)]
        metadata = {name: json.dumps(value) for name, value in self.metadata.items()}
        temporary = _temporary(self.path)
        try:
            check_free_space(self.path.parent, sum(spec.num_bytes for spec in specs))
            write_safetensors(temporary, specs, stream, {"format": "pt", **metadata})
            temporary.replace(self.path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def _stream(
        self,
        first: Sequence[TensorSpec],
        local_tensors: Mapping[str, Tensor],
        local_gradients: Sequence[ShardedTensor],
        topology: Topology,
    ) -> Iterator[tuple[str, Tensor]]:
        """Bring one tensor after the other to rank 0, which yields it; the others yield nothing."""
        group = topology.control_group
        for spec in first:
            yield from _from_owner(spec.name, local_tensors.get(spec.name), group)
        blocks: dict[str, list[ShardedTensor]] = {}
        for shard in local_gradients:
            blocks.setdefault(shard.key, []).append(shard)
        square = 0.0
        for entry in self.entries:
            whole = gather_tensors(blocks.get(entry.megatron_name, []), group)
            for gradient in whole.values():
                square += float(gradient.double().square().sum())
                for name, part in zip(entry.hf_names, entry.rule.to_hf(gradient), strict=True):
                    yield GRADIENT_PREFIX + name, part
        if topology.rank == 0:
            yield GRAD_NORM, torch.tensor(math.sqrt(square), dtype=torch.float32)


def describe(path: Path) -> str:
    """One line about a file that was written."""
    with safe_open(path, "pt") as file:
        loss, norm = file.get_tensor("loss").item(), file.get_tensor(GRAD_NORM).item()
        samples = len(file.get_tensor("sample_ids"))
        gradients = sum(name.startswith(GRADIENT_PREFIX) for name in file.keys())  # noqa: SIM118
    return (
        f"loss {loss:.6f}, gradient norm {norm:.6f}: {gradients} gradients of {samples} samples "
        f"in {path}"
    )


def _from_owner(
    name: str, local: Tensor | None, group: dist.ProcessGroup
) -> Iterator[tuple[str, Tensor]]:
    """A tensor that one rank or several have alike; yielded on rank 0 only."""
    mine = [] if local is None else [(name, local)]
    owned = list(bring_to_rank_zero(mine, group))
    if dist.get_rank() == 0:
        yield owned[0]


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")
