"""Multiply-adds: written out for the published sizes, and counted by torch in the reference."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmlm.config.costs import ForwardCosts, forward_costs
from mmlm.config.presets import internvl_chat_v1_2, tiny
from tests.parity.tiny_reference import tiny_config, tiny_model
from tests.tiny_weights import tiny_llm_config


def test_published_sizes() -> None:
    """InternViT-6B on 448 pixels and Yi-34B, by hand.

    Vision: 1025 tokens through qkv, proj, fc1 and fc2; each also meets 1025 keys and 1025 values.
    Projection: 256 vectors from 12800 to 7168 and to 7168. Decoder: q and o of 56 heads of 128, k
    and v of 8, three matrices of the MLP. Causal attention: half of the pairs, scores and values.
    """
    weights = 3200 * 9600 + 3200 * 3200 + 2 * 3200 * 12800
    assert weights == 122_880_000
    assert forward_costs(internvl_chat_v1_2()) == ForwardCosts(
        vision_layer_per_image=1025 * 122_880_000 + 1025 * 2 * 1025 * 3200,
        projection_per_image=256 * (91_750_400 + 51_380_224),
        decoder_layer_per_token=2 * 51_380_224 + 2 * 7_340_032 + 3 * 146_800_640,
        decoder_layer_per_squared_token=7168.0,
        head_per_token=7168.0 * 64009,
    )


def test_a_token_meets_every_weight_once() -> None:
    """Layers, head, embedding and norms add up to the 34 388 917 248 weights of the file."""
    costs = forward_costs(internvl_chat_v1_2())
    norms = (2 * 60 + 1) * 7168
    added_tokens = 2 * 9 * 7168  # of embedding and head: 64009 rows where the file has 64000
    total = 60 * costs.decoder_layer_per_token + 2 * costs.head_per_token + norms
    assert total - added_tokens == 34_388_917_248


def count(work: torch.nn.Module, *inputs: object) -> int:
    """Multiply-adds that torch sees in matrix products and convolutions."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        work(*inputs)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("num_tokens", [1, 7, 64])
def test_decoder_as_torch_counts_it(num_tokens: int) -> None:
    """The reference computes the masked half of the scores too: twice the causal pairs."""
    model, costs = tiny(), forward_costs(tiny())
    config = tiny_config(llm_config=tiny_llm_config(model.language.vocab_size))
    decoder = tiny_model(**config).language_model
    found = count(decoder, torch.zeros(num_tokens, model.language.hidden_size))
    layers = 3 * (
        num_tokens * costs.decoder_layer_per_token
        + 2 * num_tokens**2 * costs.decoder_layer_per_squared_token
    )
    assert found == layers + num_tokens * costs.head_per_token


def test_tower_and_projection_as_torch_counts_them() -> None:
    costs, reference = forward_costs(tiny()), tiny_model()
    image = torch.zeros(3, 56, 56)
    patches = 16 * (3 * 14 * 14) * 40  # the patch embedding is left out of the costs
    assert count(reference.vision_model, image, 0) == patches + 3 * costs.vision_layer_per_image
    assert count(reference.mlp1, torch.zeros(4, 160)) == costs.projection_per_image
