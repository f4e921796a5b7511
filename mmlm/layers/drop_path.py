"""Drop path (stochastic depth) per image, decided without any random state.

A decision is a pure function of (seed, iteration, global image id, global layer, branch), so it is
the same on every TP rank, in every layout, under recompute and after a resume.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

BRANCHES = 2
"""Residual branches of a layer: 0 attention, 1 MLP."""


def drop_path_rates(num_layers: int, max_rate: float) -> NDArray[np.float64]:
    """Rate of each layer: linear from 0 at the first to ``max_rate`` at the last.

    Source: ``torch.linspace(0, drop_path_rate, num_hidden_layers)`` of InternVisionEncoder.
    """
    return np.linspace(0.0, max_rate, num_layers)


def drop_path_scales(
    *, seed: int, iteration: int, image_ids: Sequence[int], num_layers: int, max_rate: float
) -> NDArray[np.float32]:
    """Multiplier of every residual branch for each image: 0 if dropped, else 1 / (1 - rate).

    Each image has a stream of its own of a counter-based generator (Philox), keyed by seed and
    iteration and started at the image id.

    Args:
        seed: of the run.
        iteration: training iteration, from 0.
        image_ids: global ids of the n images.
        num_layers: layers of the whole tower, whatever the stage holds.
        max_rate: rate of the last layer, in [0, 1).

    Returns:
        float32 [num_layers, `BRANCHES`, n].
    """
    keep = 1.0 - drop_path_rates(num_layers, max_rate)[:, None]  # [num_layers, 1]
    scales = np.empty((num_layers, BRANCHES, len(image_ids)), dtype=np.float32)
    for index, image_id in enumerate(image_ids):
        philox = np.random.Philox(key=[seed, iteration], counter=[0, int(image_id), 0, 0])
        drawn = np.random.Generator(philox).random((num_layers, BRANCHES))
        scales[:, :, index] = np.where(drawn < keep, 1.0 / keep, 0.0)
    return scales
