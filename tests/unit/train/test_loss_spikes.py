"""Spikes are found, and neither noise nor a falling curve is one."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmlm.train.loss_spikes import MIN_LOSSES, find_spike, usual_losses

losses_of = st.lists(st.floats(0.01, 20.0), min_size=MIN_LOSSES, max_size=120)
factors = st.floats(1.0, 20.0)


def alarms(curve: list[float], window: int = 100, factor: float = 8.0) -> list[int]:
    """Iterations of a curve that are spikes."""
    return [
        k
        for k in range(len(curve))
        if find_spike(curve[max(0, k - window) : k], curve[k], factor) is not None
    ]


def test_a_rise_by_half_after_a_steady_curve_is_a_spike() -> None:
    noise = random.Random(0)
    curve = [2.0 + noise.gauss(0, 0.05) for _ in range(150)]
    curve[120] = 3.0
    assert alarms(curve) == [120]
    usual = find_spike(curve[20:120], 3.0, 8.0)
    assert usual is not None and usual.num_losses == 100
    assert usual.median == pytest.approx(2.0, abs=0.02)
    assert usual.spread == pytest.approx(0.05, rel=0.25)


def test_spikes_in_the_window_do_not_hide_the_next() -> None:
    noise = random.Random(1)
    curve = [2.0 + noise.gauss(0, 0.05) for _ in range(150)]
    for k in range(100, 150, 5):
        curve[k] = 9.0
    assert alarms(curve) == list(range(100, 150, 5))


@pytest.mark.parametrize("seed", range(5))
def test_the_noisy_falling_start_of_a_training_gives_no_alarm(seed: int) -> None:
    noise = random.Random(seed)
    curve = [(1.0 + 9.0 * math.exp(-k / 60)) * math.exp(noise.gauss(0, 0.15)) for k in range(1500)]
    assert alarms(curve) == []


@given(losses_of, factors)
def test_no_loss_within_the_past_of_a_falling_curve_is_a_spike(
    losses: list[float], factor: float
) -> None:
    falling = sorted(losses, reverse=True)
    assert all(find_spike(falling[:k], falling[k], factor) is None for k in range(len(falling)))


@given(losses_of, factors, st.floats(0.0, 100.0))
def test_it_is_a_spike_exactly_above_the_limit(
    losses: list[float], factor: float, loss: float
) -> None:
    usual = usual_losses(losses)
    assert usual is not None
    found = find_spike(losses, loss, factor)
    assert (found is not None) == (loss > usual.median + factor * usual.spread)


@given(losses_of, factors, st.randoms())
def test_the_order_of_the_past_is_nothing(
    losses: list[float], factor: float, shuffler: random.Random
) -> None:
    shuffled = losses.copy()
    shuffler.shuffle(shuffled)
    assert find_spike(losses, 25.0, factor) == find_spike(shuffled, 25.0, factor)


@given(losses_of, st.lists(st.sampled_from([math.nan, math.inf, -math.inf]), max_size=30))
def test_losses_that_are_not_finite_are_left_out(losses: list[float], bad: list[float]) -> None:
    assert usual_losses(losses + bad) == usual_losses(losses)
    assert all(find_spike(losses, loss, 1.0) is None for loss in bad)


def test_a_few_losses_judge_nothing_and_factor_zero_is_off() -> None:
    assert find_spike([1.0] * (MIN_LOSSES - 1), 1e9, 8.0) is None
    assert find_spike([1.0] * MIN_LOSSES, 1e9, 8.0) is not None
    assert find_spike([1.0] * MIN_LOSSES, 1e9, 0.0) is None


def test_a_curve_without_noise_has_room() -> None:
    assert find_spike([2.0] * 50, 2.1, 8.0) is None
    assert find_spike([2.0] * 50, 2.2, 8.0) is not None
