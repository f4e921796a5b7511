"""One tokenizer and one playground for all tests of the data room."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmlm.data.annotation import AnnotationSet, read_meta
from mmlm.data.dataset import Dataset, open_dataset
from mmlm.data.sample import SampleSettings
from mmlm.data.tokenizer import Tokenizer
from tests.tiny_data import (
    EMBEDDINGS_PER_IMAGE,
    IMAGE_SIZE,
    conversation,
    make_playground,
    make_tokenizer,
    write_set,
)


@pytest.fixture(scope="session")
def settings() -> SampleSettings:
    return SampleSettings(
        seq_length=256, image_size=IMAGE_SIZE, embeddings_per_image=EMBEDDINGS_PER_IMAGE
    )


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(make_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="session")
def dataset(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, settings: SampleSettings
) -> Dataset:
    folder: Path = tmp_path_factory.mktemp("playground")
    meta = make_playground(folder, num_samples=23, seed=3)
    return open_dataset(meta, tokenizer, settings, cache_dir=folder / "cache")


@pytest.fixture
def tiny(tmp_path: Path) -> AnnotationSet:
    """A set with sound records at lines 1, 2 and 5, and broken ones at 3, 4, 6, 7 and 8."""
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    talk = conversation("What is this?", "A square.")
    entries: list[dict[str, Any]] = [
        {"id": 1, "image": "a.png", "conversations": talk},
        {"id": 2, "conversations": talk},
        {"id": 3, "image": "gone.png", "conversations": talk},
        {"id": 4, "image": ["a.png", "a.png"], "conversations": talk},
        {"id": 5, "image": ["a.png", "a.png"], "conversations": conversation("<image>" * 2, "x")},
        {"id": 6, "image": "broken.png", "conversations": talk},
        {"id": 7, "conversations": talk[:1]},
    ]
    meta = write_set(tmp_path, entries)
    with (tmp_path / "tiny.jsonl").open("a") as file:
        file.write('{"id": 8,\n')
    return read_meta(meta)[0]
