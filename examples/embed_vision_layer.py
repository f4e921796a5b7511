"""One InternViT layer of mmlm inside somebody else's program, on any number of TP ranks.

``python examples/embed_vision_layer.py``, or for TP 2 ``torchrun --nproc-per-node 2 ...``: 5 heads
do not divide by 2, so each rank gets 3 slots and one of the 6 is padding. No trainer is involved.
"""

import os

import torch
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig

from mmlm.config.model import VisionConfig
from mmlm.config.schema import BackendConfig, ParallelConfig
from mmlm.layers.head_partition import HeadPartition
from mmlm.layers.vision_layer import PackedImages
from mmlm.models.layer_specs import vision_layer_spec
from mmlm.parallel.backend import resolve_backend
from mmlm.parallel.topology import destroy, initialize

SIZES = VisionConfig(
    hidden_size=40,
    ffn_hidden_size=80,
    num_layers=1,
    num_attention_heads=5,
    image_size=56,
    patch_size=14,
)


def main() -> None:
    """Build the layer, run two images through it, print what came out."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    # with no CUDA device this also makes megatron-core usable on the CPU
    topology = initialize(ParallelConfig(tensor_model_parallel_size=world_size))
    model_parallel_cuda_manual_seed(1)
    slots = HeadPartition(num_heads=SIZES.num_attention_heads, tp_size=topology.tp_size).num_slots
    config = TransformerConfig(
        num_layers=1,
        hidden_size=SIZES.hidden_size,
        ffn_hidden_size=SIZES.ffn_hidden_size,
        num_attention_heads=slots,  # 6 at TP 2: one of them is zero and stays zero
        kv_channels=SIZES.kv_channels,
        tensor_model_parallel_size=topology.tp_size,
        layernorm_epsilon=SIZES.layernorm_epsilon,
        normalization="RMSNorm",
        attention_dropout=0.0,
        gradient_accumulation_fusion=False,
        use_cpu_initialization=topology.device.type == "cpu",
    )
    layer = build_module(
        vision_layer_spec(resolve_backend(BackendConfig()), SIZES),
        config,
        layer_number=1,
        pg_collection=topology.groups,
    ).to(topology.device)
    # two images, 16 patches and a class token each, in one stream: attention stays inside each
    tokens = SIZES.tokens_per_image
    images = PackedImages.from_lengths(
        (tokens, tokens), topology.device, image_ids=(0, 1), tokens_per_image=tokens
    )
    hidden_states = torch.ones(2 * tokens, 1, SIZES.hidden_size, device=topology.device)
    output, _ = layer(hidden_states, images)
    if topology.rank == 0:
        print(f"{topology}: {tuple(hidden_states.shape)} -> {tuple(output.shape)}")
        print(f"{slots} head slots for {SIZES.num_attention_heads} heads")
    destroy()


if __name__ == "__main__":
    main()
