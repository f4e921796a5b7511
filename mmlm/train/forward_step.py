"""One microbatch through this stage's model, as megatron-core's schedules call it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.utils import get_attr_wrapped_model, get_model_config
from torch import Tensor

from mmlm.config.model import ModelConfig
from mmlm.data.collate import Batch
from mmlm.layers.drop_path import drop_path_scales
from mmlm.layers.packed_sequence import PackedSequence
from mmlm.layers.vision_layer import DropPathMode
from mmlm.models.internvl_model import ModelInputs
from mmlm.models.vision_model import pack_images
from mmlm.parallel.topology import Topology
from mmlm.train.loss import answer_spans, cross_entropies, vocab_parallel_argmax

ForwardStep = Callable[[Iterator[Batch], torch.nn.Module], tuple[Tensor, Callable[[Tensor], Any]]]
"""What megatron-core's schedules call: (microbatches, chunk) -> (output, loss function)."""


@dataclass(frozen=True, kw_only=True)
class DropPath:
    """What decides the drop path of an iteration, beside the images."""

    seed: int
    iteration: int
    max_rate: float
    """Rate of the last vision layer."""
    mode: DropPathMode = "skip"
    """Whether dropped branches are skipped or computed and masked."""


@dataclass(frozen=True, kw_only=True)
class SampleScore:
    """How one sample of an evaluation was predicted."""

    sample_id: int
    loss: float
    """Summed cross entropy of its supervised tokens."""
    num_tokens: int
    """Supervised tokens."""
    answers: tuple[bool, ...]
    """For each answer of the assistant, whether every token of it was the most likely one."""


def label_positions(batch: Batch) -> Tensor:
    """Positions that logits are computed for, int64 [k] on the CPU.

    They are the supervised ones; the first position (of weight 0) where there is none, so that no
    tensor is empty.
    """
    positions = batch.loss_mask.nonzero().flatten()
    return positions if positions.numel() else torch.zeros(1, dtype=torch.int64)


def make_inputs(
    batch: Batch,
    model: ModelConfig,
    topology: Topology,
    *,
    needs_pixels: bool,
    drop_path: DropPath | None = None,
    pad_images_to: int = 1,
) -> ModelInputs:
    """Move a microbatch to the device and describe its segments and images.

    Where pixels are needed it is collective over the TP ranks: the first one has decoded them.

    Args:
        batch: on the CPU.
        model: sizes.
        topology: this rank's place.
        needs_pixels: whether images enter the model on this stage.
        drop_path: None switches drop path off.
        pad_images_to: with sequence parallelism the TP size.
    """
    device = topology.device
    image_ids = tuple(batch.image_ids.tolist())
    scales = None
    if drop_path is not None and drop_path.max_rate > 0.0:
        scales = torch.from_numpy(
            drop_path_scales(
                seed=drop_path.seed,
                iteration=drop_path.iteration,
                image_ids=image_ids,
                num_layers=model.vision.num_layers,
                max_rate=drop_path.max_rate,
            )
        )
    return ModelInputs(
        input_ids=batch.input_ids.to(device, non_blocking=True),
        position_ids=batch.position_ids.to(device, non_blocking=True),
        segments=PackedSequence.from_lengths(batch.segment_lengths, device),
        pixel_values=share_pixels(batch, model, topology) if needs_pixels else None,
        images=pack_images(
            model.vision,
            image_ids,
            device,
            scales,
            pad_images_to,
            drop_path.mode if drop_path is not None else "skip",
        ),
        image_positions=batch.image_positions.to(device, non_blocking=True),
        label_positions=label_positions(batch).to(device, non_blocking=True),
    )


def share_pixels(batch: Batch, model: ModelConfig, topology: Topology) -> Tensor:
    """Give every TP rank the pixels that the first of them has decoded; collective over TP.

    Returns:
        float32 [n, 3, S, S] on the device.
    """
    size = model.vision.image_size
    if topology.tp_rank == 0:
        assert batch.pixel_values is not None, "the first TP rank of the first stage decodes"
        pixels = batch.pixel_values.to(topology.device, non_blocking=True)
    else:
        pixels = torch.empty(len(batch.image_ids), 3, size, size, device=topology.device)
    if topology.tp_size > 1 and pixels.numel():
        group = topology.groups.tp
        dist.broadcast(pixels, src=dist.get_global_rank(group, 0), group=group)
    return pixels


def training_forward_step(
    model: ModelConfig, topology: Topology, drop_path: DropPath
) -> ForwardStep:
    """Make the forward step of a training iteration.

    Returns:
        A function for megatron-core's schedule; its loss function returns the weighted loss (a
        plain sum over microbatches and DP ranks is the loss of the iteration), a token count that
        nothing divides by, and {"loss": the same, detached}.
    """

    def step(iterator: Iterator[Batch], chunk: torch.nn.Module) -> tuple[Tensor, Any]:
        batch = next(iterator)
        inputs = _inputs(batch, model, topology, chunk, drop_path)
        return chunk(inputs), partial(_loss, batch)

    return step


def evaluation_forward_step(model: ModelConfig, topology: Topology) -> ForwardStep:
    """Make the forward step of an evaluation: no drop path, and every answer is judged.

    An answer is right when the most likely token is the wanted one at each of its positions,
    ``<|im_end|>`` included. That is the same as greedy decoding giving exactly the wanted text.

    Returns:
        As `training_forward_step`, with {"samples": a `SampleScore` for each sample}.
    """

    def step(iterator: Iterator[Batch], chunk: torch.nn.Module) -> tuple[Tensor, Any]:
        batch = next(iterator)
        inputs = _inputs(batch, model, topology, chunk, None)
        return chunk(inputs), partial(_judge, batch, topology.groups.tp)

    return step


def _inputs(
    batch: Batch,
    model: ModelConfig,
    topology: Topology,
    chunk: torch.nn.Module,
    drop_path: DropPath | None,
) -> ModelInputs:
    config = get_model_config(chunk)
    return make_inputs(
        batch,
        model,
        topology,
        needs_pixels=get_attr_wrapped_model(chunk, "pre_process"),
        drop_path=drop_path,
        pad_images_to=topology.tp_size if config.sequence_parallel else 1,
    )


def _loss(batch: Batch, logits: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    where = label_positions(batch)
    losses = cross_entropies(logits, batch.labels[where].to(logits.device, non_blocking=True))
    weights = batch.loss_mask[where].to(logits.device, non_blocking=True)
    loss = (losses * weights).sum()
    return loss, torch.ones((), dtype=torch.int32), {"loss": loss.detach()}


def _judge(
    batch: Batch, group: dist.ProcessGroup, logits: Tensor
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    where = label_positions(batch)
    labels = batch.labels[where].to(logits.device)
    right = torch.zeros(len(batch.labels), dtype=torch.bool)
    right[where] = (vocab_parallel_argmax(logits, group) == labels).cpu()
    losses = torch.zeros(len(batch.labels))
    losses[where] = cross_entropies(logits, labels).cpu()
    answers = answer_spans((batch.loss_mask > 0).tolist(), batch.segment_lengths)
    # every sample has an answer and padding has none, so the judged segments are the samples
    judged = [spans for spans in answers if spans]
    samples = [
        SampleScore(
            sample_id=sample_id,
            loss=sum(float(losses[span].sum()) for span in spans),
            num_tokens=sum(span.stop - span.start for span in spans),
            answers=tuple(bool(right[span].all()) for span in spans),
        )
        for sample_id, spans in zip(batch.sample_ids, judged, strict=True)
    ]
    return losses.sum(), torch.ones((), dtype=torch.int32), {"samples": samples}
