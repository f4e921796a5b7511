"""Each fault that public trainers have shipped is planted, and the comparison must see it.

Without the fault every error is within the tolerance of `test_layouts`; with it the error named in
`FAULTS` must be over `MARGIN` times that. Measured (fp32): 2e-6 without; with it from 7.6e-4 (a
bias that does not decay, three steps) to 3.1. The same faults written into the code also fail:

| fault | test |
|---|---|
| q/k statistic, padded width, k with q's weight | `test_qk_norm`, `test_vision_attention` |
| padding heads not zero | `test_head_partition`, `test_vision_attention` |
| drop path per token | `test_vision_layer`, `test_layouts` |
| drop path by the local layer index | `test_layouts`: drop path at TP2-PP2 |
| gradients times TP or 1 / TP under SP | `test_sequence_region`, `test_layouts`: TP2-SP |
| sums over TP missing or too many under SP | `test_norm`, `test_vision_layer`, `test_layouts` |
| samples or images run together under SP | `test_layouts`: TP2-SP |
| samples run together from the third stage | `test_layouts`: PP4, PP3 |
| padded vocabulary | `test_language_model`, `test_layouts`: TP2 |
| replicated or sharded parameters in the norm | `test_model_provider`, `test_layouts`: TP2 |
| clipped by a local norm | `test_layouts`: PP2, DP2; `test_optimizer` here |
| first rate, decay of biases | `test_optimizer` here and of the room `train` |
| loss divided by each rank's own labels | `test_loss_weights` |
| images at the wrong place | `test_collate`, `test_embedding_merge`, `test_layouts` |

Positions that run on instead of restarting are no fault that training can see: rotary attention
depends on differences of positions inside a sample alone. `test_collate` holds them to 0.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest

from tests.parity import planted_faults as faults
from tests.parity.parallel_run import Layout, ParallelRun
from tests.parity.scenario import Scenario, reference_gradients, reference_run, worst

TOLERANCE = 1e-5
MARGIN = 20

ONE, TP2, PP2, DP2 = Layout(), Layout(tp=2), Layout(pp=2), Layout(dp=2)
TP2_SP = Layout(tp=2, sp=True)
IN_TOWER = Layout(pp=2, pipeline_layout="vv|vpEtttL")
FOUR_STAGES = Layout(pp=4, pipeline_layout="vv|vpEt|tt|L")

GRADIENTS = Scenario(num_iterations=1)
DROPPED = Scenario(num_iterations=1, drop_path=0.6)
STEPS = Scenario()


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What is planted, where, and what sees it."""

    plant: Callable[[pytest.MonkeyPatch], None]
    layout: Layout
    seen_in: str = "gradients"
    """The error that must be large: gradients, losses, grad_norms or weights."""
    scenario: Scenario = GRADIENTS
    mode: str = "skip"
    """How drop path leaves branches out."""


without_sum = faults.marked(sequence_parallel=False)
with_sum = faults.marked(sequence_parallel=True)
as_shards = faults.marked(tensor_model_parallel=True)

