"""One microbatch through this stage's model, as megatron-core's schedules call it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmlm.config.schema import ModelConfig
from mmlm.data.collate import Batch
from mmlm.layers.packed_sequence import PackedSequence
from mmlm.models.internvl_model import ModelInputs
from mmlm.models.vision_model import pack_images
from mmlm.parallel.topology import Topology
from mmlm.train.loss import answer_spans, cross_entropies, vocab_parallel_argmax


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


def make_inputs(
    batch: Batch, model: ModelConfig, device: torch.device, *, seed: int, iteration: int | None
) -> ModelInputs:
    """Move a microbatch to the device and describe its segments and images.

    Args:
        batch: on the CPU.
        model: sizes.
        device: where the model is.
        seed: of drop path.
        iteration: of drop path; None switches it off.

    Returns:
        The inputs; at least one position has logits, so that no tensor is empty.
    """
    positions = batch.loss_mask.nonzero().flatten()
    if positions.numel() == 0:
        positions = torch.zeros(1, dtype=torch.int64)
    moved = batch.to(device)
    return ModelInputs(
        input_ids=moved.input_ids,
        position_ids=moved.position_ids,
        segments=PackedSequence.from_lengths(batch.segment_lengths, device),
        pixel_values=moved.pixel_values,
        images=pack_images(
            model.vision,
            tuple(batch.image_ids.tolist()),
            seed=seed,
            iteration=iteration,
            device=device,
        ),
        image_positions=moved.image_positions,
        label_positions=positions.to(device),
    )


def training_forward_step(
    model: ModelConfig, device: torch.device, *, seed: int, iteration: int
) -> Callable[..., tuple[Tensor, Callable[[Tensor], Any]]]:
    """Make the forward step of a training iteration.

    Returns:
        A function for megatron-core's schedule; its loss function returns the weighted loss (a
        plain sum over microbatches and DP ranks is the loss of the iteration), a token count that
        nothing divides by, and {"loss": the same, detached}.
    """

    def step(iterator: Iterator[Batch], chunk: torch.nn.Module) -> tuple[Tensor, Any]:
        batch = next(iterator)
        inputs = make_inputs(batch, model, device, seed=seed, iteration=iteration)
        return chunk(inputs), partial(_loss, batch, inputs.label_positions)

    return step


def evaluation_forward_step(
    model: ModelConfig, topology: Topology
) -> Callable[..., tuple[Tensor, Callable[[Tensor], Any]]]:
    """Make the forward step of an evaluation: no drop path, and every answer is judged.

    An answer is right when the most likely token is the wanted one at each of its positions,
    ``<|im_end|>`` included. That is the same as greedy decoding giving exactly the wanted text.

    Returns:
        As `training_forward_step`, with {"samples": a `SampleScore` for each sample}.
    """

    def step(iterator: Iterator[Batch], chunk: torch.nn.Module) -> tuple[Tensor, Any]:
        batch = next(iterator)
        inputs = make_inputs(batch, model, topology.device, seed=0, iteration=None)
        judge = partial(_judge, batch, inputs.label_positions, topology.groups.tp)
        return chunk(inputs), judge

    return step


def _loss(
    batch: Batch, positions: Tensor, logits: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    where = positions.cpu()
    labels = batch.labels[where].to(logits.device)
    losses = cross_entropies(logits, labels)
    loss = (losses * batch.loss_mask[where].to(logits.device)).sum()
    return loss, torch.ones((), dtype=torch.int32), {"loss": loss.detach()}


def _judge(
    batch: Batch, positions: Tensor, group: Any, logits: Tensor
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    where = positions.cpu()
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
    loss = losses.sum()
    return loss, torch.ones((), dtype=torch.int32), {"samples": samples}
