"""Which rank died or is behind: pure functions of what all ranks last said."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal, get_args

from mmlm.parallel.process import ProcessIdentity, ProcessState

Phase = Literal[
    "data",
    "forward-backward",
    "optimizer",
    "logging",
    "publishing",
    "replay",
    "saving",
    "exporting",
    "evaluation",
    "closing",
]
PHASES: tuple[Phase, ...] = get_args(Phase)
"""What an iteration does, in order."""

_LONG: dict[Phase, int] = {
    "publishing": 6,
    "replay": 3,
    "saving": 6,
    "exporting": 6,
    "evaluation": 6,
    "closing": 6,
}
FIRST_ITERATION_FACTOR = 3
"""How many timeouts the first iteration may take: kernels are chosen and compiled."""

LONGEST_FACTOR = max(FIRST_ITERATION_FACTOR, *_LONG.values())
"""How many timeouts a phase may take at most."""

ERROR_GRACE_SECONDS = 5.0
"""How long after a rank's own error the others may raise it as well before they are ended."""

CUT_OFF_SECONDS = 5.0
"""Silence that is a death where a collective has already failed."""


def allowed_seconds(phase: Phase, timeout_seconds: float, *, is_first_iteration: bool) -> float:
    """How long nothing may move in a phase."""
    factor = _LONG.get(phase, 1)
    if is_first_iteration:
        factor = max(factor, FIRST_ITERATION_FACTOR)
    return factor * timeout_seconds


@dataclass(frozen=True, kw_only=True)
class Beat:
    """What a rank says of itself, about once a second."""

    rank: int
    place: str
    """E.g. ``TP 0, PP 1, DP 0``."""
    process: ProcessIdentity
    count: int
    """Beats so far: it lives as long as this grows."""
    iteration: int
    phase: Phase
    step: int
    """Microbatches begun in this phase."""
    since: str
    """UTC time at which the phase began, e.g. ``12:34:56``."""
    allowed_seconds: float
    """How long it may stay here."""
    line: str
    """What its main thread is at, e.g. ``loader.py:120 in batches``."""
    is_waiting: bool
    """Whether that is a collective, so that it waits for another rank."""
    is_cut_off: bool = False
    """A collective has failed: another rank is gone."""
    error: str = ""
    """What it ended with."""
    is_done: bool = False
    """It came to the end."""

    def to_json(self) -> str:
        """The beat as the store keeps it."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "Beat":
        """The beat of `to_json`."""
        fields = json.loads(text)
        return cls(**{**fields, "process": ProcessIdentity(**fields["process"])})

    @property
    def progress(self) -> tuple[int, int, int]:
        """Grows as the training moves on."""
        return self.iteration, PHASES.index(self.phase), self.step

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.place}; {self.process.host}, process {self.process.pid})"

    @property
    def where(self) -> str:
        """What it was doing, in words."""
        microbatch = f", microbatch {self.step}" if self.step else ""
        return f"{self.phase} of iteration {self.iteration}{microbatch} (there since {self.since})"


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A rank as another one sees it."""

    beat: Beat
    silent_seconds: float
    """Since its last beat."""
    still_seconds: float
    """Since it moved on."""
    state: ProcessState


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Why the run ends."""

    kind: Literal["died", "failed", "silent", "stalled"]
    ranks: tuple[int, ...]
    """Whose fault it is, as far as can be seen."""
    message: str

    def to_json(self) -> str:
        """The verdict as the store keeps it."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "Verdict":
        """The verdict of `to_json`."""
        fields = json.loads(text)
        return cls(**{**fields, "ranks": tuple(fields["ranks"])})


def judge(
    ranks: Sequence[Seen], *, silent_seconds: float, timeout_minutes: float
) -> Verdict | None:
    """Decide whether the run cannot go on.

    A death comes before an error, an error before silence, silence before a stall: each causes
    those after it.

    Args:
        ranks: all ranks.
        silent_seconds: after which a rank without a sign of life counts as dead.
        timeout_minutes: ``parallel.timeout_minutes``, for the message.

    Returns:
        What is wrong, or None.
    """
    running = [seen for seen in ranks if not seen.beat.is_done]
    dead = [seen for seen in running if seen.state == "gone" and not seen.beat.error]
    if dead:
        return _verdict("died", dead, "died")
    is_cut_off = any(seen.beat.is_cut_off for seen in running)
    grace = 0.0 if is_cut_off else ERROR_GRACE_SECONDS
    failed = [s for s in running if s.beat.error and s.silent_seconds >= grace]
    if failed:
        return _verdict("failed", failed, f"ended with an error ({failed[0].beat.error})")
    if is_cut_off:
        silent_seconds = min(silent_seconds, CUT_OFF_SECONDS)
    silent = [s for s in running if not s.beat.error and s.silent_seconds >= silent_seconds]
    if silent:
        how = f"has given no sign of life for {max(s.silent_seconds for s in silent):.0f} s"
        if all(seen.state == "stopped" for seen in silent):
            how += " (its process is stopped)"
        return _verdict("silent", silent, f"{how}; it was last")
    return _stall(running, timeout_minutes)


def _stall(running: Sequence[Seen], timeout_minutes: float) -> Verdict | None:
    alive = [seen for seen in running if not seen.beat.error]
    if not alive:
        return None
    least = min(seen.beat.progress[:2] for seen in alive)
    behind = [seen for seen in alive if seen.beat.progress[:2] == least]
    # a rank that waits in a collective waits for one that does not
    behind = [seen for seen in behind if not seen.beat.is_waiting] or [
        seen for seen in behind if seen.beat.step == min(each.beat.step for each in behind)
    ]
    still = min(seen.still_seconds for seen in alive)
    if still < max(seen.beat.allowed_seconds for seen in behind):
        return None
    verdict = _verdict(
        "stalled", behind, f"has not moved on for {still:.0f} s, at {behind[0].beat.line}, in"
    )
    blamed = set(verdict.ranks)
    others = Counter(
        f"{seen.beat.phase} of iteration {seen.beat.iteration}"
        for seen in alive
        if seen.beat.rank not in blamed
    )
    waiting = "; ".join(f"{count} in {where}" for where, count in others.items())
    message = verdict.message + (f"; the others wait: {waiting}" if waiting else "")
    return Verdict(
        kind="stalled",
        ranks=verdict.ranks,
        message=f"{message}; parallel.timeout_minutes is {timeout_minutes:g}",
    )


_NUM_NAMED = 4


def _verdict(
    kind: Literal["died", "failed", "silent", "stalled"], guilty: Sequence[Seen], what: str
) -> Verdict:
    guilty = sorted(guilty, key=lambda seen: (seen.beat.progress, seen.beat.rank))
    first = guilty[0].beat
    preposition = "" if what.endswith(" in") else " in"
    message = f"{first} {what}{preposition} {first.where}"
    if len(guilty) > 1:
        named = ", ".join(str(seen.beat) for seen in guilty[1:_NUM_NAMED])
        more = len(guilty) - _NUM_NAMED
        message += f"; so did {named}" + (f" and {more} more" if more > 0 else "")
    return Verdict(kind=kind, ranks=tuple(seen.beat.rank for seen in guilty), message=message)
