"""Batches ahead of training: complete, the same for any number of workers, errors with a place."""

import json
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mmlm.data import loader as loader_room
from mmlm.data import sample as sample_room
from mmlm.data.collate import Batch
from mmlm.data.dataset import Dataset, open_dataset
from mmlm.data.loader import BatchLoader
from mmlm.data.planners import EvaluationPlanner, TrainPlanner
from mmlm.data.sample import MAX_IMAGES_PER_SAMPLE, SampleSettings
from mmlm.data.tokenizer import Tokenizer
from mmlm.data.workers import Pictures, decode
from mmlm.errors import DataError
from tests.tiny_data import conversation, make_playground, write_set

LAYOUT = {"global_batch_size": 8, "seq_length": 256, "micro_batch_size": 1, "data_parallel_size": 2}


def planner(dataset: Dataset) -> TrainPlanner:
    return TrainPlanner(table=dataset.table, seed=1, **LAYOUT)


def loader(dataset: Dataset, **options: Any) -> BatchLoader:
    arguments = {"data_parallel_rank": 0, "end_iteration": 5, **options}
    return BatchLoader(dataset, arguments.pop("planner", planner(dataset)), **arguments)


def same(first: Batch, second: Batch) -> bool:
    return all(
        torch.equal(value, getattr(second, name))
        if isinstance(value, torch.Tensor)
        else value == getattr(second, name)
        for name, value in vars(first).items()
    )


def test_microbatches_follow_the_plan(dataset: Dataset) -> None:
    for rank in (0, 1):
        with loader(dataset, data_parallel_rank=rank, pad_to_multiple_of=4) as source:
            plan, batches = source.batches(0)
        assert plan == planner(dataset).plan(0)
        expected = [
            tuple(sample for row in rows for sample in row) for rows in plan.microbatches[rank]
        ]
        assert [batch.sample_ids for batch in batches] == expected
        for batch in batches:
            assert len(batch.input_ids) % 4 == 0
            positions = batch.input_ids == dataset.tokenizer.img_context_id
            assert batch.image_positions.tolist() == torch.nonzero(positions).flatten().tolist()
            assert batch.pixel_values is not None
            assert len(batch.pixel_values) * 4 == len(batch.image_positions)


def test_the_weights_of_all_ranks_sum_to_one(dataset: Dataset) -> None:
    total = 0.0
    for rank in (0, 1):
        with loader(dataset, data_parallel_rank=rank) as source:
            total += sum(float(batch.loss_mask.sum()) for batch in source.batches(2)[1])
    assert total == pytest.approx(1.0, rel=1e-5)


def test_order_workers_and_resuming_change_nothing(dataset: Dataset) -> None:
    with loader(dataset) as source:
        first = [source.batches(iteration)[1] for iteration in range(5)]
    with loader(dataset, num_workers=2, prefetch_iterations=2) as source:
        second = {iteration: source.batches(iteration)[1] for iteration in (3, 4, 0)}
    for iteration, batches in second.items():
        assert len(batches) == len(first[iteration])
        assert all(same(a, b) for a, b in zip(batches, first[iteration], strict=True))


def test_another_data_parallel_size_sees_the_same_samples_and_pixels(
    tmp_path: Path, tokenizer: Tokenizer, settings: SampleSettings
) -> None:
    """Augmentation and order after a resume: pictures of iteration 3 at DP 1, 2 and 3."""
    meta = make_playground(tmp_path, num_samples=20)
    sets = json.loads(meta.read_text())
    for entry in sets.values():
        entry["data_augment"] = True
    meta.write_text(json.dumps(sets))
    augmented = open_dataset(meta, tokenizer, settings, cache_dir=tmp_path / "cache")
    seen: list[dict[int, bytes]] = []
    for ranks in (1, 2, 3):
        layout = {**LAYOUT, "data_parallel_size": ranks}
        pictures: dict[int, bytes] = {}
        plan = TrainPlanner(table=augmented.table, seed=1, **layout)
        for rank in range(ranks):
            with loader(augmented, planner=plan, data_parallel_rank=rank, seed=7) as source:
                for batch in source.batches(3)[1]:
                    assert batch.pixel_values is not None
                    pixels = [tensor.numpy().tobytes() for tensor in batch.pixel_values]
                    pictures |= dict(zip(batch.image_ids.tolist(), pixels, strict=True))
        seen.append(pictures)
    assert seen[0] == seen[1] == seen[2] and len(seen[0]) > 4
    for image_id, pixels in seen[0].items():
        sample_id, slot = divmod(image_id, MAX_IMAGES_PER_SAMPLE)
        sample = augmented.sample(sample_id, seed=7, epoch=plan.plan(3).epoch, with_pixels=True)
        assert sample.pixel_values is not None and sample.pixel_values[slot].tobytes() == pixels
    with loader(augmented, planner=plan, seed=8) as source:
        other = source.batches(3)[1]
    pixels = [tensor.numpy().tobytes() for batch in other for tensor in batch.pixel_values]
    assert not set(pixels) & set(seen[0].values())


