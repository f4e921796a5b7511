"""Worker processes: the same samples, errors that arrive, and no process left behind."""

import errno
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from mmlm.data import workers
from mmlm.data.dataset import Dataset, open_dataset
from mmlm.data.image import normalise
from mmlm.data.sample import SampleSettings
from mmlm.data.tokenizer import Tokenizer
from mmlm.data.workers import WorkerPool, build_unfinished
from mmlm.errors import DataError
from tests.tiny_data import conversation, write_set

FROM_HERE = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3])}


@pytest.fixture
def pictured(tmp_path: Path, tokenizer: Tokenizer, settings: SampleSettings) -> Dataset:
    """Three samples with a picture each."""
    entries = []
    for number in range(3):
        Image.new("RGB", (30, 20), (80 * number, 9, 9)).save(tmp_path / f"{number}.png")
        entry = {"id": number, "image": f"{number}.png", "conversations": conversation("q", "a")}
        entries.append(entry)
    meta = write_set(tmp_path, entries)
    return open_dataset(meta, tokenizer, settings, cache_dir=tmp_path / "cache")


def test_an_unfinished_sample_lacks_only_normalising(dataset: Dataset) -> None:
    for sample_id in dataset.table.usable[:6].tolist():
        built = build_unfinished(dataset, sample_id, seed=1, epoch=2, with_pixels=True)
        whole = dataset.sample(sample_id, seed=1, epoch=2, with_pixels=True)
        assert built.images is not None and whole.pixel_values is not None
        assert built.sample.input_ids.tolist() == whole.input_ids.tolist()
        pixels = [normalise(image) for image in built.images]
        np.testing.assert_array_equal(
            np.array(pixels).reshape(whole.pixel_values.shape), whole.pixel_values
        )
        blind = build_unfinished(dataset, sample_id, seed=1, epoch=2, with_pixels=False)
        assert blind.images is None and blind.sample.pixel_values is None


def test_workers_build_what_this_process_builds_and_errors_arrive(pictured: Dataset) -> None:
    pool = WorkerPool(pictured, 2)
    try:
        pending = [pool.submit(sample_id, seed=4, epoch=0) for sample_id in (2, 0, 1)]
        for sample_id, asked in zip((2, 0, 1), pending, strict=True):
            here = build_unfinished(pictured, sample_id, seed=4, epoch=0, with_pixels=True)
            built = asked.result()
            assert built.sample.sample_id == sample_id
            np.testing.assert_array_equal(built.images, here.images)
            np.testing.assert_array_equal(built.sample.input_ids, here.sample.input_ids)
        root = pictured.annotation_set(1).root
        (root / "1.png").unlink()
        message = r"tiny\.jsonl:2 \(set 'tiny', id '1'\): .*1\.png: the image does not exist"
        with pytest.raises(DataError, match=message):
            pool.submit(1, seed=4, epoch=0).result()
        pool.submit(0, seed=4, epoch=0).result()  # the worker lives on
    finally:
        pool.close()
    assert multiprocessing.active_children() == []


def test_a_killed_worker_is_an_error_that_names_the_sample(pictured: Dataset) -> None:
    root = pictured.annotation_set(1).root
    (root / "1.png").unlink()
    os.mkfifo(root / "1.png")  # reading it waits for ever
    pool = WorkerPool(pictured, 1)
    try:
        pending = [pool.submit(sample_id, seed=0, epoch=0) for sample_id in (0, 1, 2)]
        pending[0].result()
        time.sleep(0.1)
        for child in multiprocessing.active_children():
            os.kill(child.pid or 0, signal.SIGKILL)
        message = (
            r"tiny\.jsonl:2 \(set 'tiny', id '1'\): data worker 0 was killed while it built this "
            r"sample \(images \['1\.png'\]\); .* lower data\.num_workers"
        )
        with pytest.raises(DataError, match=message):
            pending[1].result()
        with pytest.raises(DataError, match="data worker 0 was killed"):
            pool.submit(2, seed=0, epoch=0).result()
    finally:
        pool.close()


def test_no_room_for_queues_is_an_error_that_says_so(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[ProcessPoolExecutor] = []

    def full(*arguments: object, **options: object) -> ProcessPoolExecutor:
        if made:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        made.append(ProcessPoolExecutor(1))
        return made[0]

    monkeypatch.setattr(workers, "ProcessPoolExecutor", full)
    message = r"cannot start 3 data workers \(No space left on device\): .* data\.num_workers=0"
    with pytest.raises(DataError, match=message):
        WorkerPool(dataset, 3)
    with pytest.raises(RuntimeError, match="after shutdown"):
        made[0].submit(int)


def test_workers_are_light() -> None:
    code = "import sys, mmlm.data.workers; print({'torch', 'megatron'} & sys.modules.keys())"
    command = [sys.executable, "-c", code]
    written = subprocess.run(command, capture_output=True, text=True, env=FROM_HERE)
    assert written.stdout == "set()\n", written.stderr


def test_the_dataset_travels_as_paths(dataset: Dataset, tmp_path: Path) -> None:
    """Not as megabytes of sizes; and the tokenizer by value, since its folder may be deleted."""
    sent = pickle.dumps(dataset)
    assert len(sent) < 20_000
    again = pickle.loads(sent)
    assert again.table.num_tokens.tolist() == dataset.table.num_tokens.tolist()
    assert again.tokenizer.encode("a red <box>") == dataset.tokenizer.encode("a red <box>")


ORPHANS = """
import os, pickle, signal, sys
from mmlm.data.workers import WorkerPool

if __name__ == "__main__":
    with open(sys.argv[1], "rb") as file:
        dataset = pickle.load(file)
    pool = WorkerPool(dataset, 2)
    for asked in [pool.submit(sample_id, seed=0, epoch=0) for sample_id in (0, 1)]:
        asked.result()
    print("ready", flush=True)
    signal.pause()
"""


def test_workers_end_with_a_trainer_that_is_killed(pictured: Dataset, tmp_path: Path) -> None:
    (tmp_path / "dataset").write_bytes(pickle.dumps(pictured))
    (tmp_path / "orphans.py").write_text(ORPHANS)
    command = [sys.executable, str(tmp_path / "orphans.py"), str(tmp_path / "dataset")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=FROM_HERE) as trainer:
        assert trainer.stdout is not None and trainer.stdout.readline() == "ready\n"
        children = psutil.Process(trainer.pid).children(recursive=True)
        assert len([child for child in children if "spawn_main" in str(child.cmdline())]) == 2
        trainer.kill()
    _, left = psutil.wait_procs(children, timeout=10)
    assert left == []
