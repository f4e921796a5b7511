"""Parquet files into numbered pictures."""

import builtins
import io
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from mmlm.errors import ConfigError, DataError
from mmlm.preparation.layout import Playground
from mmlm.preparation.synthdog import convert_parquet
from tests.preparation_helpers import files_below, picture, write_parquet

COLOURS = [(20 * number, 255 - 20 * number, 100) for number in range(12)]


def target(playground: Playground) -> Path:
    return playground.data / "synthdog-en/images"


@pytest.fixture
def source(playground: Playground) -> Path:
    folder = playground.downloads / "synthdog-en"
    pictures = [picture(colour=colour) for colour in COLOURS]
    # written in the wrong order: the names count
    write_parquet(folder / "data/train-00001-of-00084-aa.parquet", pictures[7:])
    write_parquet(folder / "data/train-00000-of-00084-bb.parquet", pictures[:7])
    return folder


def test_rows_are_numbered_through_the_files(playground: Playground, source: Path) -> None:
    assert convert_parquet(playground, source, workers=2) == 12
    assert files_below(target(playground)) == [f"{number:08d}.jpg" for number in range(12)]
    for number, colour in enumerate(COLOURS):
        with Image.open(target(playground) / f"{number:08d}.jpg") as image:
            assert image.format == "JPEG"
            assert np.abs(np.asarray(image, dtype=int) - colour).max() <= 6


def test_encoding_is_the_published_one(playground: Playground, source: Path) -> None:
    convert_parquet(playground, source, workers=1)
    expected = io.BytesIO()
    with Image.open(io.BytesIO(picture(colour=COLOURS[0]))) as image:
        image.save(expected, format="JPEG")  # Pillow's default quality
    assert (target(playground) / "00000000.jpg").read_bytes() == expected.getvalue()


def test_second_run_makes_only_what_is_missing(playground: Playground, source: Path) -> None:
    convert_parquet(playground, source, workers=1)
    kept = (target(playground) / "00000000.jpg").stat().st_mtime_ns
    (target(playground) / "00000002.jpg").unlink()
    (target(playground) / "00000009.jpg").unlink()
    assert convert_parquet(playground, source, workers=1) == 12
    assert len(files_below(target(playground))) == 12
    assert (target(playground) / "00000000.jpg").stat().st_mtime_ns == kept


def test_other_number_of_rows_is_told(
    playground: Playground, source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "mmlm"):
        convert_parquet(playground, source, workers=1)
    assert "12 rows in 2 parquet files, but the published annotations were made from 29765" in (
        caplog.text
    )


def test_without_a_file_there_is_nothing_to_do(playground: Playground) -> None:
    assert convert_parquet(playground, playground.downloads / "synthdog-en", workers=1) == 0


def test_column_of_plain_bytes_is_read_too(playground: Playground, tmp_path: Path) -> None:
    table = pyarrow.table({"image": [picture("PNG")]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert convert_parquet(playground, tmp_path, workers=1) == 1
    assert files_below(target(playground)) == ["00000000.jpg"]


@pytest.mark.parametrize("columns", [{"picture": [b"1"]}, {"image": ["a.jpg"]}])
def test_wrong_column_is_named(
    playground: Playground, tmp_path: Path, columns: dict[str, list[object]]
) -> None:
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet: needs a column 'image' of bytes.* but has"):
        convert_parquet(playground, tmp_path, workers=1)


def test_truncated_file_is_named(playground: Playground, source: Path) -> None:
    path = source / "data/train-00001-of-00084-aa.parquet"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(DataError, match=r"aa.parquet: not a complete parquet file"):
        convert_parquet(playground, source, workers=1)


def test_spoilt_data_are_named(playground: Playground, tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [picture() for _ in range(8)])
    data = bytearray(path.read_bytes())
    data[4:40] = bytes(36)
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"a.parquet: (not a complete parquet file|row 0)"):
        convert_parquet(playground, tmp_path, workers=1)


@pytest.mark.parametrize(
    ("data", "message"), [(b"no picture", "does not decode"), (b"", "the picture is empty")]
)
def test_row_that_is_no_picture_is_named(
    playground: Playground, tmp_path: Path, data: bytes, message: str
) -> None:
    write_parquet(tmp_path / "a.parquet", [picture(), picture(), data, picture()])
    with pytest.raises(DataError, match=rf"a.parquet: row 2 of row group 0: .*{message}"):
        convert_parquet(playground, tmp_path, workers=1)
    assert files_below(target(playground)) == ["00000000.jpg", "00000001.jpg"]


def test_pyarrow_is_asked_for(
    playground: Playground, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = builtins.__import__

    def without_pyarrow(
        name: str,
        globals: Mapping[str, object] | None = None,
        locals: Mapping[str, object] | None = None,
        fromlist: Sequence[str] = (),
        level: int = 0,
    ) -> object:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return original(name, globals, locals, fromlist, level)

    monkeypatch.setattr(builtins, "__import__", without_pyarrow)
    with pytest.raises(ConfigError, match=r"not installed: pip install 'mmlm\[data\]'"):
        convert_parquet(playground, source, workers=1)
