"""Losses and activations of each sample, recorded while megatron-core's schedule runs.

Nothing of the model is changed: forward hooks look at what the vision tower, the projection and the
decoder return on whichever stage they are, before the schedule or the loss overwrites it.

Legend: k images of a sample, m supervised tokens of a sample, h tower width, H decoder width.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor

from mmlm.config.model import ModelConfig
from mmlm.data.collate import Batch
from mmlm.data.sample import MAX_IMAGES_PER_SAMPLE
from mmlm.layers.sequence_region import leave_sequence_region
from mmlm.models.internvl_model import InternVLModel
from mmlm.parallel.stage_plan import StageChunk
from mmlm.parallel.topology import Topology
from mmlm.train.forward_step import ForwardStep, label_positions
from mmlm.train.loss import cross_entropies


@dataclass(frozen=True, kw_only=True)
class SampleLoss:
    """The loss of one sample."""

    sample_id: int
    mean: float
    """Mean cross entropy of its supervised tokens, without any loss weight."""
    num_tokens: int
    """Supervised tokens."""


class StepRecord:
    """A forward step that is watched; use as a context manager around the schedule.

    All TP ranks of a stage must watch alike, because shards are put together where they are made.

    Args:
        step: the forward step.
        chunks: this rank's model, not wrapped.
        stages: what each of the chunks holds.
        model: sizes.
        topology: this rank's place.
        activations: record inputs and activations as well; memory for all of them is needed on the
            CPU of the first TP rank of each stage.

    Attributes:
        losses: sample id -> loss; on the first TP rank of the last stage only.
        tensors: ``sample/<sample id>/<name>`` -> tensor on the CPU, on the first TP rank of the
            stage that makes it. The names, fp32 where nothing is said: ``pixel_values``
            [k, 3, S, S], ``vision_output`` [k, class token and patches, h], ``image_embeddings``
            [k, embeddings, H], ``input_ids`` int64 [tokens], ``label_positions`` and ``labels``
            int64 [m], ``logits`` [m, vocabulary]. A sample without images lacks the first three.
    """

    def __init__(
        self,
        step: ForwardStep,
        chunks: Sequence[InternVLModel],
        stages: Sequence[StageChunk],
        model: ModelConfig,
        topology: Topology,
        *,
        activations: bool,
    ) -> None:
        self._step = step
        self._chunks = list(zip(chunks, stages, strict=True))
        self._model = model
        self._topology = topology
        self._activations = activations
        self._batch: Batch | None = None
        self._hooks = ExitStack()
        self.losses: dict[int, SampleLoss] = {}
        self.tensors: dict[str, Tensor] = {}

    def __enter__(self) -> "StepRecord":
        if self._activations:
            for chunk, stage in self._chunks:
                if self._model.vision.num_layers - 1 in stage.vision_layers:
                    self._watch(chunk.vision_model, self._keep_vision_output)
                if stage.has_projection:
                    self._watch(chunk.vision_projection, self._keep_image_embeddings)
                if stage.has_output:
                    self._watch(chunk.language_model, self._keep_logits)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._hooks.close()

    def __call__(self, iterator: Iterator[Batch], chunk: torch.nn.Module) -> tuple[Tensor, Any]:
        """Run one microbatch through a chunk, as megatron-core's schedules call it."""
        batch = self._batch = next(iterator)
        if self._activations and get_attr_wrapped_model(chunk, "pre_process"):
            self._keep_pixels()
        output, loss_function = self._step(iter([batch]), chunk)

        def recorded(logits: Tensor) -> Any:
            self._keep_losses(batch, logits)
            return loss_function(logits)

        return output, recorded

    def _watch(self, module: Any, keep: Any) -> None:
        handle = module.register_forward_hook(
            lambda module, inputs, output: keep(module, output.detach())
        )
        self._hooks.callback(handle.remove)

    @torch.no_grad()
    def _keep_losses(self, batch: Batch, logits: Tensor) -> None:
        where = label_positions(batch)
        losses = torch.zeros(len(batch.labels))
        # the loss overwrites its logits, and it comes after this
        losses[where] = cross_entropies(
            logits.detach().clone(), batch.labels[where].to(logits.device)
        ).cpu()
        if self._topology.tp_rank:
            return
        for sample_id, place in _samples(batch):
            supervised = batch.loss_mask[place] > 0
            self.losses[sample_id] = SampleLoss(
                sample_id=sample_id,
                mean=float(losses[place][supervised].mean()),
                num_tokens=int(supervised.sum()),
            )

    def _keep_pixels(self) -> None:
        assert self._batch is not None
        if self._topology.tp_rank == 0 and self._batch.pixel_values is not None:
            self._keep_images("pixel_values", self._batch.pixel_values)

    def _keep_vision_output(self, module: Any, stream: Tensor) -> None:
        stream = leave_sequence_region(stream, module.config, module.groups)
        self._keep_image_rows("vision_output", stream, self._model.vision.tokens_per_image)

    def _keep_image_embeddings(self, module: Any, rows: Tensor) -> None:
        self._keep_image_rows("image_embeddings", rows, self._model.vision.embeddings_per_image)

    def _keep_image_rows(self, name: str, rows: Tensor, rows_per_image: int) -> None:
        """What follows the images (padding, the inert stream where there are none) is left out."""
        assert self._batch is not None
        count = len(self._batch.image_ids)
        rows = rows[: count * rows_per_image]
        self._keep_images(name, rows.reshape(count, rows_per_image, rows.shape[-1]))

    def _keep_images(self, name: str, per_image: Tensor) -> None:
        assert self._batch is not None
        # a sample that is in the batch twice has the same images twice: either will do
        rows = dict(zip(self._batch.image_ids.tolist(), per_image, strict=True))
        for sample_id, images in groupby(sorted(rows), lambda each: each // MAX_IMAGES_PER_SAMPLE):
            self._keep(sample_id, name, torch.stack([rows[image] for image in images]))

    def _keep_logits(self, module: Any, logits: Tensor) -> None:
        batch = self._batch
        assert batch is not None
        group = self._topology.groups.tp
        shards = [torch.empty_like(logits) for _ in range(group.size())]
        dist.all_gather(shards, logits.contiguous(), group=group)
        vocab_size = self._model.language.vocab_size
        whole = torch.cat(shards, dim=-1).squeeze(1)[:, :vocab_size]
        where = label_positions(batch)
        for sample_id, place in _samples(batch):
            mine = (where >= place.start) & (where < place.stop)
            self._keep(sample_id, "input_ids", batch.input_ids[place], torch.int64)
            positions = where[mine] - place.start
            self._keep(sample_id, "label_positions", positions, torch.int64)
            self._keep(sample_id, "labels", batch.labels[where[mine]], torch.int64)
            self._keep(sample_id, "logits", whole[mine.to(whole.device)])

    def _keep(
        self, sample_id: int, name: str, value: Tensor, dtype: torch.dtype = torch.float32
    ) -> None:
        if self._topology.tp_rank == 0:
            self.tensors[f"sample/{sample_id}/{name}"] = value.to("cpu", dtype)


def _samples(batch: Batch) -> list[tuple[int, slice]]:
    """Each sample of a microbatch and where it is in the stream."""
    places = [slice(*ends) for ends in pairwise([0, *accumulate(batch.segment_lengths)])]
    # every sample has a supervised token and padding has none
    samples = [place for place in places if bool((batch.loss_mask[place] > 0).any())]
    return list(zip(batch.sample_ids, samples, strict=True))
