"""``mmlm debug gradients``: the file against plain PyTorch, and the same file in every layout.

Errors are relative: of a loss by its value, of a tensor by its norm.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from mmlm.cli import main
from mmlm.config.schema import BackendConfig, CheckpointConfig, DataConfig, RunConfig, TrainConfig
from mmlm.conversion.convert import hf_to_megatron, megatron_to_hf
from mmlm.data.dataset import open_dataset
from mmlm.data.sample import SampleSettings
from mmlm.data.step_plan import samples_of
from mmlm.data.tokenizer import Tokenizer
from mmlm.layers.drop_path import drop_path_scales
from mmlm.parallel import topology
from mmlm.parallel.backend import resolve_backend
from mmlm.train.debug_gradients import GradientRequest, debug_gradients
from tests.distributed.launch import RankFailure, run_ranks
from tests.parity.reference_file import FileReference
from tests.parity.reference_model import ReferenceInternVL
from tests.tiny_data import make_playground, make_tokenizer
from tests.tiny_weights import (
    read_model_files,
    tiny_llm_config,
    tiny_vision_config,
    write_parts,
)

# measured: loss 4e-8, a sample's loss 9e-8, gradient norm 1.1e-7
LOSS_TOLERANCE = 1e-6
# measured: gradients 2.7e-6, logits 5.8e-7, image embeddings 3.7e-7, tower 1.4e-7
TENSOR_TOLERANCE = 1e-5

NUM_SAMPLES = 10
# more than there are: the batch is completed from the start of the epoch, two samples come twice
GLOBAL_BATCH_SIZE = 12
SEED = 5

pytestmark = pytest.mark.distributed


@dataclass(frozen=True, kw_only=True)
class Contents:
    """A file that was written."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]

    @classmethod
    def read(cls, path: Path) -> "Contents":
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return cls(tensors=tensors, metadata=file.metadata())


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as three parts, combined folder and checkpoint, and a small playground."""
    folder = tmp_path_factory.mktemp("world")
    make_tokenizer(folder / "parts" / "llm")
    write_parts(folder / "parts", tiny_vision_config(), tiny_llm_config(448))
    hf_to_megatron(
        vision=folder / "parts" / "vision",
        llm=folder / "parts" / "llm",
        output=folder / "checkpoint",
    )
    megatron_to_hf(load=folder / "checkpoint", output=folder / "combined")
    make_playground(folder / "playground", NUM_SAMPLES)
    return folder


def settings(world: Path, layout: dict[str, Any] | None = None, **train: Any) -> RunConfig:
    """Settings on the world; ``layout`` changes fields of ParallelConfig."""
    run = RunConfig(
        output_dir=str(world / "run"),
        data=DataConfig(seq_length=128, num_workers=0),
        train=TrainConfig(
            **{
                "global_batch_size": GLOBAL_BATCH_SIZE,
                "dtype": "fp32",
                "seed": SEED,
                "drop_path_seed": SEED,
                "loss_weight": "sample",
                "vision_drop_path_rate": 0.6,
                **train,
            }
        ),
        checkpoint=CheckpointConfig(load=str(world / "checkpoint")),
    )
    return replace(run, parallel=replace(run.parallel, **(layout or {})))


def debug_rank(run: RunConfig, request: GradientRequest) -> None:
    debug_gradients(
        run, request, topology.initialize(run.parallel), resolve_backend(BackendConfig())
    )


def debug(world: Path, output: Path, run: RunConfig, *, ranks: int = 1, **request: Any) -> Contents:
    """Write the file on some ranks and read it."""
    wanted = GradientRequest(meta=str(world / "playground" / "meta.json"), output=output, **request)
    run_ranks(ranks, debug_rank, run, wanted)
    return Contents.read(output)


@pytest.fixture(scope="module")
def reference(world: Path) -> FileReference:
    """The model of the combined folder and the data."""
    model = ReferenceInternVL(json.loads((world / "combined" / "config.json").read_text()))
    model.load_state_dict(read_model_files(world / "combined"))
    dataset = open_dataset(
        world / "playground" / "meta.json",
        Tokenizer(world / "combined"),
        SampleSettings(seq_length=128, image_size=56, embeddings_per_image=4),
        cache_dir=world / "cache",
    )
    return FileReference(model=model, dataset=dataset, seed=SEED)


def order(iteration: int) -> list[int]:
    """The samples of a global batch; all ten can be used."""
    _, places = samples_of(
        NUM_SAMPLES, seed=SEED, iteration=iteration, global_batch_size=GLOBAL_BATCH_SIZE
    )
    return places.tolist()


@pytest.fixture(scope="module")
def expected(reference: FileReference) -> dict[str, Tensor]:
    """The first global batch with everything, nothing dropped."""
    sample_ids = order(0)
    found = reference.expected(sample_ids, "sample")
    for sample_id in set(sample_ids):
        found |= reference.activations(sample_id)
    return found


def assert_close(found: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    """Same names, shapes and numbers; whole numbers exactly."""
    assert found.keys() == truth.keys()
    for name, value in truth.items():
        assert found[name].shape == value.shape, name
        if value.dtype == torch.int64:
            assert torch.equal(found[name], value), name
            continue
        difference = (found[name].double() - value.double()).norm()
        error = (difference / value.double().norm().clamp_min(1e-30)).item()
        is_loss = name in ("loss", "sample_losses", "grad_norm")
        assert error < (LOSS_TOLERANCE if is_loss else TENSOR_TOLERANCE), name


FULL = {"recompute_vision_model": "full", "recompute_language_model": "full"}


@pytest.mark.parametrize(
    ("ranks", "layout", "train"),
    [
        (1, {}, {}),
        (2, {}, {"micro_batch_size": 2}),
        (2, {"pipeline_layout": "vv|vpEtttL"}, {}),
        (2, {"virtual_pipeline_model_parallel_size": 2, "pipeline_layout": "v|vv|pEtt|tL"}, {}),
        (4, {"tensor_model_parallel_size": 2, "sequence_parallel": True}, FULL),
    ],
    ids=["one", "dp2", "cut-in-tower", "virtual", "tp2-pp2-sp-recompute"],
)
def test_file_is_the_reference_in_every_layout(
    ranks: int,
    layout: dict[str, Any],
    train: dict[str, Any],
    world: Path,
    tmp_path: Path,
    expected: dict[str, Tensor],
) -> None:
    if layout:
        layout = {"pipeline_model_parallel_size": 2, **layout}
    run = settings(world, layout, **train)
    found = debug(world, tmp_path / "out.safetensors", run, ranks=ranks, activations=True)
    assert_close(found.tensors, expected)
    assert {name: json.loads(found.metadata[name]) for name in ("settings", "batch")} == {
        "settings": {
            "dtype": "fp32",
            "seq_length": 128,
            "loss_weight": "sample",
            "vision_drop_path_rate": 0.0,
            "seed": SEED,
            "drop_path_seed": SEED,
        },
        "batch": {"iteration": 0, "global_batch_size": GLOBAL_BATCH_SIZE},
    }
    assert [file.name for file in tmp_path.iterdir()] == ["out.safetensors"]


def test_named_samples_of_which_one_dp_rank_has_no_image(
    world: Path, tmp_path: Path, reference: FileReference
) -> None:
    """One text and one picture on two DP ranks; the tower's odd tokens are padded for SP."""
    text, picture = 9, 2
    assert reference.dataset.table.num_images[[text, picture]].tolist() == [0, 1]
    layout = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    run = settings(world, layout, loss_weight="token")
    output = tmp_path / "out.safetensors"
    ids = (text, picture)
    found = debug(world, output, run, ranks=4, sample_ids=ids, activations=True)
    truth = reference.expected(list(ids), "token")
    for sample_id in ids:
        truth |= reference.activations(sample_id)
    assert_close(found.tensors, truth)
    assert json.loads(found.metadata["batch"]) == {"ids": "given"}
    assert f"sample/{text}/vision_output" not in found.tensors


