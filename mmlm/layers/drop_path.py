"""Drop path (stochastic depth) per image, decided without any random state.

A decision is a pure function of (seed, iteration, global image id, global layer, branch), so it is
the same on every TP rank, in every layout, under recompute and after a resume.
"""

from collections.abc import Sequence

import numpy as np


def drop_path_rate(layer: int, num_layers: int, max_rate: float) -> float:
    """Rate of layer ``layer`` (global, from 0): linear from 0 to ``max_rate`` over the tower.

    Source: ``torch.linspace(0, drop_path_rate, num_hidden_layers)`` of InternVisionEncoder.
    """
    return max_rate * layer / (num_layers - 1) if num_layers > 1 else 0.0


def drop_path_scales(
    *,
    seed: int,
    iteration: int,
    image_ids: Sequence[int],
    layer: int,
    branch: int,
    rate: float,
) -> np.ndarray:
    """Multiplier of a residual branch for each image: 0 if dropped, else 1 / (1 - rate).

    Args:
        seed: of the run.
        iteration: training iteration, from 0.
        image_ids: global ids of the images.
        layer: global layer index, from 0.
        branch: 0 attention, 1 MLP.
        rate: probability of dropping, in [0, 1).

    Returns:
        float32 [number of images].
    """
    scales = np.ones(len(image_ids), dtype=np.float32)
    if rate == 0.0:
        return scales
    for index, image_id in enumerate(image_ids):
        counter = [0, int(image_id), layer, branch]
        generator = np.random.Generator(np.random.Philox(key=[seed, iteration], counter=counter))
        scales[index] = 0.0 if generator.random() < rate else 1.0 / (1.0 - rate)
    return scales
