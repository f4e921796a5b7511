"""Samples by number without an index: the same as the dataset's, and what is wrong is a value."""

from pathlib import Path

import numpy as np
import pytest

from mmlm.data.dataset import Dataset, open_dataset
from mmlm.data.image import normalise
from mmlm.data.lookup import Lookup
from mmlm.data.rejection import Reason
from mmlm.data.sample import SampleSettings
from mmlm.data.tokenizer import Tokenizer
from mmlm.errors import DataError
from tests.tiny_data import conversation, make_playground, write_set


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A set of four records, three of them broken, and an empty line."""
    meta = write_set(
        tmp_path,
        [
            {"id": "a", "conversations": conversation("q", "a")},
            {"id": "b", "conversations": conversation("q")},
            {"id": "c", "image": "gone.png", "conversations": conversation("q", "a")},
        ],
    )
    file = tmp_path / "tiny.jsonl"
    file.write_text(file.read_text() + "\n{\n")
    return meta


def test_samples_are_those_of_the_dataset(
    tmp_path: Path, tokenizer: Tokenizer, settings: SampleSettings
) -> None:
    meta = make_playground(tmp_path, num_samples=8, seed=5)
    dataset: Dataset = open_dataset(meta, tokenizer, settings, cache_dir=tmp_path / "cache")
    lookup = Lookup(meta)
    assert lookup.num_samples == len(dataset.table.num_tokens) == 8
    for sample_id in range(8):
        wanted = dataset.sample(sample_id, seed=1, epoch=0, with_pixels=True)
        look = lookup.look(sample_id, tokenizer, settings, seed=1)
        assert look.rejection is None and look.tokens is not None and look.images is not None
        assert look.record == dataset.record(sample_id)
        assert lookup.num_images(sample_id) == len(look.images)
        np.testing.assert_array_equal(look.tokens.input_ids, wanted.input_ids)
        np.testing.assert_array_equal(look.tokens.labels, wanted.labels)
        assert wanted.pixel_values is not None
        for image, pixels in zip(look.images, wanted.pixel_values, strict=True):
            np.testing.assert_array_equal(normalise(image), pixels)


@pytest.mark.parametrize("repeat_time", [0.5, 1, 3])
def test_repeated_and_shortened_sets_count_as_in_the_dataset(
    tmp_path: Path, tokenizer: Tokenizer, settings: SampleSettings, repeat_time: float
) -> None:
    entries = [{"id": n, "conversations": conversation(f"q{n}", "a")} for n in range(5)]
    meta = write_set(tmp_path, entries, repeat_time=repeat_time)
    dataset = open_dataset(meta, tokenizer, settings, cache_dir=tmp_path / "cache")
    lookup = Lookup(meta)
    assert lookup.num_samples == len(dataset.table.num_tokens) == {0.5: 2, 1: 5, 3: 15}[repeat_time]
    for sample_id in range(lookup.num_samples):
        record = lookup.record(lookup.place(sample_id))
        assert record == dataset.record(sample_id)
        assert record.identity == str(sample_id % 5)


@pytest.mark.parametrize("sample_id", [-1, 4])
def test_an_unknown_number_is_refused(broken: Path, sample_id: int) -> None:
    message = f"sample {sample_id} does not exist; .* 4 samples, numbered from 0 to 3"
    with pytest.raises(DataError, match=message):
        Lookup(broken).place(sample_id)


def test_what_is_wrong_is_a_value(
    broken: Path, tokenizer: Tokenizer, settings: SampleSettings
) -> None:
    lookup = Lookup(broken)
    looks = [lookup.look(sample_id, tokenizer, settings) for sample_id in range(4)]
    reasons = [look.rejection.reason if look.rejection else None for look in looks]
    assert reasons == [
        None,
        Reason.ODD_TURNS,
        Reason.IMAGE_UNREADABLE,
        Reason.MALFORMED_RECORD,
    ]
    assert [look.place.line for look in looks] == [1, 2, 3, 5]
    assert [look.record is None for look in looks] == [False, False, False, True]
    assert [look.tokens is None for look in looks] == [False, True, False, True]
    assert looks[2].rejection is not None and looks[3].rejection is not None
    assert looks[2].rejection.detail.endswith(
        "image does not exist; check the set's root and the record's 'image'"
    )
    assert "tiny.jsonl" not in looks[2].rejection.detail + looks[3].rejection.detail
    assert lookup.num_images(2) == 1 and lookup.num_images(3) == 0
    text = lookup.look(2, tokenizer, settings, with_pixels=False)
    assert text.rejection is None and text.images is None
