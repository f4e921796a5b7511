"""Iterations that are not finite: skipped to the bit, traced to sample, rank and layer, and an end.

The faults are put in by hand: pixels of one sample, a weight of one TP rank, the gradient of one
sample's rows, a sum that overflows.
"""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.transformer.transformer_layer import TransformerLayer

from mmlm.conversion.convert import hf_to_megatron
from mmlm.data.loader import BatchLoader
from mmlm.data.lookup import Lookup
from mmlm.data.sample import MAX_IMAGES_PER_SAMPLE
from mmlm.parallel import topology
from mmlm.parallel.backend import resolve_backend
from mmlm.train import trainer
from mmlm.train.bad_numbers import DivergenceError
from mmlm.train.row_samples import token_owners
from mmlm.train.train_step import StepResult
from tests.distributed.launch import RankFailure, run_ranks
from tests.distributed.test_errors import RECIPE, command_rank
from tests.distributed.test_trainer import config, curve
from tests.tiny_data import make_playground, make_tokenizer
from tests.tiny_weights import tiny_llm_config, tiny_vision_config, write_parts

BAD = 2  # the iteration that the faults are put into
SKIPPED = ("loss", "grad_norm")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_tokenizer(folder / "hf" / "llm")
    write_parts(folder / "hf", tiny_vision_config(), tiny_llm_config(448))
    hf_to_megatron(
        vision=folder / "hf" / "vision", llm=folder / "hf" / "llm", output=folder / "start"
    )
    make_playground(folder / "playground", 40)
    return folder


def state_of(optimizer: Any, scheduler: Any, model: Any) -> list[torch.Tensor]:
    """Everything that a step changes."""
    tensors = [
        p.detach().clone()
        for chunk in model
        # these are whole only after the next forward pass; their fp32 main weights are below
        if not chunk.ddp_config.overlap_param_gather
        for p in chunk.parameters()
    ]
    for part in optimizer.chained_optimizers:
        for key, values in part.optimizer.state.items():
            tensors += [key.detach().clone()]
            tensors += [v.clone() for v in values.values() if isinstance(v, torch.Tensor)]
        tensors += [torch.tensor(float(group.get("step", 0))) for group in part.param_groups]
    return [*tensors, torch.tensor(scheduler.num_steps)]


class Fault:
    """Stands around the trainer's step and its batches; one of the kinds below is put in.

    pixels: NaN in the pictures of the last pictured sample of the batch of DP rank `dp`.
    weight: an infinite element of a decoder's linear_fc1, on TP rank 1.
    gradient: an infinite gradient of one sample's rows behind decoder layer 0.
    overflow: a gradient so great that the square of the norm is infinite.
    reference: the iteration is left out without being done.
    none: nothing.
    """

    def __init__(self, kind: str, iterations: tuple[int, ...], dp: int = 0) -> None:
        self.kind, self.iterations, self.dp = kind, iterations, dp
        self.iteration = -1
        self.victim = -1
        self.untouched: list[bool] = []
        self.handles: list[int] = []
        self.real_step = trainer.train_step

    @property
    def is_on(self) -> bool:
        return self.iteration in self.iterations

    def batches(self, loader: BatchLoader, iteration: int) -> Any:
        self.iteration = iteration
        plan, batches = real_batches(loader, iteration)
        pictured = [
            (plan_row, number)
            for plan_row, rows in enumerate(plan.microbatches[self.dp])
            for row in rows
            for number in row
            if loader._dataset.table.num_images[number]
        ]
        self.victim = pictured[-1][1]
        if self.kind != "pixels" or not self.is_on or loader._rank != self.dp:
            return plan, batches
        poisoned = []
        for batch in batches:
            mine = batch.image_ids // MAX_IMAGES_PER_SAMPLE == self.victim
            if batch.pixel_values is not None and mine.any():
                pixels = batch.pixel_values.clone()
                pixels[mine, 1, 3, 3] = float("nan")
                batch = replace(batch, pixel_values=pixels)
            poisoned.append(batch)
        self.batch = poisoned
        return plan, poisoned

    def step(
        self, model: Any, optimizer: Any, scheduler: Any, *rest: Any, **begin: Any
    ) -> StepResult:
        before = state_of(optimizer, scheduler, model)
        if self.kind == "reference" and self.is_on:
            return StepResult(loss=math.nan, grad_norm=math.nan, learning_rate=0.0)
        self.batch = rest[1]
        changed = self.break_weight(model, rest[-1]) if self.kind == "weight" else None
        result = self.real_step(model, optimizer, scheduler, *rest, **begin)
        if not result.is_finite:
            after = state_of(optimizer, scheduler, model)
            if changed is None:
                self.untouched.append(
                    len(before) == len(after)
                    and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
                )
        self.handles.append(
            sum(len(m._forward_hooks) for chunk in model for m in chunk.modules())
            + sum(len(p._backward_hooks or ()) for chunk in model for p in chunk.parameters())
        )
        return result

    def break_weight(self, model: Any, place: Any) -> Any:
        if not self.is_on or place.tp_rank != 1:
            return None
        for chunk in model:
            for name, parameter in chunk.module.named_parameters():
                if "language_model.decoder.layers" in name and "fc1" in name:
                    parameter.data[0, 0] = float("inf")
                    return name
        return None

    def layer(self, layer: TransformerLayer, *args: Any, **kwargs: Any) -> Any:
        output, context = real_layer(layer, *args, **kwargs)
        owners = [token_owners(batch) for batch in getattr(self, "batch", ())]
        here = [o for o in owners if len(o) == len(output) and (o == self.victim).any()]
        if self.is_on and layer.layer_number == 1 and here:
            rows = (here[0] == self.victim).nonzero().flatten()
            if self.kind == "gradient":
                output = BrokenGradient.apply(output, rows, float("inf"))
            if self.kind == "overflow":
                output = BrokenGradient.apply(output, rows, 1e25)
        return output, context


