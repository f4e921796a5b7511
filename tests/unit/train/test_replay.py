"""What came first among the findings of all ranks."""

from typing import Any

from mmlm.train.replay import Finding, first_findings


def finding(rank: int, **fields: Any) -> Finding:
    """On TP 2 x PP 2 x DP 2, TP fastest and PP slowest."""
    place = {"tp_rank": rank % 2, "dp_rank": rank // 2 % 2, "pp_rank": rank // 4}
    values = {
        "kind": "activation",
        "layer": "x",
        "chunk": rank // 4,
        "microbatch": 0,
        "order": 5,
        "sample_ids": None,
        **place,
        **fields,
    }
    return Finding(rank=rank, **values)


def test_the_forward_pass_comes_before_the_backward_and_an_early_stage_before_a_late_one() -> None:
    cause = finding(0, layer="cause", order=9, sample_ids=(3,))
    others = [
        finding(4, order=1, sample_ids=(3,)),
        finding(0, kind="gradient", order=1, sample_ids=(3,)),
        finding(4, kind="parameter gradient", order=2),
    ]
    assert first_findings([*others, cause]) == [([cause], (3,))]


def test_gradients_come_from_the_late_stage() -> None:
    early = finding(0, kind="gradient", order=1, sample_ids=(1, 2))
    late = finding(4, kind="gradient", order=9, sample_ids=(2,))
    assert first_findings([early, late]) == [([late], (2,))]


def test_rows_are_told_apart_by_a_later_layer_and_both_tp_ranks() -> None:
    inner = finding(1, layer="mlp", order=5)
    outer = [finding(tp, layer="layer", order=7, sample_ids=(tp + 4,)) for tp in range(2)]
    later = finding(4, sample_ids=(4, 5, 6))
    assert first_findings([*outer, inner, later]) == [([inner], (4, 5))]


def test_each_microbatch_of_each_dp_rank_has_its_own_cause() -> None:
    bad = [
        finding(0, microbatch=1, chunk=1, sample_ids=(1,)),
        finding(2, microbatch=1, chunk=0, sample_ids=(2,)),
    ]
    assert first_findings(bad) == [([bad[1]], (2,)), ([bad[0]], (1,))]
    assert first_findings([]) == []


def test_a_sum_over_ranks_is_one_finding() -> None:
    sums = [finding(rank, kind="summed gradient", microbatch=-1, chunk=0) for rank in (0, 2)]
    assert first_findings(sums) == [(sums, ())]
