"""Properties of packing: nothing lost, nothing too long, equal counts, and level costs."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmlm.config.model import LanguageConfig, ModelConfig, VisionConfig
from mmlm.data.packing import (
    PackingCost,
    best_fit_decreasing,
    deal,
    one_a_row,
    pack,
    packing_cost,
)

SEQ_LENGTH = 64
LENGTHS = st.lists(st.integers(1, SEQ_LENGTH), min_size=1, max_size=60)

fast = settings(max_examples=60, deadline=None)


def flat(rows: Any) -> list[int]:
    """Item numbers of nested rows."""
    if isinstance(rows, int):
        return [rows]
    return [item for row in rows for item in flat(row)]


@fast
@given(LENGTHS)
def test_best_fit_decreasing_loses_nothing_and_fills_well(lengths: list[int]) -> None:
    rows = best_fit_decreasing(lengths, SEQ_LENGTH)
    assert sorted(flat(rows)) == list(range(len(lengths)))
    fills = sorted(sum(lengths[item] for item in row) for row in rows)
    assert fills[-1] <= SEQ_LENGTH
    # No two rows could be one, so at most one row is half empty.
    assert len(rows) < 2 or fills[0] + fills[1] > SEQ_LENGTH


@pytest.mark.parametrize(
    ("lengths", "num_rows"),
    [([33, 31, 20, 44, 10, 54], 3), ([64, 64], 2), ([32] * 5, 3), ([1] * 64, 1)],
)
def test_best_fit_decreasing_finds_the_fewest_rows(lengths: list[int], num_rows: int) -> None:
    assert len(best_fit_decreasing(lengths, SEQ_LENGTH)) == num_rows


@fast
@given(st.lists(st.floats(0, 100), min_size=1, max_size=12), st.integers(1, 5))
def test_dealing_gives_each_group_the_same_count(costs: list[float], num_groups: int) -> None:
    costs = costs * num_groups
    groups = deal(costs, num_groups)
    assert sorted(flat(groups)) == list(range(len(costs)))
    assert {len(group) for group in groups} == {len(costs) // num_groups}


@fast
@given(
    LENGTHS,
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 3),
    st.sampled_from([lambda n: float(n), lambda n: n + 0.1 * n * n, lambda n: 1.0]),
)
def test_a_plan_keeps_every_promise(
    lengths: list[int],
    micro_batch_size: int,
    data_parallel_size: int,
    microbatch_multiple: int,
    cost: Callable[[int], float],
) -> None:
    plan = pack(
        lengths,
        [cost(n) for n in lengths],
        seq_length=SEQ_LENGTH,
        micro_batch_size=micro_batch_size,
        data_parallel_size=data_parallel_size,
        microbatch_multiple=microbatch_multiple,
    )
    assert sorted(flat(plan)) == list(range(len(lengths)))
    assert len(plan) == data_parallel_size
    assert all(len(rank) % microbatch_multiple == 0 for rank in plan)
    assert len({len(rank) for rank in plan}) == 1
    assert all(len(rows) == micro_batch_size for rank in plan for rows in rank)
    rows = [row for rank in plan for microbatch in rank for row in microbatch]
    assert max(sum(lengths[item] for item in row) for row in rows) <= SEQ_LENGTH
    assert all(rows) or len(lengths) < len(rows)
    multiple = micro_batch_size * data_parallel_size * microbatch_multiple
    bound = len(best_fit_decreasing(lengths, SEQ_LENGTH))
    assert len(rows) % multiple == 0 and len(rows) <= -(-bound // multiple) * multiple


def test_full_rows_are_spread_where_the_layout_wants_more() -> None:
    # costs stand upside down, so the samples that find a place first are not the long ones
    lengths = [44, 20, 44, 20, 44, 20, 10, 10, 10]
    costs = [1.0, 50.0, 1.0, 50.0, 1.0, 50.0, 50.0, 50.0, 50.0]
    plan = pack(lengths, costs, seq_length=SEQ_LENGTH, micro_batch_size=1, data_parallel_size=2)
    rows = [row for rank in plan for microbatch in rank for row in microbatch]
    assert len(rows) == 4 and all(rows)
    assert sorted(flat(plan)) == list(range(9))


def test_best_fit_decreasing_is_beaten_where_it_leaves_holes() -> None:
    lengths = [26, 24, 23, 25, 17, 10, 26, 9, 11, 21, 30, 29]
    plan = pack(
        lengths,
        [float(n) for n in lengths],
        seq_length=SEQ_LENGTH,
        micro_batch_size=1,
        data_parallel_size=1,
    )
    assert len(plan[0]) == 4 < len(best_fit_decreasing(lengths, SEQ_LENGTH))


def test_one_a_row_goes_round_the_ranks() -> None:
    plan = one_a_row(7, micro_batch_size=2, data_parallel_size=2)
    assert plan == ((((0,), (1,)), ((4,), (5,))), (((2,), (3,)), ((6,), ())))
    plan = one_a_row(2, micro_batch_size=1, data_parallel_size=1, microbatch_multiple=3)
    assert plan == ((((0,),), ((1,),), ((),)),)


def test_ranks_cost_about_the_same() -> None:
    lengths = [(37 * n) % 40 + 4 for n in range(200)]
    costs = [PackingCost(per_image=4.0).of(n, n % 3) for n in lengths]
    plan = pack(lengths, costs, seq_length=SEQ_LENGTH, micro_batch_size=1, data_parallel_size=4)
    totals = [sum(costs[item] for item in flat(rank)) for rank in plan]
    assert max(totals) / min(totals) < 1.02
    mean = sum(totals) / sum(len(rank) for rank in plan)
    for rank in plan:
        microbatches = [sum(costs[item] for item in flat(rows)) for rows in rank]
        assert microbatches == sorted(microbatches, reverse=True)
        assert max(microbatches) / mean < 1.05


def test_the_published_sizes_give_the_default_cost() -> None:
    vision = VisionConfig(
        hidden_size=3200,
        ffn_hidden_size=12800,
        num_layers=45,
        num_attention_heads=25,
        image_size=448,
        patch_size=14,
    )
    language = LanguageConfig(
        hidden_size=7168,
        ffn_hidden_size=20480,
        num_layers=60,
        num_attention_heads=56,
        num_query_groups=8,
        kv_channels=128,
        vocab_size=64009,
    )
    cost = packing_cost(ModelConfig(vision=vision, language=language))
    assert cost.per_squared_token == pytest.approx(PackingCost().per_squared_token, rel=0.02)
    assert cost.per_image == pytest.approx(PackingCost().per_image, rel=0.02)
    assert cost.of(100, 2) == 100 + cost.per_squared_token * 10_000 + 2 * cost.per_image
