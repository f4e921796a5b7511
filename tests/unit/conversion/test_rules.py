"""Every rule puts the rows where it says and back, to the bit."""

import pytest
import torch

from mmlm.conversion.rules import Copy, GateUp, GroupedQkv, Rule, StackedQkv, megatron_rows

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def rows(labels: str) -> torch.Tensor:
    """One row a label like k10 (kind, head, row): its number, on two columns."""
    numbers = [100.0 * "qkvgu".index(label[0]) + int(label[1:]) for label in labels.split()]
    return torch.tensor(numbers)[:, None].expand(-1, 2).contiguous()


def test_stacked_qkv_goes_head_by_head():
    stacked = rows("q00 q01 q10 q11 k00 k01 k10 k11 v00 v01 v10 v11")
    by_head = rows("q00 q01 k00 k01 v00 v01 q10 q11 k10 k11 v10 v11")
    rule = StackedQkv(num_attention_heads=2)
    assert torch.equal(rule.to_megatron([stacked]), by_head)
    assert torch.equal(rule.to_hf(by_head)[0], stacked)


def test_grouped_qkv_goes_group_by_group():
    query = rows("q00 q01 q10 q11 q20 q21 q30 q31")
    key, value = rows("k00 k01 k10 k11"), rows("v00 v01 v10 v11")
    grouped = rows("q00 q01 q10 q11 k00 k01 v00 v01 q20 q21 q30 q31 k10 k11 v10 v11")
    rule = GroupedQkv(num_query_groups=2, kv_channels=2)
    assert torch.equal(rule.to_megatron([query, key, value]), grouped)
    for found, expected in zip(rule.to_hf(grouped), (query, key, value), strict=True):
        assert torch.equal(found, expected)


def test_gate_comes_before_up():
    gate, up = rows("g00 g01"), rows("u00 u01")
    both = rows("g00 g01 u00 u01")
    assert torch.equal(GateUp().to_megatron([gate, up]), both)
    assert [found.tolist() for found in GateUp().to_hf(both)] == [gate.tolist(), up.tolist()]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rule", "shapes"),
    [
        (Copy(), [(3, 4, 5)]),
        (StackedQkv(num_attention_heads=5), [(3 * 5 * 8, 40)]),
        (GroupedQkv(num_query_groups=2, kv_channels=12), [(48, 48), (24, 48), (24, 48)]),
        (GroupedQkv(num_query_groups=1, kv_channels=6), [(18, 7), (6, 7), (6, 7)]),
        (GateUp(), [(72, 48), (72, 48)]),
    ],
)
def test_round_trip_is_exact_and_shapes_are_announced(
    rule: Rule, shapes: list[tuple[int, ...]], dtype: torch.dtype
):
    tensors = [torch.randn(shape).to(dtype) for shape in shapes]
    there = rule.to_megatron(tensors)
    assert there.shape == rule.megatron_shape(shapes)
    assert there.dtype == dtype
    back = rule.to_hf(there)
    assert len(back) == len(tensors)
    for found, expected in zip(back, tensors, strict=True):
        assert found.dtype == dtype
        assert found.is_contiguous()
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("rule", "shapes"),
    [
        (Copy(), [(12, 3)]),
        (StackedQkv(num_attention_heads=3), [(3 * 3 * 2, 3)]),
        (GroupedQkv(num_query_groups=2, kv_channels=2), [(12, 3), (4, 3), (4, 3)]),
        (GateUp(), [(6, 3), (6, 3)]),
    ],
)
def test_any_rows_are_found(rule: Rule, shapes: list[tuple[int, ...]]):
    """Every range of rows, also one that begins or ends inside a head."""
    tensors = [torch.randn(shape) for shape in shapes]
    whole = rule.to_megatron(tensors)
    for start in range(len(whole)):
        for stop in range(start + 1, len(whole) + 1):
            runs = rule.row_runs(start, stop, shapes)
            found = torch.cat([tensors[place][rows] for place, rows in runs])
            assert torch.equal(found, whole[start:stop]), (start, stop)
    for number, tensor in enumerate(tensors):
        for start in range(len(tensor)):
            for stop in range(start + 1, len(tensor) + 1):
                places = megatron_rows(rule, number, start, stop, shapes)
                found = torch.cat([whole[rows] for rows in places])
                assert torch.equal(found, tensor[start:stop]), (number, start, stop)
    assert rule.row_runs(2, 2, shapes) in ([], [(0, slice(2, 2))])
