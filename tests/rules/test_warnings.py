"""pytest turns the warnings of our own modules into errors, and only those."""

import warnings

import pytest


def warn_from(module: str) -> None:
    """Warn as if the code of ``module`` had caused it."""
    warnings.warn_explicit("a warning", UserWarning, "some_file.py", 1, module=module)


@pytest.mark.parametrize("module", ["mmlm", "mmlm.data.packing"])
def test_warnings_of_ours_are_errors(module: str) -> None:
    with pytest.raises(UserWarning, match="a warning"):
        warn_from(module)


def test_megatron_may_warn() -> None:
    warn_from("megatron.core.optimizer")
