"""The trainer as a whole: a curve that no layout and no interruption changes, and its files."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from mmlm.checkpoint.manifest import Manifest, resolve
from mmlm.checkpoint.tensor_reader import TensorReader
from mmlm.config.presets import tiny
from mmlm.config.schema import (
    BackendConfig,
    CheckpointConfig,
    DataConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from mmlm.conversion.convert import hf_to_megatron, megatron_to_hf
from mmlm.data.dataset import open_dataset
from mmlm.data.ledger import LEDGER_FILE
from mmlm.data.sample import SampleSettings
from mmlm.data.tokenizer import Tokenizer
from mmlm.errors import ConfigError
from mmlm.models.model_provider import build_model, initialize_weights, model_state
from mmlm.parallel import topology
from mmlm.parallel.backend import resolve_backend
from mmlm.parallel.stage_plan import make_stage_plan
from mmlm.train.evaluation_run import evaluate_checkpoint
from mmlm.train.gradients import gather_tensors
from mmlm.train.trainer import train
from tests.distributed.launch import RankFailure, run_ranks
from tests.parity.parallel_run import main_shards
from tests.parity.reference_model import ReferenceInternVL
from tests.tiny_data import make_playground, make_tokenizer
from tests.tiny_weights import tiny_llm_config, tiny_vision_config, write_parts

TRAIN_ITERS = 6
# of losses and gradient norms between layouts; measured 1.3e-7
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights converted from HuggingFace's format, and a playground."""
    folder = tmp_path_factory.mktemp("world")
    make_tokenizer(folder / "hf" / "llm")
    write_parts(folder / "hf", tiny_vision_config(), tiny_llm_config(448))
    hf_to_megatron(
        vision=folder / "hf" / "vision", llm=folder / "hf" / "llm", output=folder / "start"
    )
    make_playground(folder / "playground", 40)
    return folder


def config(
    world: Path,
    output: Path,
    *,
    tp: int = 1,
    pp: int = 1,
    vpp: int | None = None,
    sp: bool = False,
    overlap: bool = False,
    **train: Any,
) -> RunConfig:
    return RunConfig(
        output_dir=str(output),
        parallel=ParallelConfig(
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=vpp,
            sequence_parallel=sp,
            overlap_grad_reduce=overlap,
            overlap_param_gather=overlap,
            ddp_bucket_size=4000 if overlap else None,
        ),
        data=DataConfig(
            meta=str(world / "playground" / "meta.json"), seq_length=128, num_workers=0
        ),
        train=TrainConfig(
            **{
                "global_batch_size": 8,
                "dtype": "fp32",
                "vision_drop_path_rate": 0.3,
                "train_iters": TRAIN_ITERS,
                **train,
            }
        ),
        optimizer=OptimizerConfig(lr=1e-3, adam_eps=1e-6),
        checkpoint=CheckpointConfig(load=str(world / "start"), save_interval=3, save_total_limit=0),
    )


def train_rank(run: RunConfig) -> None:
    train(run, topology.initialize(run.parallel), resolve_backend(BackendConfig()))


def curve(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def assert_same_curve(found: list[dict[str, Any]], truth: list[dict[str, Any]]) -> None:
    for name in ("iteration", "consumed_samples", "learning_rate"):
        assert [line[name] for line in found] == [line[name] for line in truth]
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in found] == pytest.approx(
            [line[name] for line in truth], rel=TOLERANCE
        )


@pytest.fixture(scope="module")
def uninterrupted(world: Path) -> Path:
    """A run to the end at TP 2 x PP 2 x DP 1."""
    output = world / "uninterrupted"
    run_ranks(4, train_rank, config(world, output, tp=2, pp=2))
    return output


