"""Run megatron-core 0.16.1 on the CPU with gloo: the only file of mmlm that patches anything.

megatron-core asks for CUDA by name in a few places of the paths that we use. `install` replaces
exactly those when there is no CUDA device, and does nothing at all when there is one. Each
substitution names the line of megatron-core that fails without it. The list was measured for
version 0.16.1 and any other version is refused.
"""

import contextlib
import functools
import importlib.metadata
import os
import types
from collections.abc import Iterator
from typing import Any

import torch

from mmlm.errors import ConfigError

SUPPORTED_MEGATRON_CORE = "0.16.1"

_CUDA_TYPE_NAMES = {
    "torch.FloatTensor": "torch.cuda.FloatTensor",
    "torch.HalfTensor": "torch.cuda.HalfTensor",
    "torch.BFloat16Tensor": "torch.cuda.BFloat16Tensor",
}


def use_cpu() -> bool:
    """Return whether there is no CUDA device (``CUDA_VISIBLE_DEVICES=""`` forces it)."""
    return os.environ.get("CUDA_VISIBLE_DEVICES") == "" or not torch.cuda.is_available()


def install() -> bool:
    """Make megatron-core usable without CUDA; idempotent, and a no-op where CUDA is present.

    Returns:
        True if the substitutions are in place, False if CUDA is used.

    Raises:
        ConfigError: if CUDA is absent and megatron-core is not the version these were measured for.
    """
    if not use_cpu():
        return False
    version = importlib.metadata.version("megatron-core")
    if version != SUPPORTED_MEGATRON_CORE:
        raise ConfigError(
            f"megatron-core {version} was found, but the CPU backend was measured for "
            f"{SUPPORTED_MEGATRON_CORE} only; run: pip install megatron-core=="
            f"{SUPPORTED_MEGATRON_CORE}"
        )
    if not isinstance(torch.cuda.current_device, _CpuDevice):
        _substitute()
    return True


class _CpuDevice:
    """Stands for ``torch.cuda.current_device``: the device is the CPU."""

    def __call__(self) -> torch.device:
        return torch.device("cpu")


class _TensorTypeName(str):
    """A tensor type name, e.g. ``torch.FloatTensor``, that also equals its CUDA twin."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) or _CUDA_TYPE_NAMES.get(str(self)) == other

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


def _substitute() -> None:
    import megatron.core.optimizer.clip_grads as clip_grads
    import megatron.core.optimizer.optimizer as optimizer
    import megatron.core.pipeline_parallel.schedules as schedules
    import megatron.core.tensor_parallel.random as mcore_random
    import megatron.core.utils as mcore_utils

    # distributed/param_and_grad_buffer.py:800, pipeline_parallel/p2p_communication.py:190-321,
    # tensor_parallel/mappings.py:91-181: buffers on torch.cuda.current_device().
    torch.cuda.current_device = _CpuDevice()
    # pipeline_parallel/p2p_communication.py:242 and :398: synchronize after shapes are exchanged.
    torch.cuda.synchronize = lambda device=None: None

    # schedules.py:596, 983, 2138; clip_grads.py:90-207; optimizer.py:473-485, 907; utils.py:1207:
    # factories called with device="cuda".
    proxy = _torch_without_cuda()
    for module in (schedules, clip_grads, optimizer, mcore_utils):
        module.torch = proxy

    # optimizer/distrib_optimizer.py:361, 420, 582; optimizer.py:671, 690; clip_grads.py:167:
    # comparisons of Tensor.type() with the CUDA type names.
    torch.Tensor.type = _tensor_type(torch.Tensor.type)

    # tensor_parallel/random.py:235: the tracker forks the CUDA generator.
    mcore_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    mcore_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    mcore_random._CUDA_RNG_STATE_TRACKER = _cpu_rng_tracker(mcore_random.CudaRNGStatesTracker)
    mcore_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True


def _torch_without_cuda() -> types.ModuleType:
    """A module with all that torch has, whose tensor factories read "cuda" as "cpu"."""
    proxy = types.ModuleType("torch")
    proxy.__dict__.update(torch.__dict__)

    def on_cpu(factory: Any) -> Any:
        @functools.wraps(factory)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if "cuda" in str(kwargs.get("device")):
                kwargs["device"] = "cpu"
            return factory(*args, **kwargs)

        return wrapped

    for name in ("zeros", "ones", "empty", "tensor", "full"):
        setattr(proxy, name, on_cpu(getattr(torch, name)))
    return proxy


def _tensor_type(original: Any) -> Any:
    @functools.wraps(original)
    def type_of(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        return _TensorTypeName(result) if isinstance(result, str) else result

    return type_of


def _cpu_rng_tracker(base: type) -> Any:
    """A megatron tracker whose named states are states of the CPU generator."""

    class CpuRngStatesTracker(base):  # type: ignore[misc]
        def add(self, name: str, seed: int) -> None:
            """Add the state ``name``, seeded with ``seed``, and leave the generator as it was."""
            self._is_initialized = True
            if seed in self.seeds_ or name in self.states_:
                raise ValueError(f"random state '{name}' or its seed {seed} already exists")
            self.seeds_.add(seed)
            self.states_[name] = torch.Generator().manual_seed(seed).get_state()

        @contextlib.contextmanager
        def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
            """Draw from the state ``name`` inside the context."""
            before = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(before)

    return CpuRngStatesTracker()