FAULTS = {
    "q/k statistic: all-reduce without a backward sum": Fault(
        plant=faults.qk_statistic_without_backward_sum, layout=TP2
    ),
    "q/k statistic: collected without a gradient": Fault(
        plant=faults.qk_statistic_without_gradient, layout=TP2
    ),
    "q/k mean over the padded width": Fault(plant=faults.qk_mean_over_the_padded_width, layout=TP2),
    "padding heads are not zero": Fault(plant=faults.padding_heads_are_not_zero, layout=TP2),
    "k normalised with q's weight": Fault(plant=faults.k_normalised_with_q_weight, layout=ONE),
    "drop path per token": Fault(
        plant=faults.drop_path_per_token, layout=ONE, scenario=DROPPED, mode="mask"
    ),
    "drop path by the local layer index": Fault(
        plant=faults.drop_path_of_the_local_layer, layout=IN_TOWER, scenario=DROPPED
    ),
    "gradients times 1 / TP under SP": Fault(
        plant=faults.gradients_divided_where_tokens_are_shared_out, layout=TP2_SP
    ),
    "gradients times TP under SP": Fault(
        plant=faults.gradients_summed_where_tokens_are_collected, layout=TP2_SP
    ),
    "LayerScale's gradients not summed under SP": Fault(
        plant=without_sum(*faults.LAYER_SCALES), layout=TP2_SP
    ),
    "norms' gradients not summed under SP": Fault(plant=without_sum(*faults.NORMS), layout=TP2_SP),
    "biases' gradients not summed under SP": Fault(
        plant=without_sum(*faults.BIASES), layout=TP2_SP
    ),
    "q/k norm's sharded weights summed under SP": Fault(
        plant=with_sum("qk_norm.q_weight", "qk_norm.k_weight"), layout=TP2_SP
    ),
    "samples run together under SP": Fault(plant=faults.samples_run_together, layout=TP2_SP),
    "samples run together from the third stage on": Fault(
        plant=faults.samples_run_together_from_the_third_stage, layout=FOUR_STAGES
    ),
    "images run together under SP": Fault(plant=faults.images_run_together, layout=TP2_SP),
    "padded vocabulary takes part": Fault(
        plant=faults.padded_vocabulary_takes_part, layout=TP2, seen_in="grad_norms"
    ),
    "replicated parameters counted TP times in the norm": Fault(
        plant=as_shards(""), layout=TP2, seen_in="grad_norms"
    ),
    "shards left out of the norm": Fault(
        plant=faults.shards_left_out_of_the_norm, layout=TP2, seen_in="grad_norms"
    ),
    "clipped by the norm of one stage": Fault(
        plant=faults.norm_of_the_own_stage, layout=PP2, seen_in="weights", scenario=STEPS
    ),
    "clipped by the norm of one DP rank's shard": Fault(
        plant=faults.norm_of_the_own_stage, layout=DP2, seen_in="weights", scenario=STEPS
    ),
    "first rate above zero": Fault(
        plant=faults.first_rate_above_zero, layout=ONE, seen_in="weights", scenario=STEPS
    ),
    "biases do not decay": Fault(
        plant=faults.biases_do_not_decay, layout=ONE, seen_in="weights", scenario=STEPS
    ),
    "gradients averaged by the framework": Fault(
        plant=faults.gradients_averaged_by_the_framework, layout=DP2
    ),
    "images of the next sample": Fault(plant=faults.images_of_the_next_sample, layout=ONE),
    "images one token early": Fault(plant=faults.images_one_token_early, layout=ONE),
    "class token kept": Fault(plant=faults.class_token_kept, layout=ONE),
}


def errors(found: ParallelRun, scenario: Scenario) -> dict[str, float]:
    """Relative errors of everything that a run reports."""
    truth = reference_run(scenario)

    def of_numbers(values: list[float], wanted: list[float]) -> float:
        return max(abs(v - w) / w for v, w in zip(values, wanted, strict=True))

    return {
        "losses": of_numbers(found.losses, truth.losses),
        "gradients": worst(found.gradients, reference_gradients(scenario))[0],
        "grad_norms": of_numbers(found.grad_norms, truth.grad_norms),
        "weights": worst(found.weights, truth.weights)[0],
    }


@cache
def healthy_errors(layout: Layout, scenario: Scenario, mode: str) -> dict[str, float]:
    """The same run as it is."""
    return errors(scenario.run(layout, vision_drop_path_mode=mode), scenario)


@pytest.mark.distributed
@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = FAULTS[name]
    where: Any = (fault.layout, fault.scenario, fault.mode)
    assert max(healthy_errors(*where).values()) < TOLERANCE
    fault.plant(monkeypatch)
    found = fault.scenario.run(fault.layout, vision_drop_path_mode=fault.mode)
    assert errors(found, fault.scenario)[fault.seen_in] > MARGIN * TOLERANCE
