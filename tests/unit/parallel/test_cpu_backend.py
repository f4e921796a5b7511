"""The substitutions without CUDA: refused for other versions, absent where CUDA is."""

import importlib.metadata

import pytest
import torch

from mmlm.errors import ConfigError
from mmlm.parallel import cpu_backend
from tests.distributed.launch import run_ranks


def test_other_version_of_megatron_core_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_backend, "use_cpu", lambda: True)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.17.0")
    before = torch.cuda.current_device
    with pytest.raises(ConfigError, match=r"megatron-core 0\.17\.0 was found.*0\.16\.1 only"):
        cpu_backend.install()
    assert torch.cuda.current_device is before


def test_nothing_happens_where_cuda_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.17.0")
    before = (torch.cuda.current_device, torch.cuda.synchronize, torch.Tensor.type)
    assert cpu_backend.install() is False
    assert (torch.cuda.current_device, torch.cuda.synchronize, torch.Tensor.type) == before


def test_empty_device_list_means_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert not cpu_backend.use_cpu()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert cpu_backend.use_cpu()


def _install_and_look() -> None:
    from megatron.core.optimizer import clip_grads
    from megatron.core.tensor_parallel import random as mcore_random

    assert cpu_backend.install() and cpu_backend.install()
    assert torch.cuda.current_device() == torch.device("cpu")
    torch.cuda.synchronize()
    # megatron-core's module reads "cuda" as "cpu"; everybody else still gets what they ask for
    assert clip_grads.torch.zeros(1, device="cuda").device.type == "cpu"
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")
    name = torch.zeros(1).type()
    assert name == "torch.FloatTensor" and name == "torch.cuda.FloatTensor"
    assert name != "torch.cuda.HalfTensor" and name in {"torch.FloatTensor": 0}
    # a named random state: reproducible, moves on by itself, leaves the generator as it was
    tracker = mcore_random.get_cuda_rng_tracker()
    tracker.add("test", 5)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    with tracker.fork("test"):
        first = torch.rand(2)
    with tracker.fork("test"):
        second = torch.rand(2)
    expected = torch.rand(4, generator=torch.Generator().manual_seed(5))
    assert torch.equal(torch.cat([first, second]), expected)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ValueError, match="random state 'test' or its seed 5 already exists"):
        tracker.add("test", 5)


@pytest.mark.distributed
@pytest.mark.skipif(torch.cuda.is_available(), reason="the substitutions are for no CUDA")
def test_substitutions_in_a_process_of_their_own() -> None:
    run_ranks(1, _install_and_look)