@pytest.mark.distributed
def test_run_leaves_what_it_promises(uninterrupted: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lines = curve(uninterrupted)
    assert [line["iteration"] for line in lines] == list(range(TRAIN_ITERS))
    assert lines[-1]["consumed_samples"] == TRAIN_ITERS * 8
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[0]["learning_rate"] == 0.0
    assert all(0 < line["pack_fill"] <= 1 for line in lines)
    latest = resolve(uninterrupted / "checkpoints")
    assert latest.name == f"iter_{TRAIN_ITERS:07d}"
    manifest = Manifest.read(latest)
    assert manifest.has_optimizer
    assert manifest.run_config["train"]["global_batch_size"] == 8
    assert (latest / "hf_assets" / "tokenizer.model").is_file()
    board = EventAccumulator(str(uninterrupted / "tensorboard"))
    board.Reload()
    ledger = (uninterrupted / LEDGER_FILE).read_text().splitlines()
    assert "repaired" in {json.loads(line)["action"] for line in ledger}
    repaired = board.Scalars("data_ledger/repaired/placeholder_inserted")
    assert [event.step for event in repaired] == [0] and repaired[0].value > 0
    assert json.loads((uninterrupted / "config.json").read_text())["train"]["seed"] == 42


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("layout", "dp"),
    [
        ({}, 1),
        ({"pp": 3}, 1),
        ({"tp": 2}, 2),
        ({"overlap": True}, 2),
        ({"tp": 2, "pp": 2, "vpp": 2, "sp": True}, 1),
    ],
    ids=str,
)
def test_resume_at_another_layout_continues_the_curve(
    world: Path, uninterrupted: Path, tmp_path: Path, layout: dict[str, Any], dp: int
) -> None:
    middle = "iter_0000003"
    shutil.copytree(uninterrupted / "checkpoints" / middle, tmp_path / "checkpoints" / middle)
    (tmp_path / "checkpoints" / "latest").write_text(middle)
    ranks = layout.get("tp", 1) * layout.get("pp", 1) * dp
    run_ranks(ranks, train_rank, config(world, tmp_path, **layout))
    assert_same_curve(curve(tmp_path), curve(uninterrupted)[3:])
    truth = TensorReader(resolve(uninterrupted / "checkpoints"))
    found = TensorReader(resolve(tmp_path / "checkpoints"))
    assert found.infos == truth.infos, "names, true shapes and types do not depend on the layout"
    for key in truth.infos:
        value, wanted = found.read(key).double(), truth.read(key).double()
        # measured: 2e-6 on a second moment
        assert (value - wanted).norm() <= 1e-5 * wanted.norm() + 1e-12, key


@pytest.mark.distributed
def test_checkpoint_holds_no_padding(uninterrupted: Path) -> None:
    infos = TensorReader(resolve(uninterrupted / "checkpoints")).infos
    name = "vision_model.decoder.layers.1.self_attention.linear_qkv.weight"
    embedding = "language_model.embedding.word_embeddings.weight"
    for prefix in ("model.", "optimizer.state.exp_avg.model."):
        assert infos[prefix + name].shape == (5 * 3 * 8, 40)
        assert infos[prefix + embedding].shape == (457, 48)


@pytest.mark.distributed
def test_resume_after_the_end_does_nothing(world: Path, uninterrupted: Path) -> None:
    before = (uninterrupted / "metrics.jsonl").read_text()
    run_ranks(1, train_rank, config(world, uninterrupted))
    assert (uninterrupted / "metrics.jsonl").read_text() == before


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"global_batch_size": 4}, "train.global_batch_size was 8 and is 4"),
        ({"seed": 7}, "train.seed was 42 and is 7"),
        ({"dtype": "bf16"}, "train.dtype was fp32 and is bf16"),
    ],
)
def test_resume_with_other_settings_is_refused(
    world: Path, uninterrupted: Path, changes: dict[str, Any], text: str
) -> None:
    with pytest.raises(RankFailure, match=text) as failure:
        run_ranks(1, train_rank, config(world, uninterrupted, **changes))
    assert ConfigError.__name__ in str(failure.value)


@pytest.mark.distributed
def test_resume_on_other_data_is_refused(world: Path, uninterrupted: Path, tmp_path: Path) -> None:
    meta = make_playground(tmp_path / "playground", 24, seed=1)
    run = config(world, uninterrupted)
    run = replace(run, data=replace(run.data, meta=str(meta)))
    with pytest.raises(RankFailure, match="was trained on other data"):
        run_ranks(1, train_rank, run)


