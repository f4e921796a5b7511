"""Where weights come from, on the command line."""

import argparse

import pytest

from mmlm.commands.recipe_arguments import add_weights_arguments, with_weights
from mmlm.config.schema import CheckpointConfig, RunConfig


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_weights_arguments(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize("before", [{"load": "other"}, {"load_hf": "other"}, {}])
@pytest.mark.parametrize("option", ["--load", "--load-hf"])
def test_the_named_weights_and_no_others(before: dict[str, str], option: str) -> None:
    run = RunConfig(checkpoint=CheckpointConfig(save_total_limit=7, **before))  # type: ignore[arg-type]
    found = with_weights(run, parse(option, "here")).checkpoint
    expected = {option.removeprefix("--").replace("-", "_"): "here"}
    assert found == CheckpointConfig(save_total_limit=7, **expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("words", [(), ("--load", "a", "--load-hf", "b")])
def test_one_of_the_two_must_be_given(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(*words)
    assert "--load-hf" in capsys.readouterr().err
