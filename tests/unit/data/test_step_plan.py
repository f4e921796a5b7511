"""The data order and the weights: pure, complete and summing to one."""

import math
from collections import Counter
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmlm.config.schema import LossWeight, Packing
from mmlm.data import step_plan as step_plan_room
from mmlm.data.step_plan import (
    SampleTable,
    StepPlan,
    consumed_samples,
    epoch_order,
    iterations_per_epoch,
    ordered_samples,
    samples_of,
    step_plan,
    token_weights,
)

SEQ_LENGTH = 50
fast = settings(max_examples=40, deadline=None)


def table(num_samples: int, broken: tuple[int, ...] = ()) -> SampleTable:
    """Sizes that vary; samples in ``broken`` are not usable."""
    generator = np.random.default_rng(num_samples)
    num_tokens = generator.integers(2, SEQ_LENGTH + 1, num_samples)
    usable = np.setdiff1d(np.arange(num_samples), broken)
    return SampleTable(
        num_tokens=num_tokens,
        num_images=generator.integers(0, 3, num_samples),
        num_supervised_tokens=generator.integers(1, num_tokens),
        usable=usable,
    )


def plan_of(sizes: SampleTable, iteration: int, **changes: Any) -> StepPlan:
    arguments = {
        "seed": 1,
        "global_batch_size": 8,
        "seq_length": SEQ_LENGTH,
        "micro_batch_size": 1,
        "data_parallel_size": 2,
    }
    return step_plan(sizes, iteration=iteration, **{**arguments, **changes})


def samples(plan: StepPlan) -> list[int]:
    return [sample for rank in plan.microbatches for rows in rank for row in rows for sample in row]


@fast
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 5), st.integers(0, 2))
def test_an_epoch_sees_every_sample_once_and_starts_over_to_fill_up(
    num_samples: int, global_batch_size: int, seed: int, epoch: int
) -> None:
    per_epoch = iterations_per_epoch(num_samples, global_batch_size)
    taken: list[int] = []
    for iteration in range(epoch * per_epoch, (epoch + 1) * per_epoch):
        found, places = samples_of(
            num_samples, seed=seed, iteration=iteration, global_batch_size=global_batch_size
        )
        assert found == epoch and len(places) == global_batch_size
        taken += places.tolist()
    assert sorted(taken[:num_samples]) == list(range(num_samples))
    again = taken[num_samples:]
    assert again == [taken[place % num_samples] for place in range(len(again))]


@fast
@given(
    st.integers(1, 80),
    st.integers(1, 12),
    st.integers(0, 2),
    st.sampled_from(get_args(Packing)),
    st.integers(1, 9),
)
def test_every_packing_sees_every_sample_of_an_epoch_once(
    num_samples: int, global_batch_size: int, epoch: int, packing: Packing, chunk_size: int
) -> None:
    sizes = table(num_samples, broken=(3,) if num_samples > 3 else ())
    per_epoch = iterations_per_epoch(len(sizes.usable), global_batch_size)
    taken: list[int] = []
    for iteration in range(epoch * per_epoch, (epoch + 1) * per_epoch):
        found, sample_ids = ordered_samples(
            sizes,
            seed=1,
            iteration=iteration,
            global_batch_size=global_batch_size,
            packing=packing,
            chunk_size=chunk_size,
        )
        assert found == epoch and len(sample_ids) == global_batch_size
        taken += sample_ids.tolist()
    counts = Counter(taken)
    assert sorted(counts) == sizes.usable.tolist()
    again = per_epoch * global_batch_size - len(sizes.usable)
    assert sum(count - 1 for count in counts.values()) == again


@fast
@given(
    st.integers(1, 60),
    st.integers(1, 20),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(0, 9),
    st.sampled_from(get_args(LossWeight)),
)
def test_a_plan_keeps_every_promise(
    num_samples: int,
    global_batch_size: int,
    micro_batch_size: int,
    data_parallel_size: int,
    iteration: int,
    loss_weight: LossWeight,
) -> None:
    sizes = table(num_samples)
    plan = plan_of(
        sizes,
        iteration,
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        data_parallel_size=data_parallel_size,
        loss_weight=loss_weight,
    )
    taken = samples(plan)
    assert len(taken) == plan.num_samples == global_batch_size
    _, expected = samples_of(
        num_samples, seed=1, iteration=iteration, global_batch_size=global_batch_size
    )
    assert Counter(taken) == Counter(expected.tolist())
    assert len(plan.microbatches) == data_parallel_size
    assert {len(rank) for rank in plan.microbatches} == {plan.num_microbatches}
    assert plan.num_rows % (micro_batch_size * data_parallel_size) == 0
    for rank in plan.microbatches:
        for rows in rank:
            assert len(rows) == micro_batch_size
            assert all(sum(sizes.num_tokens[list(row)]) <= SEQ_LENGTH for row in rows)
    total = math.fsum(plan.token_weights[s] * sizes.num_supervised_tokens[s] for s in taken)
    assert total == pytest.approx(1.0, rel=1e-12)
    assert plan.num_tokens == sizes.num_tokens[taken].sum()
    assert plan.num_images == sizes.num_images[taken].sum()
    assert plan.num_supervised_tokens == sizes.num_supervised_tokens[taken].sum()
    assert 0 < plan.pack_fill <= 1


def test_the_samples_of_an_iteration_do_not_depend_on_the_layout() -> None:
    sizes = table(40)
    layouts = [(1, 1), (2, 1), (1, 4), (3, 2)]
    taken = [
        sorted(samples(plan_of(sizes, 7, micro_batch_size=micro, data_parallel_size=ranks)))
        for micro, ranks in layouts
    ]
    assert all(other == taken[0] for other in taken)


