"""Layout strings, the automatic cut against brute force, and megatron-core's notation."""

import dataclasses
from itertools import combinations

import pytest

from mmlm.config.model import ModelConfig
from mmlm.config.presets import internvl_chat_v1_2, tiny
from mmlm.errors import ConfigError
from mmlm.parallel.stage_plan import StageChunk, flat_letters, layer_costs, make_stage_plan


def model(num_vision: int, num_decoder: int) -> ModelConfig:
    """The tiny model with other numbers of layers."""
    return dataclasses.replace(
        tiny(),
        vision=dataclasses.replace(tiny().vision, num_layers=num_vision),
        language=dataclasses.replace(tiny().language, num_layers=num_decoder),
    )


def test_explicit_layout_by_hand() -> None:
    plan = make_stage_plan(model(3, 3), 3, "vv|vpEt|ttL")
    assert plan.chunks == (
        StageChunk(
            vision_layers=range(2),
            has_projection=False,
            has_embedding=False,
            decoder_layers=range(0),
            has_output=False,
        ),
        StageChunk(
            vision_layers=range(2, 3),
            has_projection=True,
            has_embedding=True,
            decoder_layers=range(1),
            has_output=False,
        ),
        StageChunk(
            vision_layers=range(3, 3),
            has_projection=False,
            has_embedding=False,
            decoder_layers=range(1, 3),
            has_output=True,
        ),
    )
    assert [chunk.has_vision_embedding for chunk in plan.chunks] == [True, False, False]
    assert [str(chunk) for chunk in plan.chunks] == [
        "vision 0-1",
        "vision 2-2, projection, embedding, decoder 0-0",
        "decoder 1-2, head",
    ]


@pytest.mark.parametrize(
    ("layout", "expanded"),
    [
        ("v*3pEt|t*3L", "vvvpEt|tttL"),
        ("vvv, pE, t | t*2 t L", "vvvpEt|tttL"),
        ("vvvpE(t|)*3tL", "vvvpEt|t|t|tL"),
        ("(v|)*2vpEtt*2tL", "v|v|vpEttttL"),
    ],
)
def test_repetitions(layout: str, expanded: str) -> None:
    num_stages = expanded.count("|") + 1
    assert make_stage_plan(model(3, 4), num_stages, layout).layout == expanded


@pytest.mark.parametrize(
    ("layout", "vision", "language"),
    [
        # inside the tower; the embedding stands alone with the projection
        ("v|vvpE|tttL", "Et|ttL|", "|E|tttL"),
        # exactly at the boundary
        ("vvv|pEtttL", "EtttL|", "|EtttL"),
        # the tower ends in the stage where the decoder begins, which is cut again
        ("vv|vpEt|tt|L", "Ett|tL||", "|Et|tt|L"),
        ("vvvp|EtttL", "EtttL|", "|EtttL"),
    ],
)
def test_notation_of_megatron_core(layout: str, vision: str, language: str) -> None:
    plan = make_stage_plan(model(3, 3), layout.count("|") + 1, layout)
    assert plan.vision_layout == vision
    assert plan.language_layout == language


@pytest.mark.parametrize(
    ("num_stages", "layout", "problems"),
    [
        (3, "vvv|pEtttL", ["it has 2 rows for 3 stages"]),
        (2, "vvvpEtttL|", ["every stage must hold at least one layer"]),
        (2, "vv|pEtttL", ["without the cuts it must read vvvpEtttL (3 v, p, E, 3 t, L)"]),
        (2, "vvv|ptEttL", ["without the cuts it must read vvvpEtttL"]),
        (2, "vvx|pEtttL", ["without the cuts it must read vvvpEtttL"]),
        (3, "vvv||pEttL", ["at least one layer", "it must read vvvpEtttL"]),
    ],
)
def test_layout_that_does_not_fit(num_stages: int, layout: str, problems: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        make_stage_plan(model(3, 3), num_stages, layout)
    assert f"parallel.pipeline_layout '{layout}': " in str(caught.value)
    for problem in problems:
        assert problem in str(caught.value)


def test_virtual_stages_are_rows_dealt_to_the_ranks_in_turn() -> None:
    """Row k is chunk k // PP of rank k % PP: rank 0 of PP 2 holds rows 0 and 2."""
    plan = make_stage_plan(model(3, 3), 4, "v|vv|pEtt|tL")
    of_rank = [plan.chunks[rank::2] for rank in (0, 1)]
    assert [str(chunk) for chunk in of_rank[0]] == [
        "vision 0-0",
        "projection, embedding, decoder 0-1",
    ]
    assert [str(chunk) for chunk in of_rank[1]] == ["vision 1-2", "decoder 2-2, head"]
    assert plan.vision_layout == "Et|ttL||"
    assert plan.language_layout == "||Ett|tL"


def test_more_stages_than_pieces() -> None:
    with pytest.raises(ConfigError, match="size 8 is more than the 7 pieces of the model"):
        make_stage_plan(model(2, 2), 8)


@pytest.mark.parametrize(("num_vision", "num_decoder"), [(1, 1), (3, 4), (5, 2)])
@pytest.mark.parametrize("images_per_token", [0.0003, 0.02])
def test_automatic_cut_is_the_best_of_all(
    num_vision: int, num_decoder: int, images_per_token: float
) -> None:
    sizes = model(num_vision, num_decoder)
    costs = layer_costs(sizes, images_per_token)
    count = len(costs)
    for num_stages in range(1, min(count, 5) + 1):
        best = min(
            max(
                sum(costs[start:end]) for start, end in zip((0, *cuts), (*cuts, count), strict=True)
            )
            for cuts in combinations(range(1, count), num_stages - 1)
        )
        plan = make_stage_plan(sizes, num_stages, images_per_token=images_per_token)
        rows = plan.layout.split("|")
        assert "".join(rows) == flat_letters(sizes) and all(rows) and len(rows) == num_stages
        ends = [sum(map(len, rows[: n + 1])) for n in range(num_stages)]
        worst = max(sum(costs[start:end]) for start, end in zip([0, *ends[:-1]], ends, strict=True))
        assert worst == pytest.approx(best, rel=1e-12)  # sums in another order


def test_costs_of_the_published_model() -> None:
    """Weights of a layer for one token, plus an image's share: 4 images in 2048 tokens."""
    costs = layer_costs(internvl_chat_v1_2(), images_per_token=4 / 2048)
    assert len(costs) == 45 + 2 + 60 + 1
    # 4100 tower tokens; each also meets 1025 keys and 1025 values
    layer = 9600 * 3200 + 3200 * 3200 + 2 * 3200 * 12800 + 2 * 1025 * 3200
    assert costs[0] * 2048 == 4100 * layer
    assert costs[45] * 2048 == 1024 * (12800 * 7168 + 7168 * 7168)
    assert costs[46] == 0
    # q, k, v, o (56 and 8 heads of 128), gate, up and down
    assert costs[47] == 7168 * (2 * 7168 + 2 * 1024 + 3 * 20480)
    assert costs[-1] == 7168 * 64009
    # half of the tokens are images' by default
    assert layer_costs(internvl_chat_v1_2()) == costs
