"""Work of rank 0 reaches all ranks, and so do its errors."""

import pytest
import torch.distributed as dist

from mmlm.errors import DataError
from mmlm.parallel.agreement import on_rank_zero
from tests.distributed.launch import run_ranks


def _ask() -> tuple[object, str]:
    answer = on_rank_zero(lambda: {"from": dist.get_rank()})

    def fail() -> None:
        raise DataError(f"line 3 is broken, says rank {dist.get_rank()}")

    with pytest.raises(DataError) as caught:
        on_rank_zero(fail)
    return answer, str(caught.value)


@pytest.mark.distributed
def test_results_and_errors_are_those_of_rank_zero() -> None:
    expected = ({"from": 0}, "line 3 is broken, says rank 0")
    assert run_ranks(3, _ask) == [expected] * 3
