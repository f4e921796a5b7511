"""The drawn lengths have what is known of the published sets."""

import numpy as np
import pytest

from benchmarks.published_lengths import (
    MEAN_TEXT_TOKENS,
    PUBLISHED_SETS,
    TOKENS_PER_IMAGE,
    published_table,
)


def test_the_sets_have_their_published_sizes() -> None:
    assert len(PUBLISHED_SETS) == 9
    assert sum(entry.num_samples for entry in PUBLISHED_SETS) == 1_267_819


def test_the_mean_text_is_the_known_one_and_no_sample_is_too_long() -> None:
    table = published_table(30_000)
    text = table.num_tokens - TOKENS_PER_IMAGE * table.num_images
    assert text.mean() == pytest.approx(MEAN_TEXT_TOKENS, rel=0.01)
    assert table.num_tokens.max() == 2048 and text.min() >= 50
    assert 0.96 < table.num_images.mean() < 0.98 and table.num_images.max() == 1
    assert np.all(table.num_supervised_tokens < text)


def test_a_longer_seq_length_changes_only_what_was_cut() -> None:
    short, long = published_table(30_000), published_table(30_000, seq_length=4096)
    cut = short.num_tokens == 2048
    assert 0 < cut.mean() < 0.02
    np.testing.assert_array_equal(short.num_tokens[~cut], long.num_tokens[~cut])
    assert np.all(long.num_tokens[cut] >= 2048) and long.num_tokens.max() > 2048
