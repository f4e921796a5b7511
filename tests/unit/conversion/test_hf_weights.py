"""HuggingFace folders that are opened whole, and a model that is filled from them."""

import dataclasses
from pathlib import Path

import pytest
import torch

from mmlm.config.schema import BackendConfig, ParallelConfig, TrainConfig
from mmlm.conversion.convert import megatron_to_hf
from mmlm.conversion.hf_weights import HFWeights, load_hf_weights, open_weights
from mmlm.conversion.name_map import MODEL_PREFIX
from mmlm.errors import CheckpointError
from mmlm.models.model_provider import build_model, model_state
from mmlm.parallel.backend import resolve_backend
from mmlm.parallel.stage_plan import make_stage_plan
from mmlm.parallel.topology import initialize
from mmlm.train.gradients import gather_tensors
from tests.conversion_helpers import convert_in
from tests.distributed.launch import run_ranks
from tests.parity.parallel_run import main_shards


def read_all(weights: HFWeights) -> dict[str, torch.Tensor]:
    return {key: weights.reader.read(key) for key in weights.reader.dtypes}


@pytest.mark.parametrize("num_new_rows", [9, 0])
def test_combined_and_parts_are_the_same_weights(
    tmp_path: Path, write_tiny_parts, num_pieces: int, num_new_rows: int
):
    parts = write_tiny_parts(num_new_rows=num_new_rows)
    convert_in(parts, tmp_path / "checkpoint")
    megatron_to_hf(load=tmp_path / "checkpoint", output=tmp_path / "combined")
    three, one = open_weights(parts), open_weights(tmp_path / "combined")
    assert three.model == one.model
    assert three.model.language.vocab_size == num_pieces + 9
    assert three.dtype == one.dtype == "fp32"
    assert three.tokenizer_dir == parts / "llm"
    assert one.tokenizer_dir == tmp_path / "combined"
    found, expected = read_all(three), read_all(one)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (False, "nowhere: does not exist; give a combined InternVL-Chat folder, or one that holds"),
        (True, "nowhere: has neither config.json nor vision/ and llm/; give a combined"),
    ],
)
def test_another_folder_is_an_error(tmp_path: Path, make: bool, message: str):
    folder = tmp_path / "nowhere"
    if make:
        (folder / "vision").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=message):
        open_weights(folder)


def fill_rank(folder: Path, parallel: ParallelConfig) -> dict[str, torch.Tensor]:
    place = initialize(parallel)
    weights = open_weights(folder)
    plan = make_stage_plan(weights.model, parallel.num_stages)
    backend, train = resolve_backend(BackendConfig(), "fp32"), TrainConfig(dtype="fp32")
    chunks = build_model(weights.model, plan, place, backend, train, parallel)
    reads: list[str] = []
    read = weights.reader.read

    def counted(key: str) -> torch.Tensor:
        reads.append(key)
        return read(key)

    weights.reader.read = counted  # type: ignore[method-assign]
    load_hf_weights(chunks, place.groups, weights)
    assert len(reads) == len(set(reads)), "every tensor is read once"
    everything = len(weights.reader.dtypes)
    assert len(reads) == everything if place.pp_size == 1 else len(reads) < everything
    return gather_tensors(main_shards(model_state(chunks, place.groups, prefix="")))


@pytest.mark.distributed
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2)])
def test_a_model_is_filled_in_any_layout(write_tiny_parts, tp: int, pp: int):
    parts = write_tiny_parts(num_new_rows=0)
    parallel = dataclasses.replace(
        ParallelConfig(), tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp
    )
    found = run_ranks(tp * pp, fill_rank, parts, parallel)[0]
    expected = read_all(open_weights(parts))
    assert {MODEL_PREFIX + name for name in found} == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[MODEL_PREFIX + name]), name