class BrokenGradient(torch.autograd.Function):
    """The identity, whose gradient is something else in some rows."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rows: torch.Tensor, value: float) -> torch.Tensor:
        ctx.rows, ctx.value = rows, value
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        gradient = gradient.clone()
        gradient[ctx.rows] = ctx.value
        return gradient, None, None


real_batches = BatchLoader.batches
real_layer = TransformerLayer.forward


def train_with_fault(run: Any, kind: str, iterations: tuple[int, ...], dp: int) -> dict[str, Any]:
    fault = Fault(kind, iterations, dp)
    BatchLoader.batches = lambda loader, iteration: fault.batches(loader, iteration)
    TransformerLayer.forward = lambda layer, *a, **k: fault.layer(layer, *a, **k)
    trainer.train_step = fault.step
    victims: list[int] = []
    real_handle = trainer.BadNumbers.handle

    def handle(self: Any, plan: Any, batches: Any, step: Any, result: Any, count: Any) -> None:
        victims.append(fault.victim)
        real_handle(self, plan, batches, step, result, count)

    trainer.BadNumbers.handle = handle
    error = None
    try:
        place = topology.initialize(run.parallel)
        trainer.train(run, place, resolve_backend(run.backend))
    except DivergenceError as raised:
        error = str(raised)
    return {
        "victims": victims,
        "untouched": fault.untouched,
        "error": error,
        "hooks": fault.handles,
    }


def report_of(output: Path, iteration: int = BAD) -> dict[str, Any]:
    return json.loads((output / f"nonfinite_iteration_{iteration:07d}.json").read_text())


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("layout", "ranks", "train", "dp"),
    [
        ({"tp": 2, "pp": 2}, 8, {}, 1),
        ({"tp": 2, "pp": 2, "vpp": 2, "sp": True}, 4, {}, 0),
        ({"overlap": True}, 2, {"dtype": "bf16"}, 1),
        (
            {"pp": 2},
            2,
            {"recompute_vision_model": "full", "recompute_language_model": "full"},
            0,
        ),
    ],
    ids=str,
)
def test_one_bad_sample_is_named_and_its_iteration_left_out(
    world: Path, tmp_path: Path, layout: dict[str, Any], ranks: int, train: dict[str, Any], dp: int
) -> None:
    run = config(world, tmp_path / "bad", **layout, **train)
    results = run_ranks(ranks, train_with_fault, run, "pixels", (BAD,), dp)
    assert all(result["error"] is None for result in results)
    assert all(result["untouched"] == [True] for result in results), "bitwise, on every rank"
    assert all(len(set(result["hooks"])) == 1 for result in results), "no hook is left behind"
    victim = results[0]["victims"][BAD]
    report = report_of(tmp_path / "bad")
    (first,) = report["first"]
    assert (first["kind"], first["layer"], first["chunk"]) == ("activation", "pixel_values", 0)
    assert first["sample_ids"] == [victim]
    assert {each["dp_rank"] for each in first["ranks"]} == {dp}
    assert {each["pp_rank"] for each in first["ranks"]} == {0}
    place = Lookup(run.data.meta).place(victim)
    (sample,) = report["samples"]
    assert (sample["set"], sample["file"], sample["line"]) == (
        place.annotation_set.name,
        str(place.annotation_set.annotation),
        place.line,
    )
    assert report["loss"] == "nan" and report["replayed_loss"] == "nan"
    assert not (tmp_path / "bad" / f"nonfinite_iteration_{BAD + 1:07d}.json").exists()

    # the run went on as one in which the iteration was left out
    run_ranks(
        ranks,
        train_with_fault,
        replace(run, output_dir=str(tmp_path / "reference")),
        "reference",
        (BAD,),
        dp,
    )
    found, truth = curve(tmp_path / "bad"), curve(tmp_path / "reference")
    for name in SKIPPED:
        assert found[BAD][name] is None
        values = [line[name] for line in found]
        assert values == [line[name] for line in truth]
        assert all(value is not None for k, value in enumerate(values) if k != BAD)
    assert [line["nonfinite_iterations"] for line in found] == [0, 0, 1, 1, 1, 1]
    assert [line["nonfinite_in_a_row"] for line in found] == [0, 0, 1, 0, 0, 0]
    # the schedule waits as well
    assert found[BAD + 1]["learning_rate"] == found[BAD]["learning_rate"]


@pytest.mark.distributed
def test_too_many_in_a_row_end_the_run(world: Path, tmp_path: Path) -> None:
    run = config(world, tmp_path, tp=2, max_nonfinite_iterations=2)
    run = replace(run, checkpoint=replace(run.checkpoint, save_interval=1))
    results = run_ranks(2, train_with_fault, run, "pixels", (2, 3), 0)
    first, last = results[0]["victims"][2:]
    assert results[0]["error"] == results[1]["error"]
    error = results[0]["error"]
    assert error.startswith("iteration 3 was left out: loss nan, gradient norm nan, 2 in a row")
    assert "train.max_nonfinite_iterations is 2" in error
    assert f"the activation of pixel_values (chunk 0; rank 0: TP 0, PP 0, DP 0) in samples {last};"
    assert f"sample {last} is {world}/playground/opensource/pictured.jsonl:" in error
    assert str(tmp_path / "nonfinite_iteration_0000003.json") in error
    assert report_of(tmp_path, 2)["first"][0]["sample_ids"] == [first]
    assert report_of(tmp_path, 3)["first"][0]["sample_ids"] == [last]
    assert report_of(tmp_path, 3)["nonfinite_in_a_row"] == 2
    # the first bad one was left out and saved; after the last nothing is
    saved = sorted(each.name for each in (tmp_path / "checkpoints").glob("iter_*"))
    assert saved == ["iter_0000001", "iter_0000002", "iter_0000003"]
    assert len(curve(tmp_path)) == 4, "the last one is in the metrics"


@pytest.mark.distributed
def test_counters_schedule_and_adam_survive_a_resume(world: Path, tmp_path: Path) -> None:
    """Left out at 2, saved after 3, resumed: the same curve to the bit as without a stop."""
    run = config(world, tmp_path / "whole", tp=2)
    run_ranks(2, train_with_fault, run, "pixels", (BAD,), 0)
    part = replace(run, output_dir=str(tmp_path / "part"))
    (tmp_path / "part").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoints", tmp_path / "part" / "checkpoints")
    shutil.rmtree(tmp_path / "part" / "checkpoints" / "iter_0000006")
    (tmp_path / "part" / "checkpoints" / "latest").write_text("iter_0000003")
    run_ranks(2, train_with_fault, part, "none", (), 0)
    found, truth = curve(tmp_path / "part"), curve(tmp_path / "whole")[3:]
    for name in ("iteration", "loss", "grad_norm", "learning_rate", "nonfinite_iterations"):
        assert [line[name] for line in found] == [line[name] for line in truth], name
    assert found[0]["nonfinite_iterations"] == 1


@pytest.mark.distributed
def test_a_weight_of_one_rank_is_named(world: Path, tmp_path: Path) -> None:
    run = config(world, tmp_path, tp=2, pp=2, max_nonfinite_iterations=1)
    results = run_ranks(4, train_with_fault, run, "weight", (BAD,), 0)
    report = report_of(tmp_path)
    assert results[0]["error"] is not None
    layer = report["first"][0]["layer"]
    assert layer.startswith("language_model.decoder.layers.") and layer.endswith(".mlp.linear_fc1")
    assert all(each["tp_rank"] == 1 for first in report["first"] for each in first["ranks"])
    # every sample of every microbatch comes by that weight
    named = sorted(sample["sample_id"] for sample in report["samples"])
    assert named == sorted({s for rank in report["batch"] for row in rank for s in row})
    assert f"in {len(report['first']) - 3} other microbatches" in results[0]["error"]


@pytest.mark.distributed
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_infinite_gradient_behind_a_finite_loss(world: Path, tmp_path: Path, dtype: str) -> None:
    run = config(world, tmp_path, tp=2, pp=2, max_nonfinite_iterations=1, dtype=dtype)
    results = run_ranks(8, train_with_fault, run, "gradient", (BAD,), 1)
    assert all(result["untouched"] == [True] for result in results)
    report = report_of(tmp_path)
    assert isinstance(report["loss"], float) and isinstance(report["grad_norm"], str)
    # the same batches and the same drop path: the same number to the bit
    assert report["replayed_loss"] == report["loss"]
    (first,) = report["first"]
    assert (first["kind"], first["sample_ids"]) == ("gradient", [results[0]["victims"][BAD]])
    # the gradient that layer 0 hands to what is inside it
    assert first["layer"].startswith("language_model.decoder.layers.0")
    assert {each["dp_rank"] for each in first["ranks"]} == {1}


@pytest.mark.distributed
def test_a_norm_whose_square_overflows_counts_and_is_said(world: Path, tmp_path: Path) -> None:
    run = config(world, tmp_path, tp=2, max_nonfinite_iterations=1)
    results = run_ranks(2, train_with_fault, run, "overflow", (BAD,), 0)
    assert all(result["untouched"] == [True] for result in results)
    report = report_of(tmp_path)
    assert report["grad_norm"] == "inf" and isinstance(report["replayed_loss"], float)
    assert report["first"] == report["ranks"] == report["samples"] == []
    assert "A replay of it found every value finite" in results[0]["error"]


def command_with_fault(arguments: list[str], folder: Path) -> int:
    fault = Fault("pixels", tuple(range(99)))
    BatchLoader.batches = lambda loader, iteration: fault.batches(loader, iteration)
    return command_rank(arguments, folder)


@pytest.mark.distributed
def test_the_command_ends_with_one_message_and_status_1(world: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.py"
    meta = str(world / "playground" / "meta.json")
    text = RECIPE.format(output=str(tmp_path / "out"), meta=meta, load=str(world / "start"))
    recipe.write_text(text)
    with pytest.raises(RankFailure, match="rank 1: died without a result") as failure:
        run_ranks(2, command_with_fault, ["train", "--recipe", f"{recipe}:run"], tmp_path)
    assert "killed" not in str(failure.value), "both ended by themselves"
    written = "".join(file.read_text() for file in sorted(tmp_path.glob("stderr_*")))
    assert "Traceback" not in written and written.count("error: ") == 1, written
    assert "error: iteration 2 was left out: loss nan, gradient norm nan, 3 in a row" in written
    assert "iteration 0 was left out" in written and "iteration 1 was left out" in written
    assert not (tmp_path / "out" / "checkpoints" / "latest").exists()
