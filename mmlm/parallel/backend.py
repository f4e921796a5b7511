"""Which implementations a run uses: resolved once at start, printed, never guessed later."""

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
    unrelated.
    """
    found = {}
    for module, distribution in _OPTIONAL.items():
        present = importlib.util.find_spec("amp_C" if module == "apex" else module) is not None
        try:
            version = importlib.metadata.version(distribution) if present else "not installed"
        except importlib.metadata.PackageNotFoundError:
            version = "unknown version"
        found[module] = version
    return found


def resolve_backend(config: BackendConfig) -> Backend:
    """Turn ``auto`` into what this machine has.

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
    have = {
        "transformer_engine": device == "cuda"
        and packages["transformer_engine"] != "not installed",
        "flash": device == "cuda" and packages["flash_attn"] != "not installed",
    }
    have["local"] = have["sdpa"] = True
    for field, value in (
        ("transformer_impl", config.transformer_impl),
        ("attention_backend", config.attention_backend),
    ):
        if value != "auto" and not have[value]:
            raise ConfigError(
                f"backend.{field} is {value}, which needs a GPU and its package "
                f"(found: {device}, {packages}); install it or use auto"
            )
    impl = config.transformer_impl
    if impl == "auto":
        impl = "transformer_engine" if have["transformer_engine"] else "local"
    attention = config.attention_backend
    if attention == "auto":
        attention = next(name for name in ("flash", "transformer_engine", "sdpa") if have[name])
    return Backend(
        device=device,
        transformer_impl=impl,
        attention_backend=attention,
        packages=tuple(packages.items()),
    )
