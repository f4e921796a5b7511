"""What ``mmlm debug gradients`` announces, and the files that it refuses to write."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from mmlm.config.presets import tiny
from mmlm.data.step_plan import SampleTable
from mmlm.errors import ConfigError
from mmlm.train.gradient_file import check_output, sample_specs


def test_a_good_place_stays_as_it_is(tmp_path: Path) -> None:
    output = tmp_path / "new" / "out.safetensors"
    check_output(output, overwrite=False)
    assert list(output.parent.iterdir()) == []
    output.write_text("before")
    check_output(output, overwrite=True)
    assert output.read_text() == "before"


@pytest.mark.parametrize(
    ("name", "overwrite", "message"),
    [
        ("file", False, "file: exists already; give another name or --overwrite"),
        ("folder", True, "folder: is a folder; name a file in it"),
        ("file/out", False, "file/out: "),  # what follows is the system's
    ],
)
def test_a_bad_place_is_refused(name: str, overwrite: bool, message: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match=re.escape(f"--output {tmp_path}/{message}")):
        check_output(tmp_path / name, overwrite=overwrite)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "folder"]


def test_samples_without_images_have_no_image_tensors() -> None:
    table = SampleTable(
        num_tokens=np.array([9, 30]),
        num_images=np.array([0, 2]),
        num_supervised_tokens=np.array([3, 5]),
        usable=np.arange(2),
    )
    model = tiny()
    vision, language = model.vision, model.language
    text = {spec.name: (spec.shape, spec.dtype) for spec in sample_specs(0, table, model)}
    assert text == {
        "sample/0/input_ids": ((9,), torch.int64),
        "sample/0/label_positions": ((3,), torch.int64),
        "sample/0/labels": ((3,), torch.int64),
        "sample/0/logits": ((3, language.vocab_size), torch.float32),
    }
    shapes = {spec.name: spec.shape for spec in sample_specs(1, table, model)}
    size = vision.image_size
    assert shapes["sample/1/pixel_values"] == (2, 3, size, size)
    assert shapes["sample/1/vision_output"] == (2, vision.tokens_per_image, vision.hidden_size)
    assert shapes["sample/1/image_embeddings"] == (
        2,
        vision.embeddings_per_image,
        language.hidden_size,
    )
