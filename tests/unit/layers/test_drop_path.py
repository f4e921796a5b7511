"""Drop path: pure, independent of order and layout, right in its statistics."""

import numpy as np
import pytest
import torch

from mmlm.layers.drop_path import drop_path_rate, drop_path_scales

DECISION = {"seed": 42, "iteration": 7, "layer": 3, "branch": 0, "rate": 0.4}


def test_rates_are_those_of_the_published_tower() -> None:
    found = [drop_path_rate(layer, 45, 0.4) for layer in range(45)]
    # torch's linspace is in fp32: measured 2.1e-8
    np.testing.assert_allclose(found, torch.linspace(0, 0.4, 45).numpy(), rtol=0, atol=1e-7)
    assert found[0] == 0.0 and found[-1] == 0.4
    assert drop_path_rate(0, 1, 0.4) == 0.0


def test_first_layer_is_never_dropped() -> None:
    rate = drop_path_rate(0, 45, 0.4)
    scales = drop_path_scales(**{**DECISION, "layer": 0, "rate": rate}, image_ids=range(1000))
    assert (scales == 1.0).all()


def test_decisions_belong_to_images_not_to_places() -> None:
    ids = [64 * sample + slot for sample in (9, 2, 500_000_000) for slot in range(3)]
    together = dict(zip(ids, drop_path_scales(**DECISION, image_ids=ids), strict=True))
    np.random.seed(0)  # no global state is read ...
    torch.manual_seed(0)
    state = np.random.get_state()[1].copy()
    alone = {i: drop_path_scales(**DECISION, image_ids=[i])[0] for i in reversed(ids)}
    assert alone == together
    assert (np.random.get_state()[1] == state).all()  # ... or moved
    assert drop_path_scales(**DECISION, image_ids=[]).shape == (0,)


def test_share_of_dropped_images_and_scale_of_the_kept() -> None:
    scales = drop_path_scales(**DECISION, image_ids=range(20_000))
    assert scales.dtype == np.float32
    assert set(scales.tolist()) == {0.0, float(np.float32(1 / 0.6))}
    # standard error 0.0035; measured share 0.3985, mean 1.0025
    assert abs((scales == 0).mean() - 0.4) < 0.014
    assert abs(scales.mean() - 1.0) < 0.024


@pytest.mark.parametrize("name", ["seed", "iteration", "layer", "branch"])
def test_each_coordinate_decides_anew(name: str) -> None:
    """Two independent masks of rate 0.4 agree in 0.16 + 0.36 = 52 % of 10 000 images."""
    one = drop_path_scales(**DECISION, image_ids=range(10_000))
    other = drop_path_scales(**{**DECISION, name: DECISION[name] + 1}, image_ids=range(10_000))
    assert abs((one == other).mean() - 0.52) < 0.02  # standard error 0.005


def test_neighbouring_images_are_independent() -> None:
    dropped = drop_path_scales(**DECISION, image_ids=range(10_000)) == 0
    assert abs((dropped[1:] & dropped[:-1]).mean() - 0.16) < 0.015  # standard error 0.0037


def test_decisions_are_the_same_for_ever() -> None:
    """A changed generator would make resumed runs differ from uninterrupted ones."""
    scales = drop_path_scales(**DECISION, image_ids=range(64, 80))
    assert "".join("d" if scale == 0 else "k" for scale in scales) == "dddkddddkkkkkddd"
