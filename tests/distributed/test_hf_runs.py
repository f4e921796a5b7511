"""Training from HuggingFace weights and to HuggingFace folders, without a converter in between.

The truth is a run from the converted checkpoint, and what ``megatron_to_hf`` makes of checkpoints.
"""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mmlm.checkpoint.manifest import ASSETS_DIR, resolve
from mmlm.config.schema import (
    BackendConfig,
    CheckpointConfig,
    DataConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from mmlm.conversion import hf_writer
from mmlm.conversion.convert import hf_to_megatron, megatron_to_hf
from mmlm.parallel import topology
from mmlm.parallel.backend import resolve_backend
from mmlm.train.evaluation_run import evaluate_checkpoint
from mmlm.train.trainer import train
from tests.distributed.launch import RankFailure, run_ranks
from tests.tiny_data import make_playground, make_tokenizer
from tests.tiny_weights import tiny_llm_config, tiny_vision_config, write_parts

pytestmark = pytest.mark.distributed

OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True, "ddp_bucket_size": 4000}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parts whose vocabulary lacks the nine tokens, the checkpoint made of them, a playground."""
    folder = tmp_path_factory.mktemp("world")
    tokenizer = make_tokenizer(folder / "hf" / "llm")
    write_parts(folder / "hf", tiny_vision_config(), tiny_llm_config(num_pieces(tokenizer)))
    hf_to_megatron(
        vision=folder / "hf" / "vision", llm=folder / "hf" / "llm", output=folder / "converted"
    )
    make_playground(folder / "playground", 24)
    return folder


def num_pieces(tokenizer: Path) -> int:
    import sentencepiece

    model = str(tokenizer / "tokenizer.model")
    return int(sentencepiece.SentencePieceProcessor(model_file=model).get_piece_size())


def config(
    world: Path, output: Path, train_iters: int, layout: dict[str, Any], **checkpoint: Any
) -> RunConfig:
    return RunConfig(
        output_dir=str(output),
        parallel=ParallelConfig(**layout),
        data=DataConfig(
            meta=str(world / "playground" / "meta.json"),
            seq_length=128,
            num_workers=0,
            cache_dir=str(world / "cache"),
        ),
        train=TrainConfig(global_batch_size=4, train_iters=train_iters, dtype="bf16"),
        optimizer=OptimizerConfig(lr=1e-2, lr_warmup_fraction=0.0),
        checkpoint=CheckpointConfig(**checkpoint),
    )


def train_rank(run: RunConfig) -> None:
    train(run, topology.initialize(run.parallel), resolve_backend(BackendConfig()))


class Runs(NamedTuple):
    """Two iterations from the converted checkpoint, and directly with exports."""

    converted: Path
    direct: Path


@pytest.fixture(scope="module")
def runs(world: Path) -> Runs:
    found = Runs(world / "run_converted", world / "run_direct")
    load, load_hf = str(world / "converted"), str(world / "hf")
    for run in (
        config(world, found.converted, 2, OVERLAP, load=load, save_interval=1, save_total_limit=0),
        # the first export comes alone, the second with a checkpoint
        config(
            world,
            found.direct,
            2,
            OVERLAP,
            load_hf=load_hf,
            export_hf_interval=1,
            save_total_limit=0,
        ),
    ):
        run_ranks(2, train_rank, run)
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def exported(checkpoint: Path, folder: Path) -> dict[str, bytes]:
    return contents(megatron_to_hf(load=checkpoint, output=folder))


def test_a_run_from_hugging_face_is_that_from_the_converted_checkpoint(
    runs: Runs, tmp_path: Path
) -> None:
    """The same weights to the bit after two steps, and the same small files in the checkpoint."""
    truth, found = (resolve(run / "checkpoints") for run in runs)
    assert found.name == truth.name == "iter_0000002"
    assert exported(found, tmp_path / "found") == exported(truth, tmp_path / "truth")
    assets = contents(found / ASSETS_DIR)
    assert assets == contents(truth / ASSETS_DIR)
    assert {"tokenizer.model", "added_tokens.json"} <= assets.keys()


def test_exports_are_those_of_the_checkpoints_to_the_byte(runs: Runs, tmp_path: Path) -> None:
    """Also where the updated weights are still spread over the DP ranks when it is time."""
    previous: dict[str, bytes] = {}
    for iteration in ("iter_0000001", "iter_0000002"):
        found = contents(runs.direct / "hf" / iteration)
        truth = exported(runs.converted / "checkpoints" / iteration, tmp_path / iteration)
        assert found.keys() == truth.keys()
        assert [name for name in truth if found[name] != truth[name]] == []
        assert found != previous, "the steps change the weights"
        previous = found
    assert sorted(each.name for each in (runs.direct / "hf").iterdir()) == [
        "iter_0000001",
        "iter_0000002",
    ]
    assert not (runs.converted / "hf").exists()


def test_a_resumed_run_ignores_the_folder_and_exports_in_its_own_layout(
    world: Path, tmp_path: Path
) -> None:
    """TP 2 x PP 2 with virtual stages; after the last iteration though the interval does not end;
    as many exports as checkpoints stay."""
    output = tmp_path / "run"
    options: dict[str, Any] = {
        "save_interval": 2,
        "export_hf_interval": 2,
        "save_total_limit": 2,
    }
    run_ranks(
        2, train_rank, config(world, output, 3, OVERLAP, load_hf=str(world / "hf"), **options)
    )
    for folder in ("hf", "checkpoints"):
        shutil.rmtree(output / folder / "iter_0000003")
    (output / "checkpoints" / "latest").write_text("iter_0000002\n")
    layout = {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": 2,
    }
    run_ranks(
        4, train_rank, config(world, output, 3, layout, load_hf=str(tmp_path / "gone"), **options)
    )
    names = ["iter_0000002", "iter_0000003"]
    for folder in ("hf", "checkpoints"):
        found = [each.name for each in sorted((tmp_path / "run" / folder).glob("iter_*"))]
        assert found == names
    truth = exported(resolve(tmp_path / "run" / "checkpoints"), tmp_path / "truth")
    assert contents(tmp_path / "run" / "hf" / "iter_0000003") == truth


def test_an_export_that_a_kill_cut_short_is_made_up_for(world: Path, tmp_path: Path) -> None:
    """Also when all iterations are done, so that there is nothing else to do."""
    run = config(world, tmp_path, 1, {}, load_hf=str(world / "hf"), export_hf_interval=1)
    run_ranks(1, train_rank, run)
    truth = contents(tmp_path / "hf" / "iter_0000001")
    (tmp_path / "hf" / "iter_0000001").rename(tmp_path / "hf" / ".iter_0000001.tmp")
    (tmp_path / "hf" / ".iter_0000000.tmp").mkdir()
    run_ranks(2, train_rank, run)
    assert [each.name for each in (tmp_path / "hf").iterdir()] == ["iter_0000001"]
    assert contents(tmp_path / "hf" / "iter_0000001") == truth


def evaluate_rank(run: RunConfig, meta: str) -> dict[str, Any]:
    return evaluate_checkpoint(
        run, meta, topology.initialize(run.parallel), resolve_backend(BackendConfig())
    )


def test_evaluation_is_that_of_the_converted_checkpoint(world: Path, tmp_path: Path) -> None:
    layout = {"tensor_model_parallel_size": 2}
    meta = str(world / "playground" / "meta.json")
    reports = [
        run_ranks(2, evaluate_rank, config(world, tmp_path, 1, layout, **source), meta)[0]
        for source in ({"load": str(world / "converted")}, {"load_hf": str(world / "hf")})
    ]
    assert reports[0] == reports[1]


def full_disk_rank(run: RunConfig) -> None:
    with pytest.MonkeyPatch.context() as patch:
        usage = shutil.disk_usage("/")._replace(free=1000)
        patch.setattr(hf_writer.shutil, "disk_usage", lambda path: usage)
        train_rank(run)


def failing_write_rank(run: RunConfig) -> None:
    def write(file: Path, *others: Any) -> None:
        raise OSError(28, "No space left on device", str(file))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf_writer, "write_safetensors", write)
        train_rank(run)


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (full_disk_rank, r"hf: 0\.0 GB are needed, 0\.0 GB are free"),
        (failing_write_rank, "No space left on device"),
    ],
)
def test_an_export_that_fails_is_an_error_of_every_rank(
    world: Path, tmp_path: Path, rank: Any, message: str
) -> None:
    """Nothing is left of it, and the checkpoint of the same iteration is there."""
    run = config(world, tmp_path, 1, {}, load_hf=str(world / "hf"), export_hf_interval=1)
    with pytest.raises(RankFailure, match=message) as caught:
        run_ranks(2, rank, run)
    for number in range(2):
        assert f"rank {number}:" in str(caught.value)
    assert not list(tmp_path.glob("hf/*"))
    assert resolve(tmp_path / "checkpoints").name == "iter_0000001"
