"""The playground on disk: published layout, right counts, no held-out picture in training."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from examples.internvl_v1_2.demo.playground import (
    HELD_OUT_META,
    TRAINING_META,
    PlaygroundSettings,
    read_texts,
    write,
)
from examples.internvl_v1_2.demo.tasks import SETS
from mmlm.data.image import load_image


def read(world: Path, meta: str) -> dict[str, list[dict[str, Any]]]:
    sets = json.loads((world / meta).read_text("utf-8"))
    return {
        name: [json.loads(line) for line in Path(entry["annotation"]).read_text().splitlines()]
        for name, entry in sets.items()
    }


def pictures(world: Path, meta: str) -> list[Path]:
    sets = json.loads((world / meta).read_text("utf-8"))
    return [
        Path(sets[name]["root"]) / record["image"]
        for name, records in read(world, meta).items()
        for record in records
        if "image" in record
    ]


def test_lengths_are_true(world: Path) -> None:
    for meta in (TRAINING_META, HELD_OUT_META):
        sets = json.loads((world / meta).read_text("utf-8"))
        records = read(world, meta)
        assert list(sets) == [spec.name for spec in SETS]
        assert {name: len(found) for name, found in records.items()} == {
            name: entry["length"] for name, entry in sets.items()
        }
    assert sum(map(len, read(world, TRAINING_META).values())) == pytest.approx(270, abs=5)
    assert sum(map(len, read(world, HELD_OUT_META).values())) == 27


def test_pictures_are_there_and_named_as_published(world: Path) -> None:
    for spec in SETS:
        folder = world / "playground/data" / spec.root / spec.folder
        assert any(folder.glob(f"*.{spec.extension}")), folder
    for meta in (TRAINING_META, HELD_OUT_META):
        assert all(file.is_file() for file in pictures(world, meta))


def test_records_have_the_published_form(world: Path) -> None:
    for records in read(world, TRAINING_META).values():
        for record in records:
            turns = record["conversations"]
            assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
            with_image = "image" in record
            assert turns[0]["value"].startswith("<image>\n") == with_image
            assert sum(turn["value"].count("<image>") for turn in turns) == with_image


def test_sizes_in_the_record_are_those_of_the_picture(world: Path) -> None:
    sets = json.loads((world / TRAINING_META).read_text("utf-8"))
    for name, records in read(world, TRAINING_META).items():
        record = next(record for record in records if "image" in record)
        picture = load_image(Path(sets[name]["root"]) / record["image"])
        assert picture.size == (record["width"], record["height"])


def test_no_held_out_picture_is_trained_on(world: Path) -> None:
    def digests(meta: str) -> set[str]:
        return {hashlib.sha256(file.read_bytes()).hexdigest() for file in pictures(world, meta)}

    assert not digests(TRAINING_META) & digests(HELD_OUT_META)


def test_same_settings_same_files(tmp_path: Path) -> None:
    settings = PlaygroundSettings(training_samples=100, held_out_samples=9, seed=3)
    contents = []
    for name in ("a", "b"):
        write(tmp_path / name, settings, Path("final"))
        files = sorted(file for file in (tmp_path / name).rglob("*") if file.is_file())
        contents.append([(str(f.relative_to(tmp_path / name)), f.read_bytes()) for f in files])
    assert contents[0] == contents[1]


def test_texts_are_without_the_image_mark(world: Path) -> None:
    texts = read_texts(world)
    assert len(texts) > 2 * 270
    assert not any("<image>" in text for text in texts)


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="training_samples 50 must be at least 100"):
        PlaygroundSettings(training_samples=50)
