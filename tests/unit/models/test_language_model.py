"""The decoder with a padded vocabulary against the reference, sample by sample."""

import dataclasses
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor

from mmlm.config.model import ModelConfig
from mmlm.config.presets import tiny
from mmlm.config.schema import BackendConfig, ParallelConfig, TrainConfig
from mmlm.layers.packed_sequence import PackedSequence
from mmlm.models.model_provider import build_model, fill_weights, model_state
from mmlm.parallel import topology
from mmlm.parallel.backend import resolve_backend
from mmlm.parallel.stage_plan import make_stage_plan
from mmlm.train.loss import cross_entropies
from tests.distributed.launch import run_ranks
from tests.parity.parallel_run import megatron_weights
from tests.parity.tiny_reference import VOCAB, tiny_model

LENGTHS = (7, 4, 7)
LABELLED = (0, 3, 6, 8, 10, 17)


def model() -> ModelConfig:
    """The tiny model with the reference's vocabulary of 50, padded to 64 or to 2 x 64."""
    language = dataclasses.replace(tiny().language, vocab_size=VOCAB)
    return dataclasses.replace(tiny(), language=language)


def make_stream() -> tuple[Tensor, Tensor]:
    """Ids of three samples, and the wanted token at each labelled position."""
    generator = torch.Generator().manual_seed(11)
    ids = torch.randint(0, VOCAB, (sum(LENGTHS),), generator=generator)
    return ids, torch.randint(0, VOCAB, (len(LABELLED),), generator=generator)


def plain(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logits, cross entropies and two gradients with nothing packed or parallel."""
    reference = tiny_model()
    reference.load_state_dict(weights)
    language = reference.language_model
    ids, labels = make_stream()
    table = language.model.embed_tokens
    logits = torch.cat([language(table(sample)) for sample in ids.split(LENGTHS)])[list(LABELLED)]
    losses = logits.logsumexp(dim=1) - logits[torch.arange(len(labels)), labels]
    losses.sum().backward()
    return {
        "logits": logits.detach(),
        "losses": losses.detach(),
        "embedding": table.weight.grad,
        "head": language.lm_head.weight.grad,
    }


def _parallel(tp_size: int, weights: dict[str, Tensor]) -> dict[str, Any]:
    place = topology.initialize(ParallelConfig(tensor_model_parallel_size=tp_size))
    sizes = model()
    (chunk,) = build_model(
        sizes,
        make_stage_plan(sizes, 1),
        place,
        resolve_backend(BackendConfig()),
        TrainConfig(dtype="fp32"),
    )
    source = megatron_weights(sizes, weights)
    fill_weights([chunk], place.groups, lambda name, shape: source[name])
    language = chunk.language_model
    ids, labels = make_stream()
    logits = language(
        torch.zeros(1, 1, 48),
        input_ids=ids,
        position_ids=torch.cat([torch.arange(length) for length in LENGTHS]),
        image_positions=torch.empty(0, dtype=torch.int64),
        label_positions=torch.tensor(LABELLED),
        segments=PackedSequence.from_lengths(LENGTHS, torch.device("cpu")),
    )
    kept = logits.detach()[:, 0].clone()
    losses = cross_entropies(logits, labels)
    losses.sum().backward()
    name = "language_model.output_layer.weight"
    return {
        "logits": kept,
        "losses": losses.detach(),
        "embedding": language.embedding.word_embeddings.weight.grad,
        "head": language.output_layer.weight.grad,
        "on disk": [
            block.global_shape
            for block in model_state([chunk], place.groups, "")[name].build()
            if isinstance(block, ShardedTensor)
        ],
    }


@pytest.mark.distributed
@pytest.mark.parametrize("tp_size", [1, 2])
def test_padding_of_the_vocabulary_changes_nothing(tp_size: int) -> None:
    """At TP 2 the second rank has padding alone: 50 tokens, 64 rows a rank."""
    weights = {name: tensor.detach() for name, tensor in tiny_model().state_dict().items()}
    expected = plain(weights)
    ranks = run_ranks(tp_size, _parallel, tp_size, weights)
    for name, dim in (("logits", 1), ("embedding", 0), ("head", 0)):
        whole = torch.cat([rank[name] for rank in ranks], dim=dim)
        true, padding = whole.split([VOCAB, 64 * tp_size - VOCAB], dim=dim)
        assert (padding == (float("-inf") if name == "logits" else 0.0)).all()
        torch.testing.assert_close(true, expected[name], rtol=0, atol=2e-5)  # measured 2e-6
    for rank in ranks:
        torch.testing.assert_close(rank["losses"], expected["losses"], rtol=0, atol=1e-5)  # 1e-6
    assert [rank["on disk"] for rank in ranks] == [[(VOCAB, 48)], []][:tp_size]
