"""Whether another process on this machine still lives, as Linux's /proc says."""

import os
import socket
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

ProcessState = Literal["alive", "stopped", "gone", "unknown"]
"""Stopped: by SIGSTOP or a terminal. Unknown: it is elsewhere, or there is no /proc."""


@dataclass(frozen=True, kw_only=True)
class ProcessIdentity:
    """Which process it is, for others to ask after."""

    host: str
    pid: int
    start: str
    """When it started, in ticks of the kernel: a pid can be given again."""
    namespace: str
    """The boot of the machine and the space that pids are counted in (containers have their own);
    empty where there is no /proc."""


def this_process() -> ProcessIdentity:
    """The process that calls."""
    pid = os.getpid()
    return ProcessIdentity(
        host=socket.gethostname(),
        pid=pid,
        start=_state_and_start(pid)[1],
        namespace=_namespace(),
    )


def state_of(process: ProcessIdentity) -> ProcessState:
    """Look after a process; a zombie, whose parent has not asked yet, is gone."""
    if not process.namespace or process.namespace != _namespace():
        return "unknown"
    state, start = _state_and_start(process.pid)
    if start != process.start or state in "ZX":
        return "gone"
    return "stopped" if state == "T" else "alive"


def _state_and_start(pid: int) -> tuple[str, str]:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return "X", ""
    fields = text.rpartition(")")[2].split()  # the name before may hold anything
    return fields[0], fields[19]


@cache
def _namespace() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
