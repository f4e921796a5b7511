"""Process groups: the only caller of megatron-core's ``initialize_model_parallel``.

Everything else gets a `Topology` and reads sizes, ranks and groups from it.
"""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from mmlm.config.schema import ParallelConfig
from mmlm.errors import ConfigError
from mmlm.parallel import cpu_backend

RNG_SEED = 1234
"""Seed of megatron-core's named random states."""

RANK_ZERO_HOURS = 24
"""How long the others wait while rank 0 measures the data, hours."""

COLLECTIVE_FACTOR = 7
"""Times ``parallel.timeout_minutes`` that a collective waits for a missing rank: longer than any
phase of a training may take, so that `mmlm.train.watch` ends it first and names the rank."""


@dataclass(frozen=True, kw_only=True)
class Topology:
    """This process's place in the TP x PP x DP grid (TP fastest, PP slowest, as in Megatron)."""

    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int
    device: torch.device
    groups: ProcessGroupCollection
    dp_gloo_group: dist.ProcessGroup
    """The data-parallel ranks over gloo: optimizer state is gathered here to be saved."""
    control_group: dist.ProcessGroup
    """All ranks over gloo, patient: for waiting while rank 0 works alone."""

    def __str__(self) -> str:
        return (
            f"TP {self.tp_size} x PP {self.pp_size} x DP {self.dp_size} = "
            f"{self.world_size} processes"
        )


def data_parallel_size(world_size: int, parallel: ParallelConfig) -> int:
    """What is left of the world for data parallelism.

    Raises:
        ConfigError: if the world does not divide by TP x PP.
    """
    model_parallel = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    if world_size % model_parallel:
        raise ConfigError(
            f"{world_size} processes cannot be divided by tensor_model_parallel_size "
            f"{parallel.tensor_model_parallel_size} x pipeline_model_parallel_size "
            f"{parallel.pipeline_model_parallel_size} = {model_parallel}; start a multiple of "
            f"{model_parallel} processes or change the layout"
        )
    return world_size // model_parallel


def initialize(parallel: ParallelConfig) -> Topology:
    """Start torch.distributed (gloo, or NCCL with CUDA) and build the groups. Collective.

    Reads ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR`` and ``MASTER_PORT`` as torchrun
    sets them; without them it is a world of one process. A process group that is already
    initialized is used as it is.

    Args:
        parallel: sizes of the grid.

    Returns:
        This process's place.

    Raises:
        ConfigError: if the world does not divide by TP x PP.
    """
    on_cpu = cpu_backend.install()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if not dist.is_initialized():
        data_parallel_size(world_size, parallel)
    device = torch.device("cpu")
    if not on_cpu:
        # one hardware queue keeps communication ahead of the computation it overlaps with
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        timeout = timedelta(minutes=COLLECTIVE_FACTOR * parallel.timeout_minutes)
        dist.init_process_group(
            backend="gloo" if on_cpu else "nccl",
            store=_meeting_place(timeout) if "MASTER_ADDR" in os.environ else dist.HashStore(),
            rank=int(os.environ.get("RANK", "0")),
            world_size=world_size,
            timeout=timeout,
        )
    data_parallel_size(dist.get_world_size(), parallel)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        create_gloo_process_groups=not on_cpu,
    )
    # nothing is drawn from these states (there is no dropout), but sequence parallelism enters them
    model_parallel_cuda_manual_seed(RNG_SEED)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    control_group = dist.new_group(backend="gloo", timeout=timedelta(hours=RANK_ZERO_HOURS))
    return Topology(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp_rank=groups.tp.rank(),
        tp_size=groups.tp.size(),
        pp_rank=groups.pp.rank(),
        pp_size=groups.pp.size(),
        dp_rank=groups.dp.rank(),
        dp_size=groups.dp.size(),
        device=device,
        groups=groups,
        dp_gloo_group=groups.dp if on_cpu else parallel_state.get_data_parallel_group_gloo(),
        control_group=control_group,
    )


def _meeting_place(timeout: timedelta) -> dist.Store:
    """The store that torchrun's variables name, through which the ranks find each other.

    torchrun of torch 2.13 starts its store once, so that ranks it has restarted would find the
    addresses of those that died (``next_rendezvous`` in torch/distributed/elastic/rendezvous/
    dynamic_rendezvous.py, github.com/pytorch/pytorch/issues/135712). On one machine the number of
    the restart, which all ranks know, keeps them apart; over several, where agents count for
    themselves, pretrain.sh asks torchrun for a new store each time.
    """
    store: dist.Store
    store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    if os.environ.get("LOCAL_WORLD_SIZE") != os.environ["WORLD_SIZE"]:
        return store
    return dist.PrefixStore(f"start_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def destroy() -> None:
    """Take the groups down, so that the process can end or build others. Collective."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
