"""Shards that safetensors itself reads, and folders that appear whole or not at all."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from mmlm.conversion.hf_writer import (
    TensorSpec,
    atomic_folder,
    check_free_space,
    plan_shards,
    refuse_existing,
    write_safetensors,
    write_weights,
)
from mmlm.errors import CheckpointError
from tests.tiny_weights import read_model_files

TENSORS = {
    "b": torch.randn(4, 3).bfloat16(),
    "a": torch.randn(5, 3),
    "c": torch.randn(3, 5).half().T,
    "scalar": torch.tensor(2.5),
    "é": torch.randn(3),
}
SPECS = [
    TensorSpec(name=name, shape=tuple(tensor.shape), dtype=tensor.dtype)
    for name, tensor in TENSORS.items()
]


@pytest.mark.parametrize("max_shard_bytes", [1, 90, 10**9])
def test_safetensors_reads_what_was_written(tmp_path: Path, max_shard_bytes: int):
    write_weights(tmp_path, SPECS, TENSORS.items(), max_shard_bytes)
    found = read_model_files(tmp_path)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(spec.num_bytes for spec in SPECS)
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / file, "pt") as handle:
            assert handle.metadata() == {"format": "pt"}
            assert name in handle.keys()  # noqa: SIM118 (a handle is no dict)
    files = sorted(each.name for each in tmp_path.glob("*.safetensors"))
    assert files == [
        f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))
    ]


def test_one_file_with_numbers_and_metadata(tmp_path: Path):
    tensors = {
        "loss": torch.tensor(2.5, dtype=torch.float64),
        "ids": torch.tensor([3, 2**40]),
        "weights": torch.randn(3),
    }
    specs = [TensorSpec(name=n, shape=tuple(t.shape), dtype=t.dtype) for n, t in tensors.items()]
    file = tmp_path / "all.safetensors"
    write_safetensors(file, specs, iter(tensors.items()), {"who": "é"})
    with safe_open(file, "pt") as handle:
        assert handle.metadata() == {"who": "é"}
        for name, tensor in tensors.items():
            assert handle.get_tensor(name).dtype == tensor.dtype
            assert torch.equal(handle.get_tensor(name), tensor)


def test_shards_hold_what_fits():
    specs = [TensorSpec(name=str(i), shape=(10,), dtype=torch.float32) for i in range(5)]
    assert [len(shard) for shard in plan_shards(specs, 80)] == [2, 2, 1]
    assert [len(shard) for shard in plan_shards(specs, 79)] == [1] * 5
    assert [len(shard) for shard in plan_shards(specs, 1)] == [1] * 5


def test_an_error_leaves_nothing(tmp_path: Path):
    def fail_halfway() -> None:
        with atomic_folder(tmp_path / "out", overwrite=False) as folder:
            (folder / "half").write_text("")
            raise KeyError

    with pytest.raises(KeyError):
        fail_halfway()
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_replaced_only_on_request(tmp_path: Path):
    target = tmp_path / "out"
    target.mkdir()
    with atomic_folder(target, overwrite=False) as folder:  # empty: fine
        (folder / "first").write_text("")
    with pytest.raises(CheckpointError, match=r"out: exists already; give another folder or --ov"):
        refuse_existing(target, overwrite=False)
    with atomic_folder(target, overwrite=True) as folder:
        (folder / "second").write_text("")
    assert [each.name for each in target.iterdir()] == ["second"]
    assert list(tmp_path.iterdir()) == [target]
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file: exists already; give another folder$"):
        refuse_existing(tmp_path / "file", overwrite=True)


def test_a_full_disk_is_noticed_before_writing(tmp_path: Path):
    check_free_space(tmp_path / "not" / "there", 1)
    with pytest.raises(CheckpointError, match=r"1000000000\.0 GB are needed, .* GB are free"):
        check_free_space(tmp_path / "not" / "there", 10**18)
