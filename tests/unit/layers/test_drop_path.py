"""Drop path: pure, independent of order and layout, right in its statistics."""

from typing import Any

import numpy as np
import pytest
import torch

from mmlm.layers.drop_path import BRANCHES, drop_path_rates, drop_path_scales

DECISION: dict[str, Any] = {"seed": 42, "iteration": 7, "num_layers": 5, "max_rate": 0.4}
LAST = 4  # of the five layers; its rate is 0.4


def test_rates_are_those_of_the_published_tower() -> None:
    found = drop_path_rates(45, 0.4)
    # torch's linspace is in fp32: measured 2.1e-8
    np.testing.assert_allclose(found, torch.linspace(0, 0.4, 45).numpy(), rtol=0, atol=1e-7)
    assert found[0] == 0.0
    assert found[-1] == 0.4
    assert drop_path_rates(1, 0.4).tolist() == [0.0]


def test_first_layer_is_never_dropped() -> None:
    scales = drop_path_scales(**DECISION, image_ids=range(1000))
    assert scales.shape == (5, BRANCHES, 1000)
    assert (scales[0] == 1.0).all()


def test_decisions_belong_to_images_not_to_places() -> None:
    ids = [64 * sample + slot for sample in (9, 2, 500_000_000) for slot in range(3)]
    together = drop_path_scales(**DECISION, image_ids=ids)
    np.random.seed(0)  # no global state is read ...
    torch.manual_seed(0)
    state = np.random.get_state()[1].copy()
    alone = {i: drop_path_scales(**DECISION, image_ids=[i])[:, :, 0] for i in reversed(ids)}
    for place, image_id in enumerate(ids):
        np.testing.assert_array_equal(together[:, :, place], alone[image_id])
    assert (np.random.get_state()[1] == state).all()  # ... or moved
    assert drop_path_scales(**DECISION, image_ids=[]).shape == (5, BRANCHES, 0)


def test_share_of_dropped_images_and_scale_of_the_kept() -> None:
    scales = drop_path_scales(**DECISION, image_ids=range(20_000))
    assert scales.dtype == np.float32
    for layer, rate in enumerate((0.0, 0.1, 0.2, 0.3, 0.4)):
        for branch in range(BRANCHES):
            found = scales[layer, branch]
            assert set(found.tolist()) <= {0.0, float(np.float32(1 / (1 - rate)))}
            # four standard errors of at most 0.0035
            assert abs((found == 0).mean() - rate) < 0.014


@pytest.mark.parametrize("name", ["seed", "iteration"])
def test_seed_and_iteration_decide_anew(name: str) -> None:
    """Two independent masks of rate 0.4 agree in 0.16 + 0.36 = 52 % of 10 000 images."""
    one = drop_path_scales(**DECISION, image_ids=range(10_000))[LAST, 0]
    changed = {**DECISION, name: DECISION[name] + 1}
    other = drop_path_scales(**changed, image_ids=range(10_000))[LAST, 0]
    assert abs((one == other).mean() - 0.52) < 0.02  # standard error 0.005


def test_layers_branches_and_neighbours_are_independent() -> None:
    dropped = drop_path_scales(**DECISION, image_ids=range(10_000)) == 0
    last = dropped[LAST, 0]
    # standard errors 0.0037 and below
    assert abs((last & dropped[LAST, 1]).mean() - 0.16) < 0.015
    assert abs((last & dropped[LAST - 1, 0]).mean() - 0.12) < 0.015
    assert abs((last[1:] & last[:-1]).mean() - 0.16) < 0.015


def test_decisions_are_the_same_for_ever() -> None:
    """A changed generator would make resumed runs differ from uninterrupted ones."""
    scales = drop_path_scales(**DECISION, image_ids=range(64, 80))[LAST, 0]
    assert "".join("d" if scale == 0 else "k" for scale in scales) == "kkdkddddkkdkkddk"
