"""What ``mmlm debug gradients`` must write, by plain PyTorch, one unpacked sample at a time."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mmlm.data.dataset import Dataset
from tests.parity.reference_model import ReferenceInternVL
from tests.parity.reference_training import ReferenceSample, iteration_loss, token_losses


@dataclass(frozen=True, kw_only=True)
class FileReference:
    """The reference and the data that it reads."""

    model: ReferenceInternVL
    dataset: Dataset
    seed: int
    """Of the run; only augmented sets depend on it."""

    @property
    def context(self) -> int:
        return self.dataset.tokenizer.img_context_id

    def sample(self, sample_id: int) -> ReferenceSample:
        sample = self.dataset.sample(sample_id, seed=self.seed, epoch=0, with_pixels=True)
        return ReferenceSample(
            input_ids=torch.from_numpy(sample.input_ids),
            labels=torch.from_numpy(sample.labels),
            pixel_values=torch.from_numpy(sample.pixel_values),
            image_ids=torch.from_numpy(sample.image_ids),
        )

    def expected(
        self, sample_ids: list[int], weight: str, drop_path: Callable[..., float] | None = None
    ) -> dict[str, Tensor]:
        """Losses and gradients of a global batch."""
        samples = [self.sample(sample_id) for sample_id in sample_ids]
        self.model.zero_grad(set_to_none=True)
        loss = iteration_loss(
            self.model, samples, weight, img_context_token_id=self.context, drop_path=drop_path
        )
        loss.backward()
        gradients = {
            f"gradient/{name}": torch.zeros_like(parameter)
            if parameter.grad is None
            else parameter.grad
            for name, parameter in self.model.named_parameters()
        }
        norm = torch.stack([each.double().square().sum() for each in gradients.values()]).sum()
        with torch.no_grad():
            losses = [token_losses(self.model, each, self.context, drop_path) for each in samples]
        return {
            "loss": loss.detach(),
            "sample_ids": torch.tensor(sample_ids),
            "sample_num_tokens": torch.tensor([len(each) for each in losses]),
            "sample_losses": torch.stack([each.mean() for each in losses]),
            "grad_norm": norm.sqrt(),
            **gradients,
        }

    @torch.no_grad()
    def activations(self, sample_id: int) -> dict[str, Tensor]:
        """Inputs and activations of a sample."""
        sample = self.sample(sample_id)
        where = (sample.labels != -100).nonzero().flatten()
        logits = self.model(sample.input_ids, sample.pixel_values, sample.image_ids, self.context)
        found = {
            "input_ids": sample.input_ids,
            "label_positions": where,
            "labels": sample.labels[where],
            "logits": logits[where],
        }
        if len(sample.image_ids):
            images = list(zip(sample.pixel_values, sample.image_ids.tolist(), strict=True))
            found |= {
                "pixel_values": sample.pixel_values,
                "vision_output": torch.stack([self.model.vision_model(*image) for image in images]),
                "image_embeddings": torch.stack(
                    [self.model.embed_image(*image) for image in images]
                ),
            }
        return {f"sample/{sample_id}/{name}": tensor for name, tensor in found.items()}
