"""The reference itself, by hand: each part, the whole, and what it must not do."""

from __future__ import annotations

import cmath
import math
from typing import cast

import pytest
import torch
from torch import Tensor

from tests.parity.reference_layers import RMSNorm, attend
from tests.parity.reference_llama import LlamaAttention, rotate
from tests.parity.reference_vision import (
    ATTENTION_BRANCH,
    MLP_BRANCH,
    VisionAttention,
    VisionLayer,
    VisionMLP,
    drop_path_rate,
    pixel_shuffle,
    shuffled_patches,
)
from tests.parity.tiny_reference import CONTEXT, VOCAB, tiny_input, tiny_model
from tests.tiny_weights import (
    random_tensors,
    tiny_llm_config,
    tiny_vision_config,
    vision_shapes,
)

# ------------------------------------------------------------------------------ names


def test_names_are_those_of_the_combined_folder() -> None:
    names = set(tiny_model().state_dict())
    expected = {
        "vision_model.embeddings.class_embedding",
        "vision_model.embeddings.position_embedding",
        "vision_model.embeddings.patch_embedding.weight",
        "vision_model.embeddings.patch_embedding.bias",
        "language_model.model.embed_tokens.weight",
        "language_model.model.norm.weight",
        "language_model.lm_head.weight",
    }
    expected |= {f"mlp1.{i}.{kind}" for i in (0, 1, 3) for kind in ("weight", "bias")}
    vision = "attn.qkv.weight attn.q_norm.weight attn.k_norm.weight attn.proj.weight "
    vision += "attn.proj.bias norm1.weight norm2.weight mlp.fc1.weight mlp.fc1.bias "
    vision += "mlp.fc2.weight mlp.fc2.bias ls1 ls2"
    llama = [f"self_attn.{x}_proj.weight" for x in "qkvo"]
    llama += [f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")]
    llama += ["input_layernorm.weight", "post_attention_layernorm.weight"]
    for i in range(3):
        expected |= {f"vision_model.encoder.layers.{i}.{name}" for name in vision.split()}
        expected |= {f"language_model.model.layers.{i}.{name}" for name in llama}
    assert names == expected


# ------------------------------------------------------------------------------ Llama


def test_llama_is_causal() -> None:
    model = tiny_model().language_model
    ids = torch.arange(12)
    changed = ids.clone()
    changed[8] = 30
    first, second = (model(model.model.embed_tokens(x)) for x in (ids, changed))
    torch.testing.assert_close(first[:8], second[:8], rtol=0, atol=1e-6)
    assert not torch.allclose(first[8:], second[8:], atol=1e-2)


def test_rotary_positions_are_complex_turns() -> None:
    x = torch.randn(2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(12))
    turned = rotate(x, theta=100.0)
    for position in range(5):
        for c in range(3):  # channels c and c + 3 are one complex number
            turn = cmath.exp(1j * position * 100.0 ** (-2 * c / 6))
            for head in range(2):
                expected = complex(x[head, position, c], x[head, position, c + 3]) * turn
                found = complex(turned[head, position, c], turned[head, position, c + 3])
                assert found == pytest.approx(expected)


def test_neighbouring_query_heads_share_a_key_value_head() -> None:
    attention = LlamaAttention(tiny_llm_config(VOCAB))
    with torch.no_grad():
        attention.o_proj.weight.copy_(torch.eye(48))
    x = torch.randn(1, 48, generator=torch.Generator().manual_seed(13))
    # a single token can only look at itself: what comes out is its value, head by head
    first, second = attention.v_proj(x)[0].split(12)
    torch.testing.assert_close(attention(x)[0], torch.cat([first, first, second, second]))


# ------------------------------------------------------------------------------ vision tower


def test_qk_norm_spans_all_heads() -> None:
    config = tiny_vision_config()
    attention = VisionAttention(config)
    weights = random_tensors(vision_shapes(config), 7, torch.float32)
    prefix = "encoder.layers.1.attn."
    attention.load_state_dict(
        {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    )
    x = torch.randn(6, 40, generator=torch.Generator().manual_seed(8))
    qkv = weights[prefix + "qkv.weight"].double()
    q, k, v = (x.double() @ qkv[i * 40 : (i + 1) * 40].t() for i in range(3))
    expected = torch.zeros(6, 40, dtype=torch.float64)
    for token in range(6):
        # one number for the 40 channels of the five heads, and k has a weight of its own
        q[token] *= (q[token].pow(2).sum() / 40 + 1e-6) ** -0.5
        k[token] *= (k[token].pow(2).sum() / 40 + 1e-6) ** -0.5
    q *= weights[prefix + "q_norm.weight"].double()
    k *= weights[prefix + "k_norm.weight"].double()
    for head in range(5):
        channels = slice(head * 8, head * 8 + 8)
        for token in range(6):
            scores = (k[:, channels] @ q[token, channels] / 8**0.5).exp()
            expected[token, channels] = scores / scores.sum() @ v[:, channels]
    projected = expected @ weights[prefix + "proj.weight"].double().t()
    projected += weights[prefix + "proj.bias"].double()
    torch.testing.assert_close(attention(x).double(), projected, rtol=1e-5, atol=1e-6)


def test_rms_norm_by_hand() -> None:
    norm = RMSNorm(2, eps=0.5)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 10.0]))
    # mean square of (1, 2) is 2.5; plus 0.5 is 3
    expected = torch.tensor([[1.0, 20.0]]) / 3**0.5
    torch.testing.assert_close(norm(torch.tensor([[1.0, 2.0]])), expected)


