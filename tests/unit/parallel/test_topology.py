"""Places in the TP x PP x DP grid, worlds that do not fit, and a world of one."""

import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from mmlm.config.schema import ParallelConfig
from mmlm.errors import ConfigError
from mmlm.parallel import topology
from tests.distributed.launch import run_ranks


def parallel(tp: int, pp: int) -> ParallelConfig:
    """Sizes of a grid."""
    return ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)


def test_data_parallel_size_is_what_is_left() -> None:
    assert topology.data_parallel_size(32, parallel(4, 2)) == 4
    with pytest.raises(ConfigError) as caught:
        topology.data_parallel_size(6, parallel(2, 2))
    assert str(caught.value) == (
        "6 processes cannot be divided by tensor_model_parallel_size 2 x "
        "pipeline_model_parallel_size 2 = 4; start a multiple of 4 processes or change the layout"
    )


def _place() -> dict[str, object]:
    place = topology.initialize(parallel(2, 2))

    def sum_over(group: dist.ProcessGroup) -> int:
        number = torch.tensor(2**place.rank)
        dist.all_reduce(number, group=group)
        return int(number)

    return {
        "ranks": (place.tp_rank, place.dp_rank, place.pp_rank),
        "sizes": (place.tp_size, place.dp_size, place.pp_size),
        "members": tuple(sum_over(g) for g in (place.groups.tp, place.groups.dp, place.groups.pp)),
        "everyone": sum_over(place.control_group),
        "control": dist.get_backend(place.control_group),
        "patience": place.control_group._get_backend(torch.device("cpu")).options._timeout,
        "gloo": sum_over(place.dp_gloo_group) == sum_over(place.groups.dp),
        "text": str(place),
    }


@pytest.mark.distributed
def test_grid_of_eight_ranks() -> None:
    """TP is fastest, then DP, then PP; groups are compared by the sum of 2^rank."""
    for rank, found in enumerate(run_ranks(8, _place)):
        tp, dp, pp = rank % 2, rank // 2 % 2, rank // 4
        assert found["ranks"] == (tp, dp, pp)
        assert found["sizes"] == (2, 2, 2)
        assert found["members"] == (
            sum(2 ** (4 * pp + 2 * dp + k) for k in range(2)),
            sum(2 ** (4 * pp + 2 * k + tp) for k in range(2)),
            sum(2 ** (4 * k + 2 * dp + tp) for k in range(2)),
        )
        assert (found["everyone"], found["control"]) == (2**8 - 1, "gloo")
        assert found["patience"] == timedelta(hours=24)
        assert found["gloo"]
        assert found["text"] == "TP 2 x PP 2 x DP 2 = 8 processes"


def _world_of_one() -> None:
    dist.destroy_process_group()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    with pytest.raises(ConfigError, match="1 processes cannot be divided by"):
        topology.initialize(parallel(2, 1))
    assert not dist.is_initialized()
    for _ in range(2):  # it can be taken down and built again
        place = topology.initialize(ParallelConfig())
        assert (place.world_size, place.tp_size, place.pp_size, place.dp_size) == (1, 1, 1, 1)
        topology.destroy()
        assert not dist.is_initialized()


@pytest.mark.distributed
def test_without_variables_it_is_a_world_of_one() -> None:
    run_ranks(1, _world_of_one)
