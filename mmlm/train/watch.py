"""Ends a run whose ranks cannot go on, and says which of them died or stopped moving.

A thread of every rank writes once a second to the store of torch.distributed where its main thread
is, and reads what the others wrote. The first that comes to a verdict prints it for all; every rank
reads it and ends. A rank that is blamed for a stall prints its Python stacks before.

The thread ends the process as a whole (`os._exit`): its main thread is stuck in a collective that
nothing else would end. Data workers follow their parent, and torchrun ends ranks that are stopped.
"""

import faulthandler
import os
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from mmlm.data.collate import Batch
from mmlm.errors import MmlmError
from mmlm.log import get_logger
from mmlm.parallel.process import ProcessState, state_of, this_process
from mmlm.parallel.topology import Topology
from mmlm.train.forward_step import ForwardStep
from mmlm.train.watch_rules import Beat, Phase, Seen, Verdict, allowed_seconds, judge

BEAT_SECONDS = 1.0
"""Between two beats of a rank."""

SILENT_SECONDS = 60.0
"""A rank without a beat for this long is dead, or sooner where the timeout is shorter."""

_BEATS_READ_A_SECOND = 64  # by each rank: all of a small world, a large one in turns
_CUT_OFF_WAIT_SECONDS = 15.0  # for a verdict, after a collective failed
_STORE_SECONDS = 10.0  # without the store, before it counts as gone

_COLLECTIVES = "/torch/distributed/"
_WAITS = ("/p2p_communication.py", "/param_and_grad_buffer.py")  # of megatron-core's own requests
_LOST_CONNECTION = ("connection closed", "connection reset", "gloo", "nccl", "broken pipe")


