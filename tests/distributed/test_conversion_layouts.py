"""HuggingFace -> checkpoint -> a real model at a layout -> checkpoint -> HuggingFace, exactly.

Every TP x PP of {1, 2, 4} x {1, 2, 3}, both file formats and all element types.
"""

from pathlib import Path

import pytest
import torch

from mmlm.checkpoint.manifest import Manifest, resolve
from mmlm.checkpoint.save_load import save_checkpoint
from mmlm.checkpoint.storage import load_sharded
from mmlm.config.schema import BackendConfig, ParallelConfig, TrainConfig
from mmlm.conversion.convert import hf_to_megatron, megatron_to_hf
from mmlm.models.model_provider import build_model, load_weights, model_state
from mmlm.parallel.backend import resolve_backend
from mmlm.parallel.stage_plan import make_stage_plan
from mmlm.parallel.topology import initialize
from tests.conversion_helpers import assert_equal, convert_in
from tests.distributed.launch import run_ranks
from tests.tiny_data import make_tokenizer
from tests.tiny_weights import (
    FileFormat,
    combined_state_dict,
    read_model_files,
    tiny_llm_config,
    tiny_vision_config,
    write_parts,
)

pytestmark = pytest.mark.distributed

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FORMATS: tuple[FileFormat, ...] = ("safetensors", "bin")
LAYOUTS = [(tp, pp, None) for tp in (1, 2, 4) for pp in (1, 2, 3)] + [(2, 2, 2)]
QUICK = {
    (1, 1, None): "fp16-bin",
    (1, 2, None): "fp32-bin",
    (1, 3, None): "bf16-safetensors",
    (2, 1, None): "fp32-bin",
    (2, 2, None): "bf16-bin",
    (2, 2, 2): "fp16-safetensors",
    (2, 3, None): "fp32-safetensors",
    (4, 1, None): "bf16-safetensors",
    (4, 2, None): "fp16-bin",
    (4, 3, None): "bf16-bin",
}
"""What is run always: every layout with one of the six; the other five are slow."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``<dtype>-<format>/in`` with parts and ``.../start`` converted; with heads for TP 4."""
    folder = tmp_path_factory.mktemp("world")
    tokenizer = make_tokenizer(folder / "tokenizer")
    llm = tiny_llm_config(457, num_attention_heads=8, num_key_value_heads=4)
    for dtype_name, dtype in DTYPES.items():
        for file_format in FORMATS:
            place = folder / f"{dtype_name}-{file_format}"
            write_parts(place / "in", tiny_vision_config(), llm, 3, dtype, file_format, 2)
            for file in tokenizer.iterdir():
                (place / "in" / "llm" / file.name).write_bytes(file.read_bytes())
            convert_in(place / "in", place / "start")
    return folder


def through_a_model(
    folders: list[tuple[Path, Path]], layout: tuple[int, int, int | None]
) -> list[int]:
    """Load each checkpoint into this rank's chunks and save it again; its numbers of parameters."""
    tp, pp, vpp = layout
    parallel = ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
    )
    place = initialize(parallel)
    counts = []
    for source, target in folders:
        directory = resolve(source)
        manifest = Manifest.read(directory)
        plan = make_stage_plan(manifest.model, parallel.num_stages)
        chunks = build_model(
            manifest.model,
            plan,
            place,
            resolve_backend(BackendConfig(), "fp32"),
            TrainConfig(dtype="fp32"),
            parallel,
        )
        for chunk in chunks:
            chunk.to(DTYPES[manifest.dtype])
        loaded = load_sharded({"model": model_state(chunks, place.groups)}, directory)
        load_weights(chunks, place.groups, loaded["model"])
        counts.append(sum(each.numel() for chunk in chunks for each in chunk.parameters()))
        again = model_state(chunks, place.groups)
        save_checkpoint(target, {"model": again}, manifest, assets={}, save_total_limit=0)
    return counts


def cases() -> list[object]:
    """Each layout once with what is always run, and once with the rest."""
    found: list[object] = []
    every = tuple(f"{dtype}-{file_format}" for dtype in DTYPES for file_format in FORMATS)
    for layout in LAYOUTS:
        name = "x".join(str(size) for size in layout if size is not None)
        quick = QUICK[layout]
        found.append(pytest.param(layout, (quick,), id=name))
        rest = tuple(each for each in every if each != quick)
        found.append(pytest.param(layout, rest, id=f"{name}-rest", marks=pytest.mark.slow))
    return found


@pytest.mark.parametrize(("layout", "kinds"), cases())
def test_a_round_trip_is_exact_at_every_layout(
    world: Path, tmp_path: Path, layout: tuple[int, int, int | None], kinds: tuple[str, ...]
) -> None:
    folders = [(world / kind / "start", tmp_path / kind / "saved") for kind in kinds]
    num_ranks = layout[0] * layout[1]
    counts = run_ranks(num_ranks, through_a_model, folders, layout)
    assert all(count > 0 for of_rank in counts for count in of_rank)
    for kind in kinds:
        saved = resolve(tmp_path / kind / "saved")
        assert len(list(saved.glob("*.distcp"))) == num_ranks
        out = megatron_to_hf(load=saved, output=tmp_path / kind / "out")
        assert_equal(read_model_files(out), combined_state_dict(world / kind / "in"))


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_another_element_type_is_that_of_torch(world: Path, tmp_path: Path, dtype: str) -> None:
    """Converted on the way in or on the way out, from each type to each other."""
    for source in DTYPES:
        parts = world / f"{source}-safetensors" / "in"
        expected = {
            name: tensor.to(DTYPES[dtype]) for name, tensor in combined_state_dict(parts).items()
        }
        convert_in(parts, tmp_path / source / "ckpt", dtype=dtype)
        out = megatron_to_hf(load=tmp_path / source / "ckpt", output=tmp_path / source / "out")
        assert_equal(read_model_files(out), expected)
        start = world / f"{source}-safetensors" / "start"
        out = megatron_to_hf(load=start, output=tmp_path / source / "out2", dtype=dtype)
        assert_equal(read_model_files(out), expected)
        assert hf_to_megatron(combined=out, output=tmp_path / source / "again").is_dir()
