"""The measure of the comparisons: relative, and blind to nothing."""

import math

import torch

from tests.parity.scenario import error, worst


def test_error_is_relative_to_the_norm() -> None:
    truth = torch.tensor([3.0, 4.0])
    assert math.isclose(error(truth + torch.tensor([0.0, 0.5]), truth), 0.1)


def test_a_tensor_that_is_no_number_is_the_worst() -> None:
    truth = {name: torch.ones(2) for name in "abc"}
    found = {**truth, "b": torch.tensor([1.0, float("nan")])}
    assert worst(found, truth) == (math.inf, "b")
    assert worst({**truth, "c": torch.full((2,), math.inf)}, truth) == (math.inf, "c")
