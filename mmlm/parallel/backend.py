"""Which implementations a run uses: resolved once at start, printed, never guessed later."""

import importlib
import importlib.metadata
import importlib.util
from dataclasses import dataclass

from mmlm.config.schema import BackendConfig
from mmlm.errors import ConfigError
from mmlm.parallel.cpu_backend import use_cpu

_OPTIONAL = {
    "transformer_engine": "transformer-engine",
    "flash_attn": "flash-attn",
    "apex": "apex",
}


@dataclass(frozen=True, kw_only=True)
class Backend:
    """The resolved choice."""

    device: str
    """"cpu" (gloo) or "cuda" (NCCL)."""
    transformer_impl: str
    """"local" or "transformer_engine"."""
    attention_backend: str
    """"sdpa", "flash" or "transformer_engine"."""
    packages: tuple[tuple[str, str], ...]
    """Optional packages and their versions, or "not installed"."""


def optional_packages() -> dict[str, str]:
    """Version of each optional GPU package, or "not installed".

    NVIDIA's apex is recognised by its ``amp_C`` extension: the PyPI package of that name is
    unrelated. A package that is there but does not import (built for another torch) counts as
    "broken".
    """
    found = {}
    for module, distribution in _OPTIONAL.items():
        probe = "amp_C" if module == "apex" else module
        if importlib.util.find_spec(probe) is None:
            found[module] = "not installed"
            continue
        try:
            importlib.import_module(probe)
            found[module] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            found[module] = "unknown version"
        except (ImportError, OSError) as error:
            found[module] = f"broken ({error})"
    return found


def resolve_backend(config: BackendConfig, dtype: str = "bf16") -> Backend:
    """Turn ``auto`` into what this machine has.

    Args:
        config: what is wanted.
        dtype: "bf16" or "fp32"; the fast attention kernels take no fp32.

    Raises:
        ConfigError: if a backend is asked for by name and is not usable here.
    """
    device = "cpu" if use_cpu() else "cuda"
    if config.device == "cuda" and device == "cpu":
        raise ConfigError("backend.device is cuda, but torch sees no CUDA device; use auto or cpu")
    if config.device == "cpu" and device == "cuda":
        raise ConfigError(
            "backend.device is cpu, but a CUDA device is visible; start with "
            "CUDA_VISIBLE_DEVICES= (empty) to train on the CPU"
        )
    packages = optional_packages()
    usable = {
        name: device == "cuda" and not packages[name].startswith(("not installed", "broken"))
        for name in ("transformer_engine", "flash_attn")
    }
    layers = {"transformer_engine": usable["transformer_engine"], "local": True}
    attention = {
        "flash": usable["flash_attn"] and dtype == "bf16",
        "transformer_engine": usable["transformer_engine"] and dtype == "bf16",
        "sdpa": True,
    }
    return Backend(
        device=device,
        transformer_impl=_choose("transformer_impl", config.transformer_impl, layers, packages),
        attention_backend=_choose(
            "attention_backend", config.attention_backend, attention, packages
        ),
        packages=tuple(packages.items()),
    )


def _choose(field: str, wanted: str, usable: dict[str, bool], packages: dict[str, str]) -> str:
    """The wanted backend, or the first usable one for ``auto``."""
    if wanted == "auto":
        return next(name for name, works in usable.items() if works)
    if not usable[wanted]:
        raise ConfigError(
            f"backend.{field} is {wanted}, which needs a GPU, its package and, for attention, bf16 "
            f"(found: {packages}); use auto"
        )
    return wanted
