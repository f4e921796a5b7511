"""Who speaks, and how it is marked."""

import logging
from collections.abc import Iterator

import pytest

from mmlm.log import get_logger, setup_logging


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    """The logger is the process's: leave it as it was found."""
    logger = logging.getLogger("mmlm")
    before = (logger.handlers[:], logger.propagate, logger.level)
    yield
    logger.handlers[:], logger.propagate = before[0], before[1]
    logger.setLevel(before[2])


@pytest.mark.parametrize(
    ("rank", "world", "written"),
    [
        ("0", "1", "news\nbeware\n"),
        ("0", "4", "news\nbeware\n"),
        ("3", "4", "[rank 3] beware\n"),
    ],
)
def test_ranks_and_levels(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    rank: str,
    world: str,
    written: str,
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    setup_logging()
    setup_logging()  # twice is once
    get_logger().info("news")
    get_logger("mmlm.part").warning("beware")
    assert capsys.readouterr() == ("", written)


def test_rank_can_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(rank=1)
    get_logger().info("news")
    assert capsys.readouterr().err == ""
