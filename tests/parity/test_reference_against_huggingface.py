"""The reference against transformers' own Llama and InternVL, logits and every gradient.

transformers is no dependency of the project: these tests are skipped where it is missing. It knows
pixel shuffle v2 alone; v1 is tested by hand in `test_reference_model.py`. Compared in fp64 (norms,
softmax and angles are fp32 inside transformers, hence 1e-6 and not less).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.parity.reference_llama import ReferenceLlama
from tests.parity.reference_model import ReferenceInternVL
from tests.parity.tiny_reference import CONTEXT, VOCAB, tiny_input, tiny_model
from tests.tiny_weights import llm_shapes, random_tensors, tiny_llm_config, tiny_vision_config

TOLERANCE = 1e-6

NAMES = {
    "vision_model.": "model.vision_tower.",
    ".class_embedding": ".cls_token",
    ".position_embedding": ".position_embeddings",
    ".patch_embedding.": ".patch_embeddings.projection.",
    ".encoder.layers": ".encoder.layer",
    ".attn.proj": ".attention.projection_layer",
    ".attn.": ".attention.",
    ".norm1": ".layernorm_before",
    ".norm2": ".layernorm_after",
    ".ls1": ".lambda_1",
    ".ls2": ".lambda_2",
    "mlp1.0": "model.multi_modal_projector.layer_norm",
    "mlp1.1": "model.multi_modal_projector.linear_1",
    "mlp1.3": "model.multi_modal_projector.linear_2",
    "language_model.lm_head": "lm_head",
    "language_model.model.": "model.language_model.",
}


def relative_error(found: Tensor | None, expected: Tensor | None) -> float:
    assert found is not None
    assert expected is not None
    return ((found - expected).norm() / expected.norm()).item()


def their_llm_config(transformers: Any) -> Any:
    # with a pad token, transformers would withhold the gradient of that embedding row
    config = tiny_llm_config(VOCAB, pad_token_id=None)
    return transformers.LlamaConfig(**config, attn_implementation="eager")


def under_their_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Combined InternVL-Chat names -> the names of transformers' InternVL; qkv in three."""
    renamed = {}
    for name, tensor in tensors.items():
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        if ".qkv." in name:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                renamed[name.replace("qkv", f"{letter}_proj")] = part
        else:
            renamed[name] = tensor
    return renamed


def test_llama() -> None:
    transformers = pytest.importorskip("transformers")
    weights = random_tensors(llm_shapes(tiny_llm_config(VOCAB)), 5, torch.float64)
    theirs = transformers.LlamaForCausalLM(their_llm_config(transformers)).double()
    theirs.load_state_dict(weights, strict=True)
    ours = ReferenceLlama(tiny_llm_config(VOCAB)).double()
    ours.load_state_dict(weights, strict=True)

    ids = torch.randint(0, VOCAB, (40,), generator=torch.Generator().manual_seed(6))
    their_logits = theirs(input_ids=ids[None]).logits[0]
    our_logits = ours(ours.model.embed_tokens(ids))
    assert relative_error(our_logits, their_logits) < TOLERANCE
    for logits in (their_logits, our_logits):
        functional.cross_entropy(logits[:-1], ids[1:]).backward()
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    for name, parameter in theirs.named_parameters():
        assert relative_error(gradients[name], parameter.grad) < TOLERANCE, name


def their_internvl(transformers: Any, ours: ReferenceInternVL) -> Any:
    sizes = tiny_vision_config()
    vision = transformers.InternVLVisionConfig(
        **{key: sizes[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers")},
        **{key: sizes[key] for key in ("num_attention_heads", "norm_type", "layer_norm_eps")},
        image_size=[56, 56],
        use_qk_norm=True,
    )
    config = transformers.InternVLConfig(
        vision_config=vision,
        text_config=their_llm_config(transformers),
        image_token_id=CONTEXT,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    theirs = transformers.InternVLForConditionalGeneration(config).double()
    theirs.load_state_dict(under_their_names(ours.state_dict()), strict=True)
    return theirs


def test_internvl() -> None:
    transformers = pytest.importorskip("transformers")
    ours = tiny_model(torch.float64, ps_version="v2")
    theirs = their_internvl(transformers, ours)

    ids, pixels, image_ids = tiny_input()
    our_logits = ours(ids, pixels.double(), image_ids, CONTEXT)
    their_logits = theirs(input_ids=ids[None], pixel_values=pixels.double()).logits[0]
    assert relative_error(our_logits, their_logits) < TOLERANCE
    for logits in (their_logits, our_logits):
        functional.cross_entropy(logits[:-1], ids[1:]).backward()
    gradients = under_their_names(
        {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    )
    compared = dict(theirs.named_parameters())
    assert compared.keys() == gradients.keys()
    for name, parameter in compared.items():
        assert relative_error(gradients[name], parameter.grad) < TOLERANCE, name
