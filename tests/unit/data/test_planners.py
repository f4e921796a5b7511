"""Training plans are step plans; a selection is its samples; an evaluation sees all in order."""

from typing import get_args

import numpy as np
import pytest

from mmlm.config.schema import Packing
from mmlm.data.planners import EvaluationPlanner, Planner, SelectionPlanner, TrainPlanner
from mmlm.data.step_plan import SampleTable, StepPlan, step_plan, token_weights

TABLE = SampleTable(
    num_tokens=np.arange(5, 28),
    num_images=np.arange(23) % 3,
    num_supervised_tokens=np.arange(1, 24),
    usable=np.setdiff1d(np.arange(23), [2, 9]),
)
LAYOUT = {
    "global_batch_size": 8,
    "seq_length": 30,
    "micro_batch_size": 2,
    "data_parallel_size": 3,
}


def samples(plan: StepPlan) -> list[int]:
    return sorted(
        sample for rank in plan.microbatches for rows in rank for row in rows for sample in row
    )


def test_training_plans_are_step_plans() -> None:
    planner: Planner = TrainPlanner(table=TABLE, seed=5, loss_weight="square", **LAYOUT)
    expected = step_plan(TABLE, seed=5, iteration=4, loss_weight="square", **LAYOUT)
    assert planner.plan(4) == expected
    assert TrainPlanner(table=TABLE, seed=5, **LAYOUT).iterations_per_epoch == 3


@pytest.mark.parametrize("packing", get_args(Packing))
@pytest.mark.parametrize("iteration", [0, 2, 7])
def test_training_says_its_samples_in_order(iteration: int, packing: Packing) -> None:
    planner = TrainPlanner(table=TABLE, seed=5, packing=packing, loss_group_size=4, **LAYOUT)
    ids = planner.sample_ids(iteration).tolist()
    assert sorted(ids) == samples(planner.plan(iteration)) and ids != sorted(ids)


def test_a_selection_is_one_batch_of_exactly_these_samples() -> None:
    layout = {name: value for name, value in LAYOUT.items() if name != "global_batch_size"}
    ids = (20, 3, 11, 4)
    planner: Planner = SelectionPlanner(
        table=TABLE, selection=ids, loss_weight="micro_batch_mean", loss_group_size=2, **layout
    )
    plan = planner.plan(5)
    assert samples(plan) == sorted(ids) and (plan.iteration, plan.epoch) == (5, 0)
    order = np.array(ids)
    assert plan.token_weights == token_weights(
        order, TABLE.num_supervised_tokens[order], "micro_batch_mean", 2
    )
    assert planner.sample_ids(5).tolist() == list(ids)


def test_a_selection_can_go_unpacked() -> None:
    layout = {name: value for name, value in LAYOUT.items() if name != "global_batch_size"}
    plan = SelectionPlanner(table=TABLE, selection=(4, 3, 11), packing="none", **layout).plan(0)
    assert plan.microbatches == ((((4,), (3,)),), (((11,), ()),), (((), ()),))


def test_an_evaluation_sees_every_usable_sample_once_in_order() -> None:
    planner = EvaluationPlanner(table=TABLE, **LAYOUT)
    assert planner.num_iterations == 3
    plans = [planner.plan(iteration) for iteration in range(3)]
    usable = TABLE.usable.tolist()
    assert [samples(plan) for plan in plans] == [usable[:8], usable[8:16], usable[16:]]
    assert plans[-1].num_samples == 5
    for plan in plans:
        assert {len(rank) for rank in plan.microbatches} == {plan.num_microbatches}
        assert {len(rows) for rank in plan.microbatches for rows in rank} == {2}


def test_an_evaluation_weighs_every_token_of_the_split_alike() -> None:
    planner = EvaluationPlanner(table=TABLE, **LAYOUT)
    weights = {s: w for i in range(3) for s, w in planner.plan(i).token_weights.items()}
    assert len(set(weights.values())) == 1
    total = sum(weight * TABLE.num_supervised_tokens[s] for s, weight in weights.items())
    assert total == pytest.approx(1.0, rel=1e-12)


def test_a_last_batch_smaller_than_the_layout_has_empty_rows() -> None:
    layout = {**LAYOUT, "global_batch_size": 20}
    plan = EvaluationPlanner(table=TABLE, **layout).plan(1)
    rows = [row for rank in plan.microbatches for microbatch in rank for row in microbatch]
    assert len(rows) == 6 and sorted(map(len, rows)) == [0, 0, 0, 0, 0, 1]