@pytest.mark.distributed
def test_assets_survive_the_checkpoint_that_the_run_resumed_from(
    world: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    middle = "iter_0000003"
    shutil.copytree(uninterrupted / "checkpoints" / middle, tmp_path / "checkpoints" / middle)
    run = config(world, tmp_path)
    run = replace(run, checkpoint=replace(run.checkpoint, save_interval=1, save_total_limit=1))
    run_ranks(1, train_rank, run)
    (left,) = (tmp_path / "checkpoints").glob("iter_*")
    assert left.name == "iter_0000006"
    for file in (uninterrupted / "checkpoints" / middle / "hf_assets").iterdir():
        assert (left / "hf_assets" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("layout", "ranks"), [({}, 2), ({"pp": 2, "vpp": 2, "overlap": True}, 4)], ids=str
)
def test_bf16_resumes_from_fp32_main_weights(
    world: Path, tmp_path: Path, layout: dict[str, Any], ranks: int
) -> None:
    def run(name: str) -> None:
        settings = config(world, tmp_path / name, dtype="bf16", **layout)
        run_ranks(ranks, train_rank, settings)

    run("whole")
    middle = "iter_0000003"
    shutil.copytree(
        tmp_path / "whole" / "checkpoints" / middle, tmp_path / "rest" / "checkpoints" / middle
    )
    run("rest")
    # the same layout and the same main weights and moments: the same numbers to the bit
    found, truth = curve(tmp_path / "rest"), curve(tmp_path / "whole")[3:]
    assert [line["loss"] for line in found] == [line["loss"] for line in truth]
    infos = TensorReader(resolve(tmp_path / "rest" / "checkpoints")).infos
    name = "model.language_model.output_layer.weight"
    assert infos[name].dtype == torch.bfloat16
    assert infos[f"optimizer.state.param.{name}"].dtype == torch.float32


def evaluate_rank(run: RunConfig, meta: str) -> dict[str, Any]:
    place = topology.initialize(run.parallel)
    return evaluate_checkpoint(run, meta, place, resolve_backend(BackendConfig()))


def reference_scores(hf: Path, meta: Path, cache: Path) -> tuple[float, list[bool]]:
    """Mean cross entropy a token, and for each answer whether greedy decoding gives it.

    Plain PyTorch, one sample at a time, from an exported HuggingFace folder.
    """
    tensors: dict[str, torch.Tensor] = {}
    for file in hf.glob("*.safetensors"):
        tensors.update(load_file(file))
    model = ReferenceInternVL(json.loads((hf / "config.json").read_text()))
    model.load_state_dict(tensors)
    tokenizer = Tokenizer(hf)
    settings = SampleSettings(seq_length=128, image_size=56, embeddings_per_image=4)
    dataset = open_dataset(meta, tokenizer, settings, cache_dir=cache)
    losses, answers = [], []
    for sample_id in dataset.table.usable.tolist():
        sample = dataset.sample(sample_id, seed=0, epoch=0, with_pixels=True)
        with torch.no_grad():
            logits = model(
                torch.from_numpy(sample.input_ids),
                torch.from_numpy(sample.pixel_values),
                torch.from_numpy(sample.image_ids),
                tokenizer.img_context_id,
            )
        labels = torch.from_numpy(sample.labels)
        losses.append(cross_entropy(logits, labels, ignore_index=-100, reduction="none"))
        right, answer = logits.argmax(-1) == labels, []
        for position in range(len(labels)):
            if labels[position] != -100:
                answer.append(bool(right[position]))
            elif answer:
                answers.append(all(answer))
                answer = []
    every = torch.cat(losses)
    return (every.sum() / (every != 0).sum()).item(), answers


@pytest.mark.distributed
def test_evaluation_equals_the_reference_on_the_exported_weights(
    world: Path, tmp_path: Path
) -> None:
    """Training at PP 2, export, evaluation at TP 2 x PP 2 x VPP 2 with SP against the export."""
    run = config(world, tmp_path, pp=2, train_iters=80, vision_drop_path_rate=0.0)
    run = replace(run, optimizer=OptimizerConfig(lr=1e-2))
    run = replace(run, checkpoint=replace(run.checkpoint, save_interval=0))
    run_ranks(2, train_rank, run)
    megatron_to_hf(load=tmp_path / "checkpoints", output=tmp_path / "hf")
    loss, answers = reference_scores(tmp_path / "hf", Path(run.data.meta), tmp_path / "cache")
    assert 0 < sum(answers) < len(answers), "both rights and wrongs must be seen"
    layout = config(world, tmp_path, tp=2, pp=2, vpp=2, sp=True).parallel
    load = CheckpointConfig(load=str(tmp_path / "checkpoints"))
    judged = replace(run, parallel=layout, checkpoint=load)
    report, *rest = run_ranks(4, evaluate_rank, judged, run.data.meta)
    assert rest == [{}, {}, {}]
    assert report["total"]["num_answers"] == len(answers)
    assert report["total"]["exact_match"] == pytest.approx(sum(answers) / len(answers))
    # measured: 1e-7
    assert report["total"]["loss"] == pytest.approx(loss, rel=TOLERANCE)
    assert set(report["sets"]) == {"pictured", "text_only"}
    assert sum(scores["num_samples"] for scores in report["sets"].values()) == 40


def fresh_weights_rank(run: RunConfig) -> dict[str, torch.Tensor]:
    place = topology.initialize(run.parallel)
    plan = make_stage_plan(run.model, place.pp_size)
    chunks = build_model(run.model, plan, place, resolve_backend(BackendConfig()), run.train)
    initialize_weights(chunks, place.groups, seed=3)
    return gather_tensors(main_shards(model_state(chunks, place.groups, prefix="")))


@pytest.mark.distributed
def test_fresh_weights_do_not_depend_on_the_layout(world: Path, tmp_path: Path) -> None:
    run = replace(config(world, tmp_path), model=tiny())
    (alone,) = run_ranks(1, fresh_weights_rank, run)
    parallel = replace(run, parallel=config(world, tmp_path, tp=2, pp=2).parallel)
    together = run_ranks(4, fresh_weights_rank, parallel)[0]
    assert alone.keys() == together.keys()
    for name, tensor in alone.items():
        assert torch.equal(tensor, together[name]), name
    assert alone["vision_model.decoder.layers.0.attention_scale"].eq(0.1).all()
