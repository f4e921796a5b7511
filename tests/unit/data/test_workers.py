"""Worker processes: the same samples, errors that arrive, and no process left behind."""

import errno
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
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
from mmlm.data.workers import WorkerPool, decode
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


def test_decoding_leaves_only_normalising(dataset: Dataset) -> None:
    for sample_id in dataset.table.usable[:6].tolist():
        pictures = decode(dataset, sample_id, int(dataset.table.num_images[sample_id]), 1, 2)
        whole = dataset.sample(sample_id, seed=1, epoch=2, with_pixels=True).pixel_values
        assert whole is not None and len(pictures) == len(whole)
        for picture, pixels in zip(pictures, whole, strict=True):
            np.testing.assert_array_equal(normalise(picture), pixels)


def test_workers_decode_what_this_process_decodes_and_errors_arrive(pictured: Dataset) -> None:
    pool = WorkerPool(pictured, 2)
    try:
        pending = [pool.submit(sample_id, 1, 4, 0) for sample_id in (2, 0, 1)]
        for sample_id, asked in zip((2, 0, 1), pending, strict=True):
            here = decode(pictured, sample_id, 1, 4, 0)
            np.testing.assert_array_equal(np.array(asked.result()), np.array(here))
        root = pictured.annotation_set(1).root
        (root / "1.png").unlink()
        message = r"tiny\.jsonl:2 \(set 'tiny', id '1'\): .*1\.png: the image does not exist"
        with pytest.raises(DataError, match=message):
            pool.submit(1, 1, 4, 0).result()
        pool.submit(0, 1, 4, 0).result()  # the worker lives on
    finally:
        pool.close()
    assert multiprocessing.active_children() == []


def test_a_killed_worker_is_an_error_that_names_the_sample(pictured: Dataset) -> None:
    root = pictured.annotation_set(1).root
    (root / "1.png").unlink()
    os.mkfifo(root / "1.png")  # reading it waits for ever
    pool = WorkerPool(pictured, 1)
    try:
        pending = [pool.submit(sample_id, 1, 0, 0) for sample_id in (0, 1, 2)]
        pending[0].result()
        time.sleep(0.1)
        for child in multiprocessing.active_children():
            os.kill(child.pid or 0, signal.SIGKILL)
        message = (
            r"tiny\.jsonl:2 \(set 'tiny', id '1'\): data worker 0 ended \(killed by SIGKILL\) at "
            r"or after this sample, .* \(images \['1\.png'\]\); .* lower data\.num_workers"
        )
        for asked in (pending[1], pending[2], pool.submit(2, 1, 0, 0)):
            with pytest.raises(DataError, match=message):
                asked.result()
        pictured.annotation_set(1).annotation.unlink()
        with pytest.raises(DataError, match=r"sample 1: data worker 0 ended .*tiny\.jsonl"):
            pool.submit(2, 1, 0, 0).result()
    finally:
        pool.close()


def test_a_fault_of_ours_arrives_with_its_traceback(pictured: Dataset) -> None:
    pool = WorkerPool(pictured, 1)
    try:
        with pytest.raises(RuntimeError, match=r"sample 3:\nTraceback (.|\n)*IndexError"):
            pool.submit(3, 1, 0, 0).result()
    finally:
        pool.close()


def test_whatever_goes_wrong_while_receiving_nobody_waits_for_ever(
    pictured: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(worker: object, shape: tuple[int, ...]) -> None:
        raise MemoryError("no room for a picture")

    monkeypatch.setattr(workers._Worker, "_receive_image", no_memory)
    pool = WorkerPool(pictured, 1)
    try:
        for asked in [pool.submit(sample_id, 1, 0, 0) for sample_id in (0, 1)]:
            with pytest.raises(MemoryError, match="no room for a picture"):
                asked.result(timeout=30)
    finally:
        pool.close()


def test_no_room_for_processes_is_an_error_that_says_so(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = multiprocessing.process.BaseProcess.start
    started: list[object] = []

    def full(process: multiprocessing.process.BaseProcess) -> None:
        if started:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        started.append(process)
        start(process)

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", full)
    message = r"cannot start 3 data workers \(No space left on device\): lower data\.num_workers"
    with pytest.raises(DataError, match=message):
        WorkerPool(dataset, 3)
    assert started and multiprocessing.active_children() == []


def test_work_that_is_dropped_ends_at_once(pictured: Dataset) -> None:
    root = pictured.annotation_set(1).root
    (root / "1.png").unlink()
    os.mkfifo(root / "1.png")
    pool = WorkerPool(pictured, 1)
    pending = [pool.submit(1, 1, 0, 0) for _ in range(9)]
    began = time.monotonic()
    pool.close()
    assert time.monotonic() - began < 5 and multiprocessing.active_children() == []
    assert all(future.done() for future in pending)


def test_workers_are_light() -> None:
    code = "import sys, mmlm.data.workers; print({'torch', 'megatron'} & sys.modules.keys())"
    command = [sys.executable, "-c", code]
    written = subprocess.run(command, capture_output=True, text=True, env=FROM_HERE)
    assert written.stdout == "set()\n", written.stderr


def test_the_dataset_travels_as_paths(dataset: Dataset, tmp_path: Path) -> None:
    """Not as megabytes of sizes; and the tokenizer by value, since its folder may be deleted."""
    folder = tmp_path / "tokenizer"
    shutil.copytree(dataset.tokenizer.folder, folder)
    sent = pickle.dumps(Dataset(dataset.indexes, Tokenizer(folder), dataset.settings))
    assert len(sent) < 20_000
    shutil.rmtree(folder)
    again = pickle.loads(sent)
    assert again.table.num_tokens.tolist() == dataset.table.num_tokens.tolist()
    assert again.tokenizer.encode("a red <box>") == dataset.tokenizer.encode("a red <box>")


ORPHANS = """
import os, pickle, signal, sys
from mmlm.data import workers
from mmlm.data.workers import WorkerPool

if __name__ == "__main__":
    with open(sys.argv[1], "rb") as file:
        dataset = pickle.load(file)
    pool = WorkerPool(dataset, 2)
    pool.submit(0, 1, 0, 0).result()
    pool.submit(1, 1, 0, 0)
    print("ready", flush=True)
    signal.pause()
"""


def test_workers_end_with_a_trainer_that_is_killed(pictured: Dataset, tmp_path: Path) -> None:
    """One of them is at work, on a picture that never ends."""
    (pictured.annotation_set(1).root / "1.png").unlink()
    os.mkfifo(pictured.annotation_set(1).root / "1.png")
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