def test_vision_mlp_has_the_exact_gelu() -> None:
    mlp = VisionMLP({"hidden_size": 1, "intermediate_size": 1})
    with torch.no_grad():
        for parameter, value in zip(mlp.parameters(), (1.0, 0.0, 1.0, 0.0), strict=True):
            parameter.fill_(value)
    expected = 0.5 * 0.7 * (1 + math.erf(0.7 / 2**0.5))
    assert mlp(torch.tensor([0.7])).item() == pytest.approx(expected, rel=1e-6)


def test_attention_mask_hides_columns() -> None:
    q, k, v = torch.randn(3, 2, 5, 4, generator=torch.Generator().manual_seed(9))
    mask = torch.eye(5, dtype=torch.bool)
    torch.testing.assert_close(attend(q, k, v, mask), v.transpose(0, 1).flatten(1))


def test_patch_embedding_and_positions() -> None:
    embeddings = tiny_model().vision_model.embeddings
    image = torch.randn(3, 56, 56, generator=torch.Generator().manual_seed(10))
    tokens = embeddings(image)
    assert tokens.shape == (17, 40)
    position = embeddings.position_embedding[0]
    torch.testing.assert_close(tokens[0], embeddings.class_embedding[0, 0] + position[0])
    patch = image[:, 14:28, 28:42]  # row 1, column 2: patch 6
    convolution = embeddings.patch_embedding
    assert convolution.bias is not None
    expected = (convolution.weight * patch).sum((1, 2, 3)) + convolution.bias + position[1 + 6]
    torch.testing.assert_close(tokens[1 + 6], expected, rtol=1e-5, atol=1e-5)


def test_positions_are_resized_for_another_grid() -> None:
    embeddings = tiny_model().vision_model.embeddings
    with torch.no_grad():
        embeddings.position_embedding[0, 1:] = torch.arange(16.0).reshape(16, 1)
    resized = embeddings.positions(8, 8)
    assert resized.shape == (65, 40)
    torch.testing.assert_close(resized[0], embeddings.position_embedding[0, 0])
    grid = resized[1:, 0].reshape(8, 8)
    torch.testing.assert_close(grid.mean(), torch.tensor(7.5))
    assert (grid.diff(dim=0) > 0).all()
    assert (grid.diff(dim=1) > 0).all()


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("v1", [[0, 1, 4, 5], [8, 9, 12, 13], [2, 3, 6, 7], [10, 11, 14, 15]]),
        ("v2", [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]),
    ],
)
def test_pixel_shuffle(version: str, expected: list[list[int]]) -> None:
    assert shuffled_patches(4, 2, version) == expected
    patches = torch.arange(16.0)[:, None] * 10 + torch.arange(3.0)  # channel c of patch p: 10p + c
    tokens = pixel_shuffle(patches, 2, version)
    for token, numbers in zip(tokens, expected, strict=True):
        assert token.tolist() == [10 * p + c for p in numbers for c in range(3)]


def test_pixel_shuffle_follows_the_published_views() -> None:
    # view [w, h/2, 2c] -> swap axes 0 and 1 -> view [h/2, w/2, 4c]
    grid = torch.randn(8, 8, 5, generator=torch.Generator().manual_seed(11))
    swapped = grid.reshape(8, 4, 10).transpose(0, 1)
    published = swapped.reshape(4, 4, 20)
    patches = grid.reshape(64, 5)
    assert torch.equal(pixel_shuffle(patches, 2, "v1"), published.reshape(16, 20))
    assert torch.equal(pixel_shuffle(patches, 2, "v2"), published.transpose(0, 1).reshape(16, 20))


@pytest.mark.parametrize(("grid", "version"), [(5, "v1"), (4, "v3")])
def test_pixel_shuffle_refuses(grid: int, version: str) -> None:
    with pytest.raises(ValueError, match="no pixel shuffle"):
        shuffled_patches(grid, 2, version)


