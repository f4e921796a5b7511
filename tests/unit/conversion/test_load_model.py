"""A model is filled from HuggingFace's files as from the converted checkpoint."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor

from mmlm.checkpoint.storage import load_sharded
from mmlm.config.schema import BackendConfig, ParallelConfig, TrainConfig
from mmlm.conversion.hf_weights import HFWeights, open_weights
from mmlm.conversion.load_model import load_hf_weights
from mmlm.conversion.vocabulary import EMBEDDING, HEAD
from mmlm.models.model_provider import build_model, load_weights, model_state, parameter_blocks
from mmlm.parallel.backend import resolve_backend
from mmlm.parallel.stage_plan import make_stage_plan
from mmlm.parallel.topology import initialize
from tests.conversion_helpers import convert_in
from tests.distributed.launch import run_ranks
from tests.tiny_weights import TINY_VISION_CONFIG, tiny_llm_config, write_parts


def fill_rank(folder: Path, checkpoint: Path, parallel: ParallelConfig) -> None:
    """Fill a model directly and another from the converted checkpoint; compare every parameter."""
    place = initialize(parallel)
    weights = open_weights(folder)
    plan = make_stage_plan(weights.model, parallel.num_stages)
    backend, train = resolve_backend(BackendConfig(), "fp32"), TrainConfig(dtype="fp32")
    found, expected = (
        build_model(weights.model, plan, place, backend, train, parallel) for _ in range(2)
    )
    bytes_read = load_hf_weights(found, place.groups, weights)
    loaded = load_sharded({"model": model_state(expected, place.groups)}, checkpoint)
    load_weights(expected, place.groups, loaded["model"])
    for chunk, same in zip(found, expected, strict=True):
        for (name, parameter), other in zip(
            chunk.named_parameters(), same.parameters(), strict=True
        ):
            assert torch.equal(parameter, other), name
    assert bytes_read == expected_bytes(weights, parameter_blocks(found, place.groups))


def expected_bytes(weights: HFWeights, blocks: Sequence[ShardedTensor]) -> int:
    """The rank's own share and what all ranks hold; and the head once, for the mean of its rows."""
    old_rows = weights.vocabulary.old_size
    num_bytes = sum(block.data.nbytes for block in blocks)
    for block in blocks:
        if block.key in (EMBEDDING, HEAD):
            rows = block.global_slice()[0]
            new_rows = rows.stop - max(rows.start, min(old_rows, rows.stop))
            bytes_a_row = block.data.nbytes // len(block.data)
            num_bytes -= new_rows * bytes_a_row
            num_bytes += old_rows * bytes_a_row if new_rows and block.key == HEAD else 0
    return num_bytes


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path, num_pieces: int):
    """Parts whose vocabulary has to grow, with heads for TP 4, and the checkpoint made of them."""
    folder = tmp_path_factory.mktemp("converted")
    llm = tiny_llm_config(num_pieces, num_key_value_heads=4)
    write_parts(folder / "parts", TINY_VISION_CONFIG, llm, shards=2)
    for file in tokenizer_dir.iterdir():
        shutil.copy(file, folder / "parts" / "llm")
    return folder / "parts", convert_in(folder / "parts", folder / "checkpoint")


@pytest.mark.distributed
@pytest.mark.parametrize("pp", [1, 2, 3])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_a_model_is_filled_in_any_layout(converted: tuple[Path, Path], tp: int, pp: int):
    parallel = ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    run_ranks(tp * pp, fill_rank, *converted, parallel)


@pytest.mark.distributed
def test_a_model_is_filled_with_virtual_stages(converted: tuple[Path, Path]):
    parallel = ParallelConfig(
        pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2
    )
    run_ranks(2, fill_rank, *converted, parallel)