def test_drop_path_is_that_of_the_iteration(
    world: Path, tmp_path: Path, reference: FileReference
) -> None:
    def drop_path(image_id: int, layer: int, branch: int) -> float:
        scales = drop_path_scales(
            seed=SEED, iteration=3, image_ids=[image_id], num_layers=3, max_rate=0.6
        )
        return float(scales[layer, branch, 0])

    run = settings(world)
    output = tmp_path / "out.safetensors"
    found = debug(world, output, run, iteration=3, drop_path=True)
    truth = reference.expected(order(3), "sample", drop_path)
    assert_close(found.tensors, truth)
    still = reference.expected(order(3), "sample")["loss"]
    assert abs(found.tensors["loss"] / still - 1) > 1e-4, "something must have been dropped"


def test_frozen_part_has_no_gradients(
    world: Path, tmp_path: Path, expected: dict[str, Tensor]
) -> None:
    layout = {"pipeline_model_parallel_size": 2, "pipeline_layout": "vvvp|EtttL"}
    run = settings(world, layout, freeze_vision_model=True)
    found = debug(world, tmp_path / "out.safetensors", run, ranks=2)
    gradients = {name for name in found.tensors if name.startswith("gradient/")}
    assert gradients == {
        name
        for name in expected
        if name.startswith("gradient/") and not name.startswith("gradient/vision_model.")
    }
    assert_close(
        {name: found.tensors[name] for name in gradients},
        {name: expected[name] for name in gradients},
    )
    assert json.loads(found.metadata["frozen"]) == ["vision_model"]