@pytest.mark.parametrize("packing", ["none", "group_by_length", "published"])
def test_without_packing_rows_are_samples_and_padding_is_counted(packing: Packing) -> None:
    sizes = table(40)
    plan = plan_of(sizes, 3, packing=packing, micro_batch_size=2)
    assert plan.pads_rows and plan.num_rows == plan.num_samples == 8
    order = ordered_samples(
        sizes, seed=1, iteration=3, global_batch_size=8, packing=packing, chunk_size=8
    )[1].tolist()
    microbatches = [rows for pair in zip(*plan.microbatches, strict=True) for rows in pair]
    assert [sample for rows in microbatches for row in rows for sample in row] == order
    padded = sum(2 * max(sizes.num_tokens[row[0]] for row in rows) for rows in microbatches)
    assert plan.num_computed_tokens == padded
    assert plan.padding_share == pytest.approx(1 - sizes.num_tokens[order].sum() / padded)
    packed = plan_of(sizes, 3)
    assert packed.padding_share == 0 and not packed.pads_rows


def test_grouping_by_length_brings_alike_together() -> None:
    sizes = table(640)

    def padding(packing: Packing) -> float:
        plans = [plan_of(sizes, i, packing=packing, micro_batch_size=4) for i in range(80)]
        return 1 - sum(p.num_tokens for p in plans) / sum(p.num_computed_tokens for p in plans)

    assert padding("group_by_length") < 0.05 < 0.2 < padding("published") < padding("none")


def test_the_published_order_decides_who_shares_a_mean() -> None:
    sizes = table(40)
    plan = plan_of(sizes, 2, packing="published", loss_weight="micro_batch_mean", loss_group_size=4)
    order = ordered_samples(
        sizes, seed=1, iteration=2, global_batch_size=8, packing="published", chunk_size=4
    )[1]
    for chunk in (order[:4], order[4:]):
        weight = 1 / (2 * sizes.num_supervised_tokens[chunk].sum())
        for sample in chunk.tolist():
            assert plan.token_weights[sample] == pytest.approx(weight, rel=1e-12)


def test_a_plan_is_the_same_however_often_it_is_made() -> None:
    sizes = table(40)
    first = [plan_of(sizes, iteration).microbatches for iteration in range(6)]
    epoch_order.cache_clear()
    assert [plan_of(sizes, i).microbatches for i in reversed(range(6))] == first[::-1]


def test_seeds_and_epochs_have_their_own_order() -> None:
    orders = {tuple(epoch_order(30, seed, epoch).tolist()) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4


def test_the_order_never_changes_between_versions() -> None:
    assert epoch_order(10, 42, 0).tolist() == [4, 8, 1, 9, 3, 6, 0, 7, 2, 5]
    assert epoch_order(10, 42, 0).dtype == np.int64


def test_excluded_samples_are_never_taken() -> None:
    sizes = table(11, broken=(0, 4, 10))
    taken = [s for iteration in range(2) for s in samples(plan_of(sizes, iteration))]
    assert Counter(taken[:8]) == Counter(sizes.usable.tolist())
    assert not {0, 4, 10} & set(taken)


@pytest.mark.parametrize(
    ("loss_weight", "expected"),
    [
        ("token", [1 / 30, 1 / 30, 1 / 30]),
        ("sample", [1 / (3 * 1), 1 / (3 * 4), 1 / (3 * 25)]),
        ("square", [1 / (1 * 8), 1 / (2 * 8), 1 / (5 * 8)]),
        # groups of two: the mean over five tokens, and the mean over 25
        ("micro_batch_mean", [1 / (2 * 5), 1 / (2 * 5), 1 / (2 * 25)]),
    ],
)
def test_weights_by_hand(loss_weight: LossWeight, expected: list[float]) -> None:
    ids, counts = np.array([7, 3, 5]), np.array([1, 4, 25])
    weights = token_weights(ids, counts, loss_weight, loss_group_size=2)
    assert list(weights) == [7, 3, 5]
    assert list(weights.values()) == pytest.approx(expected, rel=1e-15)


def test_a_sample_that_appears_twice_counts_twice() -> None:
    weights = token_weights(np.array([7, 7]), np.array([4, 4]), "token")
    assert weights == {7: 1 / 8}
    # once alone in the last group of weight 1 / 8, once beside 12 tokens of weight 1 / 32
    weights = token_weights(np.array([7, 3, 7]), np.array([4, 12, 4]), "micro_batch_mean", 2)
    assert weights == {7: pytest.approx((1 / 8 + 1 / 32) / 2), 3: pytest.approx(1 / 32)}
    assert 2 * 4 * weights[7] + 12 * weights[3] == pytest.approx(1.0)


@pytest.mark.parametrize("packing", get_args(Packing))
def test_an_iteration_far_ahead_walks_through_none_before_it(
    packing: Packing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Work is counted: samples looked at, orders drawn, batches packed."""
    sizes = table(300)
    orders: list[int] = []
    packed: list[int] = []
    monkeypatch.setattr(
        step_plan_room, "epoch_order", lambda n, *rest: orders.append(n) or epoch_order(n, *rest)
    )
    for name in ("pack", "one_a_row"):
        real = getattr(step_plan_room, name)
        monkeypatch.setattr(
            step_plan_room,
            name,
            lambda *a, real=real, **k: packed.append(1) or real(*a, **k),
        )
    for iteration in (0, 100_000):
        orders.clear()
        packed.clear()
        assert plan_of(sizes, iteration, packing=packing).num_samples == 8
        assert orders == [300] and packed == [1]


def test_counting_iterations_and_samples() -> None:
    assert iterations_per_epoch(1_267_819, 512) == 2477
    assert iterations_per_epoch(1024, 512) == 2
    assert consumed_samples(200, 512) == 102_400
