"""What ``auto`` becomes on each kind of machine, and what cannot be had by name."""

import importlib
import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from mmlm.config.schema import BackendConfig
from mmlm.errors import ConfigError
from mmlm.parallel import backend
from mmlm.parallel.backend import optional_packages, resolve_backend


def machine(
    monkeypatch: pytest.MonkeyPatch,
    *,
    cuda: bool,
    te: bool,
    flash: bool,
    absent: str = "not installed",
) -> None:
    """Pretend that this machine has these."""
    packages = {
        "transformer_engine": "2.0" if te else absent,
        "flash_attn": "2.7" if flash else absent,
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


@pytest.mark.parametrize(("te", "layers"), [(False, "local"), (True, "transformer_engine")])
def test_fast_attention_is_never_picked_for_fp32(
    monkeypatch: pytest.MonkeyPatch, te: bool, layers: str
) -> None:
    machine(monkeypatch, cuda=True, te=te, flash=True)
    found = resolve_backend(BackendConfig(), "fp32")
    assert (found.transformer_impl, found.attention_backend) == (layers, "sdpa")
    for name in ("flash", "transformer_engine"):
        with pytest.raises(ConfigError, match=f"is {name}, which needs .* for attention, bf16"):
            resolve_backend(BackendConfig(attention_backend=name), "fp32")


def test_broken_packages_count_as_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = "broken (undefined symbol: _ZN3c10)"
    machine(monkeypatch, cuda=True, te=False, flash=False, absent=broken)
    found = resolve_backend(BackendConfig())
    assert (found.transformer_impl, found.attention_backend) == ("local", "sdpa")
    assert dict(found.packages)["flash_attn"] == broken
    for asked in ({"attention_backend": "flash"}, {"transformer_impl": "transformer_engine"}):
        with pytest.raises(ConfigError, match=r"undefined symbol.*use auto"):
            resolve_backend(BackendConfig(**asked))


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
            "backend.transformer_impl is transformer_engine, which needs a GPU, its package and",
        ),
        (True, {"attention_backend": "flash"}, "backend.attention_backend is flash, which needs"),
        (
            False,
            {"attention_backend": "transformer_engine"},
            "(found: {'transformer_engine': 'not installed'",
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
    monkeypatch.setattr(importlib, "import_module", lambda name: None)
    assert optional_packages() == {
        "transformer_engine": "not installed",
        "flash_attn": "unknown version",
        "apex": "not installed",
    }
    present.add("amp_C")
    assert optional_packages()["apex"] == "0.9"


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("import gone_altogether", "No module named 'gone_altogether'"),
        ("raise OSError('libcudart.so.11: cannot open')", "libcudart.so.11: cannot open"),
    ],
)
def test_a_package_that_does_not_import_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, error: str
) -> None:
    """The extension is there, but was built for another torch or CUDA."""
    (tmp_path / "amp_C.py").write_text(source + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert optional_packages()["apex"] == f"broken ({error})"