def command(world: Path, output: Path, *words: str) -> list[str]:
    return [
        *("debug", "gradients", "--data", str(world / "playground" / "meta.json")),
        *("--output", str(output), "--set", f"data.cache_dir={world / 'run' / 'data_cache'}"),
        *("--set", "data.seq_length=128", "--set", f"train.global_batch_size={GLOBAL_BATCH_SIZE}"),
        *("--set", "train.loss_weight=sample", "--set", f"train.seed={SEED}", *words),
    ]


def test_command_reads_weights_of_every_form(
    world: Path, tmp_path: Path, expected: dict[str, Tensor]
) -> None:
    """The precision is that of the weights, fp32; the bits do not depend on where they were."""
    files = []
    for option, source in (
        ("--load", "checkpoint"),
        ("--load-hf", "combined"),
        ("--load-hf", "parts"),
    ):
        output = tmp_path / f"{source}.safetensors"
        words = command(world, output, option, str(world / source))
        assert run_ranks(1, main, words) == [0]
        files.append(output)
    first, *others = [Contents.read(file) for file in files]
    batch = {name: value for name, value in expected.items() if not name.startswith("sample/")}
    assert_close(first.tensors, batch)
    for other in others:
        assert other.metadata == first.metadata
        assert other.tensors.keys() == first.tensors.keys()
        for name, tensor in first.tensors.items():
            assert torch.equal(other.tensors[name], tensor), name


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ((3, 10), "there is no sample 10; the sets have samples 0 to 9"),
        ((3, 3), "sample 3 is given twice"),
    ],
)
def test_samples_that_are_not_there(
    ids: tuple[int, ...], message: str, world: Path, tmp_path: Path
) -> None:
    with pytest.raises(RankFailure, match=message):
        debug(world, tmp_path / "out.safetensors", settings(world), sample_ids=ids)
    assert not list(tmp_path.iterdir())


def test_sample_that_is_left_out(world: Path, tmp_path: Path) -> None:
    meta = make_playground(tmp_path / "playground", 6)
    file = tmp_path / "playground" / "opensource" / "pictured.jsonl"
    lines = file.read_text().splitlines()
    lines[1] = lines[1].replace('"gpt"', '"bird"')
    file.write_text("\n".join(lines) + "\n")
    run = settings(world)
    run = replace(run, data=replace(run.data, policy="skip", cache_dir=str(tmp_path / "cache")))
    request = GradientRequest(meta=str(meta), output=tmp_path / "out", sample_ids=(1,))
    message = r"sample 1 \(.*pictured\.jsonl:2\) is left out of the training"
    with pytest.raises(RankFailure, match=message):
        run_ranks(1, debug_rank, run, request)


def test_failing_write_ends_every_rank(world: Path, tmp_path: Path) -> None:
    """Rank 0 cannot write; rank 1, which only sends, hears of it and nothing is left."""
    output = tmp_path / "gone" / "out.safetensors"
    with pytest.raises(RankFailure) as caught:
        debug(world, output, settings(world), ranks=2)
    text = str(caught.value)
    for rank in range(2):
        of_rank = text.split(f"rank {rank}:")[1].split("rank 1:")[0]
        assert "MmlmError" in of_rank and "No such file or directory" in of_rank
    assert not list(tmp_path.iterdir())
