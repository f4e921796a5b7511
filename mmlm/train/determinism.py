"""``train.deterministic``: the same run twice gives the same bits, on the same layout and machine.

What is decided at random (order of the data, drop path, fresh weights) never depends on the
machine; this is about sums whose order the hardware would otherwise choose. On the CPU nothing of
mmlm chooses.
"""

import os

import torch

ENVIRONMENT = {
    # cuBLAS: one workspace a stream (https://docs.nvidia.com/cuda/cublas, results reproducibility)
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    # transformer-engine: only attention kernels that add in one order
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    # NCCL: one order of sums, as megatron-core's deterministic mode asks for
    "NCCL_ALGO": "Ring",
}
"""Read by the libraries at their first use; a value that the user has set is left alone."""


def make_deterministic() -> None:
    """Switch every library of this process to algorithms that add in a fixed order.

    Call it before the first kernel and the first message between GPUs. megatron-core's own mode and
    flash-attn's are set where their layers are built (`transformer_config.py`,
    `packed_attention.py`).
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.use_deterministic_algorithms(True)
