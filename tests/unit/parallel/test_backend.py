"""What ``auto`` becomes on each kind of machine, and what cannot be had by name."""

import importlib.metadata
import importlib.util
from typing import Any

import pytest

from mmlm.config.schema import BackendConfig
from mmlm.errors import ConfigError
from mmlm.parallel import backend
from mmlm.parallel.backend import optional_packages, resolve_backend


def machine(monkeypatch: pytest.MonkeyPatch, *, cuda: bool, te: bool, flash: bool) -> None:
    """Pretend that this machine has these."""
    packages = {
        "transformer_engine": "2.0" if te else "not installed",
        "flash_attn": "2.7" if flash else "not installed",
        "apex": "not installed",
    }
    monkeypatch.setattr(backend, "use_cpu", lambda: not cuda)
    monkeypatch.setattr(backend, "optional_packages", lambda: packages)


@pytest.mark.parametrize(
    ("cuda", "te", "flash", "expected"),
    [
        (False, True, True, ("cpu", "local", "sdpa")),
        (True, False, False, ("cuda", "local", "sdpa")),
        (True, True, False, ("cuda", "transformer_engine", "transformer_engine")),
        (True, True, True, ("cuda", "transformer_engine", "flash")),
        (True, False, True, ("cuda", "local", "flash")),
    ],
)
def test_auto(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, te: bool, flash: bool, expected: tuple[str, ...]
) -> None:
    machine(monkeypatch, cuda=cuda, te=te, flash=flash)
    found = resolve_backend(BackendConfig())
    assert (found.device, found.transformer_impl, found.attention_backend) == expected
    assert dict(found.packages)["transformer_engine"] == ("2.0" if te else "not installed")


def test_a_name_is_taken_at_its_word(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, cuda=True, te=True, flash=True)
    found = resolve_backend(BackendConfig(transformer_impl="local", attention_backend="sdpa"))
    assert (found.transformer_impl, found.attention_backend) == ("local", "sdpa")


@pytest.mark.parametrize(
    ("cuda", "asked", "message"),
    [
        (False, {"device": "cuda"}, "backend.device is cuda, but torch sees no CUDA device"),
        (True, {"device": "cpu"}, "but a CUDA device is visible; start with CUDA_VISIBLE_DEVICES="),
        (
            False,
            {"transformer_impl": "transformer_engine"},
            "backend.transformer_impl is transformer_engine, which needs a GPU and its package",
        ),
        (True, {"attention_backend": "flash"}, "backend.attention_backend is flash, which needs"),
        (
            False,
            {"attention_backend": "transformer_engine"},
            "(found: cpu, {'transformer_engine': 'not installed'",
        ),
    ],
)
def test_what_is_not_there(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, asked: dict[str, Any], message: str
) -> None:
    machine(monkeypatch, cuda=cuda, te=False, flash=False)
    with pytest.raises(ConfigError) as caught:
        resolve_backend(BackendConfig(**asked))
    assert message in str(caught.value)


def test_apex_of_pypi_is_not_nvidias(monkeypatch: pytest.MonkeyPatch) -> None:
    """The unrelated PyPI package has a module ``apex`` but no extension ``amp_C``."""
    present = {"apex", "flash_attn"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: object() if name in present else None
    )

    def version(name: str) -> str:
        if name == "flash-attn":
            raise importlib.metadata.PackageNotFoundError
        return "0.9"

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert optional_packages() == {
        "transformer_engine": "not installed",
        "flash_attn": "unknown version",
        "apex": "not installed",
    }
    present.add("amp_C")
    assert optional_packages()["apex"] == "0.9"