class Watch:
    """Says where this rank is and watches over all; use as a context manager around the training.

    Entering is collective, and so is leaving without an error.

    Args:
        topology: this rank's place.
        timeout_minutes: ``parallel.timeout_minutes``.
        first_iteration: that this run does, which may take longer.
        exit_process: what ends the process.
    """

    def __init__(
        self,
        topology: Topology,
        *,
        timeout_minutes: float,
        first_iteration: int = 0,
        exit_process: Callable[[int], object] = os._exit,
    ) -> None:
        self._topology = topology
        self._timeout_minutes = timeout_minutes
        self._silent_seconds = min(SILENT_SECONDS, 60.0 * timeout_minutes)
        self._first_iteration = first_iteration
        self._exit_process = exit_process
        self._closing = threading.Event()
        self._others: dict[int, _Other] = {}
        self._main = threading.get_ident()
        self._count = 0
        self._beat = Beat(
            rank=topology.rank,
            place=f"TP {topology.tp_rank}, PP {topology.pp_rank}, DP {topology.dp_rank}",
            process=this_process(),
            count=0,
            iteration=first_iteration,
            phase="data",
            step=0,
            since=_now(),
            allowed_seconds=self._allowed("data", first_iteration),
            line="",
            is_waiting=False,
        )

    def __enter__(self) -> "Watch":
        name: list[Any] = [uuid.uuid4().hex]
        dist.broadcast_object_list(name, src=0, group=self._topology.control_group)
        # a connection of its own: a store that the main thread waits in serves nobody else
        shared: Any = _get_default_store()
        self._store = dist.PrefixStore(f"watch/{name[0]}", shared.clone())
        self._tell()
        dist.barrier(group=self._topology.control_group)  # all have a first beat
        self._reached = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="mmlm-watch", daemon=True)
        self._thread.start()
        threading.Thread(target=self._guard, name="mmlm-watch-store", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.at("closing", self._beat.iteration)
            # a rank that left before would take the store with it, where it serves it
            dist.barrier(group=self._topology.control_group)
            self._end_thread(is_done=True)
        elif is_lost_connection(error):
            # whoever died is named by the thread, which then ends this process
            self._beat = replace(self._beat, is_cut_off=True)
            self._thread.join(_CUT_OFF_WAIT_SECONDS)
            self._end_thread(error=_short(error))
        elif isinstance(error, MmlmError) and error.on_every_rank:
            self._end_thread(is_done=True)
        else:
            self._end_thread(error=_short(error))

    def at(self, phase: Phase, iteration: int) -> None:
        """Say what the main thread begins now.

        Args:
            phase: what.
            iteration: of which iteration, from 0.
        """
        self._beat = replace(
            self._beat,
            phase=phase,
            iteration=iteration,
            step=0,
            since=_now(),
            allowed_seconds=self._allowed(phase, iteration),
        )

    def counting(self, step: ForwardStep) -> ForwardStep:
        """Wrap a forward step so that each microbatch counts as moving on."""

        def counted(iterator: Iterator[Batch], chunk: torch.nn.Module) -> Any:
            self._beat = replace(self._beat, step=self._beat.step + 1)
            return step(iterator, chunk)

        return counted

    def _allowed(self, phase: Phase, iteration: int) -> float:
        return allowed_seconds(
            phase,
            60.0 * self._timeout_minutes,
            is_first_iteration=iteration == self._first_iteration,
        )

    def _end_thread(self, **last_words: Any) -> None:
        self._closing.set()
        self._thread.join(_STORE_SECONDS)
        self._beat = replace(self._beat, **last_words)
        try:
            self._tell()
        except RuntimeError:
            return  # the store is gone, and with it everyone who would listen

    def _run(self) -> None:
        period = max(BEAT_SECONDS, self._topology.world_size / _BEATS_READ_A_SECOND)
        looked = time.monotonic()
        while not self._closing.wait(BEAT_SECONDS):
            now = time.monotonic()
            try:
                self._tell()
                self._obey()
                if now - looked >= period:
                    if now - looked > period + self._silent_seconds / 2:
                        self._others.clear()  # it was this process that was stopped
                    looked = now
                    self._look(now)
                self._reached = now
            except RuntimeError as error:  # torch's, for all that can happen to a store
                if now - self._reached > _STORE_SECONDS and not self._closing.is_set():
                    self._lose_store(_short(error))

    def _guard(self) -> None:
        """End the process where the store does not even answer, and the thread waits for it."""
        before = time.monotonic()
        while not self._closing.wait(BEAT_SECONDS):
            now = time.monotonic()
            if now - before > self._silent_seconds / 2:
                self._reached = now  # it was this process that was stopped
            before = now
            if now - self._reached > self._silent_seconds + _STORE_SECONDS:
                self._lose_store("it does not answer")

    def _tell(self) -> None:
        self._count += 1
        frame = sys._current_frames().get(self._main)
        # the main thread alone changes `_beat`
        told = replace(
            self._beat, count=self._count, line=_line(frame), is_waiting=_is_waiting(frame)
        )
        self._store.set(f"beat/{told.rank}", told.to_json())

    def _obey(self) -> None:
        if self._store.check(["verdict"]):
            self._end(self._store.get("verdict"))

    def _look(self, now: float) -> None:
        # before the beats: the last words of a process that is gone by now are among those
        states = {rank: state_of(other.beat.process) for rank, other in self._others.items()}
        names = [f"beat/{rank}" for rank in range(self._topology.world_size)]
        beats = [Beat.from_json(text) for text in self._store.multi_get(names)]
        seen = [
            self._others.setdefault(beat.rank, _Other(beat, now)).see(
                beat, now, states.get(beat.rank, "unknown")
            )
            for beat in beats
        ]
        verdict = judge(
            seen, silent_seconds=self._silent_seconds, timeout_minutes=self._timeout_minutes
        )
        if verdict is not None and not self._closing.is_set():
            text = f"{self._topology.rank} {verdict.to_json()}"
            self._end(self._store.compare_set("verdict", "", text))  # the first one stands

    def _end(self, stored: bytes) -> None:
        judge_rank, _, text = stored.decode().partition(" ")
        verdict = Verdict.from_json(text)
        is_mine = int(judge_rank) == self._topology.rank
        if is_mine:
            get_logger().error(f"error: {verdict.message}; all ranks end")
        if verdict.kind == "stalled" and self._topology.rank in verdict.ranks:
            sys.stderr.write(f"stacks of rank {self._topology.rank}, innermost call first:\n")
            sys.stderr.flush()
            faulthandler.dump_traceback(file=2, all_threads=True)
        sys.stderr.flush()
        if is_mine:
            time.sleep(2 * BEAT_SECONDS)  # so that the others read it before a launcher ends them
        self._exit_process(1)

    def _lose_store(self, how: str) -> None:
        address = f"{os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}"
        states = [(other.beat, state_of(other.beat.process)) for other in self._others.values()]
        known = [
            f"{beat} is {state}, last in {beat.where}"
            for beat, state in states
            if state in ("gone", "stopped")
        ]
        why = "; ".join(known) or (
            "torchrun there, or rank 0 where there is no torchrun, has ended, or the network"
        )
        get_logger().error(
            f"error: {self._beat} cannot reach the store at {address} any more ({how}): {why}. It "
            f"was in {self._beat.where} and ends"
        )
        self._exit_process(1)


class _Other:
    """What is remembered of a rank between two looks."""

    def __init__(self, beat: Beat, now: float) -> None:
        self.beat = beat
        self._heard = self._moved = now

    def see(self, beat: Beat, now: float, state: ProcessState) -> Seen:
        """Compare with the last look; `state` is from before the beat was read."""
        if beat.count != self.beat.count:
            self._heard = now
        if beat.progress != self.beat.progress:
            self._moved = now
        self.beat = beat
        return Seen(
            beat=beat,
            silent_seconds=now - self._heard,
            still_seconds=now - self._moved,
            state=state,
        )


def is_lost_connection(error: BaseException) -> bool:
    """Whether an exception comes from a collective whose other end is gone.

    Args:
        error: that ended the training on this rank; an `MmlmError` never is.
    """
    if isinstance(error, MmlmError) or not isinstance(error, RuntimeError):
        return False
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    text = str(error).lower()
    return _in_collective(files[:-4:-1]) or any(word in text for word in _LOST_CONNECTION)


def _in_collective(files: Sequence[str]) -> bool:
    """Whether the innermost calls, in these files, wait for another rank."""
    is_own_wait = bool(files) and files[0].endswith(_WAITS)
    return is_own_wait or any(_COLLECTIVES in file for file in files)


def _is_waiting(frame: FrameType | None) -> bool:
    files: list[str] = []
    while frame is not None and len(files) < 3:
        files.append(frame.f_code.co_filename)
        frame = frame.f_back
    return _in_collective(files)


def _line(frame: FrameType | None) -> str:
    if frame is None:
        return "an unknown line"
    name = os.path.basename(frame.f_code.co_filename)
    return f"{name}:{frame.f_lineno} in {frame.f_code.co_name}"


def _short(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def _now() -> str:
    return datetime.now(UTC).strftime("%H:%M:%S UTC")
