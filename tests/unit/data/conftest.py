"""One tokenizer and one playground for all tests of the data room."""

from pathlib import Path

import pytest

from mmlm.data.dataset import Dataset, open_dataset
from mmlm.data.sample import SampleSettings
from mmlm.data.tokenizer import Tokenizer
from tests.tiny_data import EMBEDDINGS_PER_IMAGE, IMAGE_SIZE, make_playground, make_tokenizer


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