def test_each_picture_is_decoded_once_and_only_where_wanted(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []
    load_image = sample_room.load_image

    def spy(path: Path) -> Image.Image:
        opened.append(path)
        return load_image(path)

    monkeypatch.setattr(sample_room, "load_image", spy)
    with loader(dataset, with_pixels=False) as source:
        assert all(batch.pixel_values is None for batch in source.batches(0)[1])
    assert opened == []
    with loader(dataset, end_iteration=1) as source:
        batches = source.batches(0)[1]
    assert len(opened) == len(set(opened)) == sum(len(batch.image_ids) for batch in batches) > 0


def test_a_picture_too_few_is_an_error(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never a batch whose pixels are not those of its image blocks."""
    real = loader_room.decode
    monkeypatch.setattr(loader_room, "decode", lambda *job: real(*job)[1:])
    message = r"\.jsonl:\d+: \d pictures for \d image blocks; the data changed during the run"
    with loader(dataset) as source, pytest.raises(DataError, match=message):
        source.batches(0)


def test_workers_are_asked_for_pictures_alone(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    class Spy:
        def __init__(self, *arguments: object) -> None: ...

        def submit(self, sample_id: int, *job: int) -> "Future[Pictures]":
            asked.append(sample_id)
            future: Future[Pictures] = Future()
            future.set_result(decode(dataset, sample_id, *job))
            return future

        def close(self) -> None: ...

    monkeypatch.setattr(loader_room, "WorkerPool", Spy)
    with loader(dataset, num_workers=1, end_iteration=1) as source:
        batches = source.batches(0)[1]
    samples = {sample_id for batch in batches for sample_id in batch.sample_ids}
    pictured = {sample_id for sample_id in samples if dataset.table.num_images[sample_id]}
    assert sorted(asked) == sorted(pictured) != sorted(samples)
    asked.clear()
    with loader(dataset, num_workers=1, with_pixels=False) as source:
        source.batches(0)
    assert asked == []


def test_the_next_iteration_is_prepared_and_none_beyond_the_end(dataset: Dataset) -> None:
    planned: list[int] = []

    class Spy:
        def plan(self, iteration: int) -> Any:
            planned.append(iteration)
            return planner(dataset).plan(iteration)

    with loader(dataset, planner=Spy(), end_iteration=3) as source:
        source.batches(0)
        assert planned == [0, 1]
        source.batches(1)
        source.batches(2)
    assert planned == [0, 1, 2]
    planned.clear()
    with loader(dataset, planner=Spy(), prefetch_iterations=3) as source:
        source.batches(0)
        assert planned == [0, 1, 2, 3]
        source.batches(1)
    assert planned == [0, 1, 2, 3, 4]


def test_batches_are_pinned_where_it_is_asked_for(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned: list[Batch] = []
    monkeypatch.setattr(Batch, "pin_memory", lambda batch: pinned.append(batch) or batch)
    with loader(dataset, end_iteration=1) as source:
        source.batches(0)
    assert pinned == []
    with loader(dataset, end_iteration=1, pin_memory=True) as source:
        batches = source.batches(0)[1]
    assert {id(batch) for batch in batches} == {id(batch) for batch in pinned}


def test_rows_without_packing_are_padded_to_the_longest(dataset: Dataset) -> None:
    layout = {**LAYOUT, "micro_batch_size": 2}
    unpacked = TrainPlanner(table=dataset.table, seed=1, packing="none", **layout)
    with loader(dataset, planner=unpacked) as source:
        plan, batches = source.batches(0)
    lengths = [dataset.table.num_tokens[list(batch.sample_ids)] for batch in batches]
    assert [len(batch.input_ids) for batch in batches] == [2 * max(pair) for pair in lengths]
    assert len(batches) == plan.num_microbatches == 2


def test_an_evaluation_gives_every_sample_once(dataset: Dataset) -> None:
    evaluation = EvaluationPlanner(table=dataset.table, **LAYOUT)
    seen: list[int] = []
    total = 0.0
    for rank in (0, 1):
        with loader(
            dataset,
            planner=evaluation,
            data_parallel_rank=rank,
            end_iteration=evaluation.num_iterations,
        ) as source:
            for iteration in range(evaluation.num_iterations):
                for batch in source.batches(iteration)[1]:
                    seen += batch.sample_ids
                    total += float(batch.loss_mask.sum())
    assert sorted(seen) == dataset.table.usable.tolist()
    assert total == pytest.approx(1.0, rel=1e-5)


def test_an_error_names_set_line_and_picture(
    tmp_path: Path, tokenizer: Tokenizer, settings: SampleSettings
) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    entry = {"id": 9, "image": "a.png", "conversations": conversation("q", "a")}
    meta = write_set(tmp_path, [entry])
    dataset = open_dataset(meta, tokenizer, settings, cache_dir=tmp_path / "cache")
    (tmp_path / "a.png").write_bytes(b"broken")
    message = r"tiny\.jsonl:1 \(set 'tiny', id '9'\): .*a\.png: the image does not decode"
    with loader(dataset) as source, pytest.raises(DataError, match=message):
        source.batches(0)
