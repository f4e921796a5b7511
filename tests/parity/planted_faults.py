"""Faults that public trainers of this model family have had, as changes of the running code.

Each function replaces one small thing through pytest's monkeypatch; the ranks, which are forked
afterwards, inherit it.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from mmlm.layers import qk_norm, sequence_region
from mmlm.layers.packed_sequence import PackedSequence
from mmlm.layers.vision_attention import PaddedHeadsSelfAttention
from mmlm.layers.vision_layer import InternVisionLayer
from mmlm.models import language_model, model_provider
from mmlm.models.language_model import LanguageModel
from mmlm.models.vision_projection import VisionProjection
from mmlm.train import forward_step, optimizer
from tests.parity import parallel_run

Patch = pytest.MonkeyPatch
Inputs = dict[str, Any]
NORMS = ("layernorm.weight",)
LAYER_SCALES = ("attention_scale", "mlp_scale")
BIASES = ("linear_proj.bias", "linear_fc2.bias")
EMBEDDINGS_PER_IMAGE = 4


def qk_statistic_without_backward_sum(patch: Patch) -> None:
    """The sum of squares is reduced, but its gradient stays with the rank (plain all-reduce)."""
    patch.setattr(qk_norm, "copy_to_tensor_model_parallel_region", lambda x, group: x)


def qk_statistic_without_gradient(patch: Patch) -> None:
    """The sums of squares are collected by an operation that autograd does not see."""

    def collect(x: Tensor, group: Any) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(group.size())]
        dist.all_gather(parts, x.detach().contiguous(), group=group)
        return torch.stack(parts).sum(dim=0)

    patch.setattr(qk_norm, "reduce_from_tensor_model_parallel_region", collect)
    qk_statistic_without_backward_sum(patch)


def qk_mean_over_the_padded_width(patch: Patch) -> None:
    """The sum of squares is divided by the width of all slots, padding included."""
    real = qk_norm.FullWidthQKNorm.forward

    def forward(self: Any, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        true_width, self.true_width = self.true_width, self.head_size * self.partition.num_slots
        result = real(self, query, key)
        self.true_width = true_width
        return result

    patch.setattr(qk_norm.FullWidthQKNorm, "forward", forward)


def padding_heads_are_not_zero(patch: Patch) -> None:
    """Padding heads start with values, so they answer, get gradients and count."""
    real = parallel_run.fill_weights

    def fill(chunks: Any, *args: Any) -> None:
        real(chunks, *args)
        for chunk in chunks:
            for module in chunk.modules():
                if isinstance(module, PaddedHeadsSelfAttention):
                    heads = len(module.partition.heads(module.tp_group.rank()))
                    size = module.hidden_size_per_attention_head
                    module.linear_qkv.weight.data[3 * size * heads :] = 0.1
                    module.linear_proj.weight.data[:, size * heads :] = 0.1

    patch.setattr(parallel_run, "fill_weights", fill)


def k_normalised_with_q_weight(patch: Patch) -> None:
    """Both are multiplied by q's weight."""
    real = qk_norm.FullWidthQKNorm.forward

    def forward(self: Any, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        own = self._parameters["k_weight"]
        self._parameters["k_weight"] = self.q_weight
        result = real(self, query, key)
        self._parameters["k_weight"] = own
        return result

    patch.setattr(qk_norm.FullWidthQKNorm, "forward", forward)


def drop_path_per_token(patch: Patch) -> None:
    """Every token is dropped on its own, at the same rate."""

    def per_token(self: Any, images: Any, scales: list[float], device: torch.device) -> Tensor:
        generator = torch.Generator().manual_seed(self.layer_number)
        keep = 1.0 / max(images.drop_path_scales[self.layer_number - 1].max().item(), 1.0)
        shape = (sum(images.segment_lengths), 1, 1)
        return (torch.rand(shape, generator=generator) < keep) / keep

    patch.setattr(InternVisionLayer, "_per_token", per_token)


def drop_path_of_the_local_layer(patch: Patch) -> None:
    """A later stage counts its layers from 0 again; the first stage holds two."""
    real = InternVisionLayer._add_branch

    def add_branch(self: Any, *args: Any) -> Tensor:
        offset = 2 * parallel_state.get_pipeline_model_parallel_rank()
        self.layer_number -= offset
        result = real(self, *args)
        self.layer_number += offset
        return result

    patch.setattr(InternVisionLayer, "_add_branch", add_branch)


class _ScatterThatDivides(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.chunk(group.size())[group.rank()].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        parts = [torch.empty_like(grad) for _ in range(ctx.group.size())]
        dist.all_gather(parts, grad.contiguous(), group=ctx.group)
        return torch.cat(parts) / ctx.group.size(), None


def gradients_divided_where_tokens_are_shared_out(patch: Patch) -> None:
    """What is before a sequence-parallel region gets its gradient times 1 / TP."""
    patch.setattr(
        sequence_region,
        "scatter_to_sequence_parallel_region",
        lambda x, group: _ScatterThatDivides.apply(x, group),
    )


def gradients_summed_where_tokens_are_collected(patch: Patch) -> None:
    """A reduce-scatter behind the tower: its gradients come out times TP."""
    patch.setattr(
        sequence_region,
        "gather_from_sequence_parallel_region",
        lambda x, tensor_parallel_output_grad, group: gather_from_sequence_parallel_region(
            x, tensor_parallel_output_grad=True, group=group
        ),
    )


def marked(**marks: Any) -> Callable[..., Callable[[Patch], None]]:
    """Make faults that give parameters whose names end so a wrong mark."""

    def of_names(*endings: str) -> Callable[[Patch], None]:
        def plant(patch: Patch) -> None:
            real = parallel_run.wrap_ddp

            def wrap(chunks: Any, *args: Any) -> Any:
                for chunk in chunks:
                    for name, parameter in chunk.named_parameters():
                        if name.endswith(endings):
                            for mark, value in marks.items():
                                setattr(parameter, mark, value)
                return real(chunks, *args)

            patch.setattr(parallel_run, "wrap_ddp", wrap)

        return plant

    return of_names


def _change_decoder_inputs(patch: Patch, change: Callable[[Inputs], Inputs]) -> None:
    real = LanguageModel.forward

    def forward(self: Any, hidden_states: Tensor, **inputs: Any) -> Tensor:
        return real(self, hidden_states, **change(inputs))

    patch.setattr(LanguageModel, "forward", forward)


def _one_segment(inputs: Inputs) -> Inputs:
    ids = inputs["input_ids"]
    return {**inputs, "segments": PackedSequence.from_lengths((len(ids),), ids.device)}


def samples_run_together(patch: Patch) -> None:
    """Attention crosses from one sample of a row to the next."""
    _change_decoder_inputs(patch, _one_segment)


def samples_run_together_from_the_third_stage(patch: Patch) -> None:
    """Only the first two stages know where the samples begin."""

    def change(inputs: Inputs) -> Inputs:
        third = parallel_state.get_pipeline_model_parallel_rank() >= 2
        return _one_segment(inputs) if third else inputs

    _change_decoder_inputs(patch, change)


def images_run_together(patch: Patch) -> None:
    """The images of a microbatch attend to each other."""
    real = forward_step.pack_images

    def pack_images(*args: Any, **settings: Any) -> Any:
        images = real(*args, **settings)
        length = sum(images.segment_lengths)
        return replace(images, segment_lengths=(length,))

    patch.setattr(forward_step, "pack_images", pack_images)


def padded_vocabulary_takes_part(patch: Patch) -> None:
    """Rows beyond the true vocabulary get logits, so gradients too."""
    patch.setattr(LanguageModel, "_hide_padding", lambda self, logits: logits)


def shards_left_out_of_the_norm(patch: Patch) -> None:
    """Unmarked, the weights of every TP rank but the first do not count."""
    patch.setattr(model_provider, "_mark_sharded_weights", lambda chunk: None)


def norm_of_the_own_stage(patch: Patch) -> None:
    """Every rank clips by the norm of what its TP group holds."""
    patch.setattr(
        DistributedOptimizer,
        "get_grad_stats_parallel_group",
        lambda self: parallel_state.get_tensor_model_parallel_group(),
    )


def first_rate_above_zero(patch: Patch) -> None:
    """The schedule is one iteration ahead."""
    real = parallel_run.make_scheduler

    def make_scheduler(*args: Any) -> Any:
        scheduler = real(*args)
        scheduler.step(increment=1)
        return scheduler

    patch.setattr(parallel_run, "make_scheduler", make_scheduler)


def biases_do_not_decay(patch: Patch) -> None:
    """The habit of most trainers, but not what the published run did."""
    patch.setattr(optimizer, "decays", lambda rule, name, dims: not name.endswith("bias"))


def loss_divided_by_each_rank(patch: Patch) -> None:
    """Each DP rank takes the mean over its own labels; then the ranks are averaged."""
    real = parallel_run.rank_batches

    def rank_batches(*args: Any) -> Any:
        batches = real(*args)
        own = sum(float(batch.loss_mask.sum()) for batch in batches)
        num_ranks = parallel_state.get_data_parallel_world_size()
        return [replace(b, loss_mask=b.loss_mask / (own * num_ranks)) for b in batches]

    patch.setattr(parallel_run, "rank_batches", rank_batches)


def gradients_averaged_by_the_framework(patch: Patch) -> None:
    """megatron-core's default: over the microbatches in the loss, over the DP ranks in DDP."""
    real = parallel_run.wrap_ddp

    def wrap(chunks: Any, *args: Any) -> Any:
        for chunk in chunks:
            chunk.config.calculate_per_token_loss = False
        return real(chunks, *args)

    patch.setattr(parallel_run, "wrap_ddp", wrap)


def _merge_with(patch: Patch, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
    real = language_model.merge_image_embeddings
    patch.setattr(
        language_model,
        "merge_image_embeddings",
        lambda text, images, positions: real(text, *change(images, positions)),
    )


def images_of_the_next_sample(patch: Patch) -> None:
    """Every picture goes where the one before it belongs."""

    def change(images: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return images.roll(-EMBEDDINGS_PER_IMAGE, 0), positions

    _merge_with(patch, change)


def images_one_token_early(patch: Patch) -> None:
    """The embeddings start at ``<img>``, one place before the first context token."""
    _merge_with(patch, lambda images, positions: (images, positions - 1))


def class_token_kept(patch: Patch) -> None:
    """Every grid begins with the class token and lacks its last patch."""
    real = VisionProjection._features
    patch.setattr(
        VisionProjection, "_features", lambda self, stream, n: real(self, stream.roll(1, 0), n)
    )
