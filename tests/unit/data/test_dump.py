"""The .npz of samples: what the model gets, streamed, complete or not there."""

import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mmlm.data import dump as dump_module
from mmlm.data.collate import collate
from mmlm.data.dataset import open_dataset
from mmlm.data.dump import check_output, dump
from mmlm.data.lookup import Look, Lookup
from mmlm.data.sample import SampleSettings
from mmlm.data.tokenizer import Tokenizer
from mmlm.errors import ConfigError, DataError
from tests.tiny_data import conversation, make_playground, write_set


def test_the_file_has_what_the_model_gets(
    tmp_path: Path, tokenizer: Tokenizer, settings: SampleSettings
) -> None:
    """Compared with a collated batch, which is what a training feeds."""
    meta = make_playground(tmp_path, num_samples=10, seed=2)
    dataset = open_dataset(meta, tokenizer, settings, cache_dir=tmp_path / "cache")
    lookup = Lookup(meta)
    wanted = [7, 0, 9]
    report = dump(
        tmp_path / "x.npz",
        wanted,
        lambda sample_id: lookup.look(sample_id, tokenizer, settings, seed=3),
        image_size=56,
        metadata={"seq_length": 256, "tokenizer": "abc"},
    )
    assert (report.num_samples, report.invalid) == (3, ())
    assert report.num_bytes == (tmp_path / "x.npz").stat().st_size
    with np.load(tmp_path / "x.npz", allow_pickle=False) as file:
        assert file["sample_ids"].tolist() == wanted
        assert (int(file["metadata/seq_length"]), str(file["metadata/tokenizer"])) == (256, "abc")
        for sample_id in wanted:
            sample = dataset.sample(sample_id, seed=3, epoch=0, with_pixels=True)
            batch = collate([[sample]], {sample_id: 1.0}, image_size=56)
            labels = np.where(batch.loss_mask.numpy() > 0, batch.labels.numpy(), -100)
            np.testing.assert_array_equal(file[f"{sample_id}/input_ids"], batch.input_ids)
            np.testing.assert_array_equal(file[f"{sample_id}/labels"], labels)
            np.testing.assert_array_equal(file[f"{sample_id}/pixel_values"], batch.pixel_values)
            np.testing.assert_array_equal(file[f"{sample_id}/image_ids"], batch.image_ids)
            np.testing.assert_array_equal(
                file[f"{sample_id}/image_positions"], batch.image_positions
            )
            record = dataset.record(sample_id)
            assert str(file[f"{sample_id}/place"]) == record.place
            assert str(file[f"{sample_id}/id"]) == record.identity
            assert str(file[f"{sample_id}/reason"]) == ""


def test_invalid_samples_are_there_with_their_reason(
    tmp_path: Path, tokenizer: Tokenizer, settings: SampleSettings
) -> None:
    entries = [
        {"id": "good", "conversations": conversation("q", "a")},
        {"id": "odd", "conversations": conversation("q")},
        {"id": "lost", "image": "3.png", "conversations": conversation("q", "a")},
    ]
    meta = write_set(tmp_path, entries)
    (tmp_path / "tiny.jsonl").write_text((tmp_path / "tiny.jsonl").read_text() + "{\n")
    lookup = Lookup(meta)
    report = dump(
        tmp_path / "x.npz",
        range(4),
        lambda sample_id: lookup.look(sample_id, tokenizer, settings),
        image_size=56,
        metadata={},
    )
    assert [sample_id for sample_id, _ in report.invalid] == [1, 2, 3]
    with np.load(tmp_path / "x.npz") as file:
        assert str(file["1/reason"]).startswith("odd_turns: 1 turns")
        assert str(file["2/reason"]).startswith("image_unreadable: ")
        assert str(file["3/reason"]).startswith("malformed_record: not valid JSON")
        assert str(file["1/id"]) == "odd" and str(file["3/place"]).endswith("tiny.jsonl:4")
        assert file["0/pixel_values"].shape == (0, 3, 56, 56)
        names = {name for name in file.files if name.startswith(("1/", "2/", "3/"))}
        assert len(names) == 3 * len(("reason", "set", "place", "id"))


def test_pixels_can_be_left_out_and_bytes_are_the_same_again(
    tmp_path: Path, tokenizer: Tokenizer, settings: SampleSettings
) -> None:
    lookup = Lookup(make_playground(tmp_path, num_samples=4))
    for name in ("x", "y"):
        dump(
            tmp_path / f"{name}.npz",
            range(4),
            lambda sample_id: lookup.look(sample_id, tokenizer, settings, with_pixels=False),
            image_size=56,
            metadata={},
            with_pixels=False,
        )
    with np.load(tmp_path / "x.npz") as file:
        assert "0/labels" in file.files and "0/pixel_values" not in file.files
    assert (tmp_path / "x.npz").read_bytes() == (tmp_path / "y.npz").read_bytes()


def test_memory_does_not_grow_with_the_samples(
    tmp_path: Path, tokenizer: Tokenizer, settings: SampleSettings
) -> None:
    lookup = Lookup(make_playground(tmp_path, num_samples=1))
    small = lookup.look(0, tokenizer, settings)
    large = replace(small, images=(np.zeros((448, 448, 3), dtype=np.uint8),))
    one = 4 * 3 * 448 * 448

    def look(sample_id: int) -> Look:
        return replace(large, place=replace(large.place, sample_id=sample_id))

    tracemalloc.start()
    report = dump(tmp_path / "x.npz", range(30), look, image_size=448, metadata={})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert report.num_bytes > 30 * one
    assert peak < 4 * one


@pytest.mark.parametrize("error", [RuntimeError("killed"), OSError(28, "No space left on device")])
def test_a_dump_that_fails_leaves_nothing_and_keeps_what_was_there(
    tmp_path: Path,
    tokenizer: Tokenizer,
    settings: SampleSettings,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    lookup = Lookup(make_playground(tmp_path / "data", num_samples=4))
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "x.npz").write_bytes(b"before")
    write_array = dump_module.write_array

    def fail(archive: object, name: str, array: np.ndarray) -> None:
        if name == "2/labels":
            raise error
        write_array(archive, name, array)  # type: ignore[arg-type]

    monkeypatch.setattr(dump_module, "write_array", fail)
    expected = DataError if isinstance(error, OSError) else RuntimeError
    message = "cannot be written .No space left" if isinstance(error, OSError) else "killed"
    with pytest.raises(expected, match=message):
        dump(
            folder / "x.npz",
            range(4),
            lambda sample_id: lookup.look(sample_id, tokenizer, settings),
            image_size=56,
            metadata={},
        )
    assert [path.name for path in folder.iterdir()] == ["x.npz"]
    assert (folder / "x.npz").read_bytes() == b"before"


def test_an_output_that_cannot_be_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder; name a file in it"):
        check_output(tmp_path, overwrite=True)
    file = tmp_path / "x.npz"
    file.touch()
    with pytest.raises(ConfigError, match="exists already; give another name or --overwrite"):
        check_output(file, overwrite=False)
    check_output(file, overwrite=True)
    with pytest.raises(ConfigError, match=r"Not a directory|File exists"):
        check_output(file / "below" / "y.npz", overwrite=True)
    with pytest.raises(ConfigError, match=r"may take 1000000000\.0 GB .*--limit.*--no-pixels"):
        check_output(tmp_path / "y.npz", overwrite=False, num_bytes=10**18)