def test_another_vision_tower_is_refused() -> None:
    with pytest.raises(ValueError, match="InternViT-6B"):
        tiny_model(vision_config=tiny_vision_config(norm_type="layer_norm"))


# ------------------------------------------------------------------------------ drop path


def test_drop_path_rates_are_linear_over_depth() -> None:
    assert [drop_path_rate(i, 5, 0.4) for i in range(5)] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert drop_path_rate(0, 1, 0.4) == 0


def test_drop_path_scales_the_named_branch_of_the_named_image() -> None:
    model = tiny_model()
    asked: list[tuple[int, int, int]] = []

    def drop_path(image_id: int, layer: int, branch: int) -> float:
        asked.append((image_id, layer, branch))
        if (image_id, layer, branch) == (65, 1, ATTENTION_BRANCH):
            return 0.0
        return 1.25 if (image_id, layer, branch) == (65, 2, MLP_BRANCH) else 1.0

    ids, pixels, image_ids = tiny_input()
    kept = [model.embed_image(*pair) for pair in zip(pixels, image_ids.tolist(), strict=True)]
    dropped = [
        model.embed_image(*pair, drop_path) for pair in zip(pixels, image_ids.tolist(), strict=True)
    ]
    assert sorted(asked) == [(i, layer, b) for i in (64, 65) for layer in range(3) for b in (0, 1)]
    assert torch.equal(kept[0], dropped[0])

    vision = model.vision_model
    x = vision.encoder.layers[0](vision.embeddings(pixels[1]), 1.0, 1.0)
    second, third = (cast(VisionLayer, vision.encoder.layers[i]) for i in (1, 2))
    x = x + second.mlp(second.norm2(x)) * second.ls2  # no attention in this layer
    x = x + third.attn(third.norm1(x)) * third.ls1
    x = x + 1.25 * third.mlp(third.norm2(x)) * third.ls2
    expected = model.mlp1(pixel_shuffle(x[1:], 2, "v1"))
    torch.testing.assert_close(dropped[1], expected)
    assert not torch.allclose(dropped[1], kept[1], atol=1e-3)

    logits = [model(ids, pixels, image_ids, CONTEXT, each) for each in (None, drop_path)]
    torch.testing.assert_close(logits[0][:9], logits[1][:9])  # only the first image is seen there
    assert not torch.allclose(logits[0][9:], logits[1][9:], atol=1e-3)


# ------------------------------------------------------------------------------ the whole


def test_images_fill_the_context_positions_in_order() -> None:
    model = tiny_model()
    ids, pixels, image_ids = tiny_input()
    seen: list[Tensor] = []
    model.language_model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    logits = model(ids, pixels, image_ids, CONTEXT)
    assert logits.shape == (len(ids), VOCAB)
    torch.testing.assert_close(seen[0][3:7], model.embed_image(pixels[0], 64))
    torch.testing.assert_close(seen[0][9:13], model.embed_image(pixels[1], 65))
    text = ids != CONTEXT
    assert torch.equal(seen[0][text], model.language_model.model.embed_tokens(ids[text]))


def test_context_embedding_row_has_no_gradient() -> None:
    model = tiny_model()
    ids, pixels, image_ids = tiny_input()
    model(ids, pixels, image_ids, CONTEXT).square().sum().backward()
    gradient = model.language_model.model.embed_tokens.weight.grad
    assert gradient is not None
    assert torch.equal(gradient[CONTEXT], torch.zeros(48))
    assert gradient[ids[0]].abs().sum() > 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_text_only() -> None:
    model = tiny_model()
    ids = torch.arange(7)
    empty = model(ids, torch.zeros(0, 3, 56, 56), torch.zeros(0, dtype=torch.int64), CONTEXT)
    assert torch.equal(empty, model(ids, None, None, CONTEXT))


def test_too_few_images_are_refused() -> None:
    ids, pixels, image_ids = tiny_input()
    with pytest.raises(ValueError, match="1 images do not fill 8 <IMG_CONTEXT> positions"):
        tiny_model()(ids, pixels[:1], image_ids[:1], CONTEXT)


def test_shuffle_version_is_honoured() -> None:
    ids, pixels, image_ids = tiny_input(1)
    first, second = (
        tiny_model(ps_version=v)(ids, pixels, image_ids, CONTEXT) for v in ("v1", "v2")
    )
    assert not torch.allclose(first[4:], second[4:], atol=1e-3)


def test_fp32_agrees_with_fp64() -> None:
    ids, pixels, image_ids = tiny_input()
    narrow = tiny_model()(ids, pixels, image_ids, CONTEXT)
    wide = tiny_model(torch.float64)(ids, pixels.double(), image_ids, CONTEXT)
    assert wide.dtype == torch.float64
    torch.testing.assert_close(narrow.double(), wide, rtol=1e-5, atol=1e-5)
