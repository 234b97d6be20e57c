"""Which process is meant, and whether it still lives.

A number alone does not say: numbers are given out again. A process is known by its number, the moment it started and
the boot of the machine; where its numbers are not ours (another container), its heartbeat is the evidence.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Literal

LEASE = 5.0  # seconds without a heartbeat after which a process of another container counts as dead
BEAT = 1.0  # seconds between heartbeats

_GONE = ("Z", "X")  # a zombie has ended; only its parent has not looked yet


@dataclass(frozen=True)
class Process:
    """One process of one boot of one machine. Never equal to a later one that got its number."""

    pid: int
    started: str
    """Clock ticks between boot and its birth (Linux), or the time of its birth."""
    boot: str
    """The kernel's id of this boot; empty where `started` tells boots apart."""
    namespace: str
    """Where `pid` counts: containers number their processes on their own."""

    def to_json(self) -> str:
        """For the database."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Process:
        """The inverse of `to_json`."""
        return cls(**json.loads(text))


def identify(pid: int) -> Process:
    """A process that is certain to exist: this one, or a child that nobody has waited for."""
    found = _look(pid)
    assert found is not None, f"process {pid} does not exist"
    return Process(pid, found[1], *_here())


def this_process() -> Process:
    """The one that asks."""
    return identify(os.getpid())


def alive(process: Process, heartbeat: Path) -> bool:
    """Whether a process lives. `heartbeat` is the file that it touches every second (`beat`)."""
    if process.boot != _here()[0]:
        return False  # the machine was restarted: a queue lies on a disk of its own machine
    if process.namespace != _here()[1]:
        return _beats(heartbeat)
    return _same(process)


def is_of_an_earlier_boot(process: Process) -> bool:
    """Whether the machine has been restarted since the process began."""
    return process.boot != _here()[0]


def beat(heartbeat: Path) -> None:
    """Show that this process lives. Needs no room on the disk; a folder that has vanished is not this one's trouble."""
    with contextlib.suppress(OSError):
        heartbeat.touch()


def send(process: Process, number: signal.Signals) -> bool:
    """Send a signal to this very process; False if it is gone or out of reach."""
    if (process.boot, process.namespace) != _here():
        return False
    with contextlib.suppress(ProcessLookupError, PermissionError):
        return _deliver(process, number)
    return False


def _deliver(process: Process, number: signal.Signals) -> bool:
    if sys.platform != "linux":
        if _same(process):
            os.kill(process.pid, number)
            return True
        return False
    fd = os.pidfd_open(process.pid)  # from here on the number cannot pass to another process unnoticed
    try:
        if _same(process):
            signal.pidfd_send_signal(fd, number)
            return True
    finally:
        os.close(fd)
    return False


def _same(process: Process) -> bool:
    found = _look(process.pid)
    return found is not None and found[0] not in _GONE and found[1] == process.started


def _beats(heartbeat: Path) -> bool:
    try:
        return time.time() - heartbeat.stat().st_mtime < LEASE
    except OSError:
        return False


@cache
def _here() -> tuple[str, str]:
    """Boot and namespace of this process."""
    if sys.platform != "linux":
        return "", ""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return boot, str(Path("/proc/self/ns/pid").readlink())


def _look(pid: int) -> tuple[str, str] | None:
    """State letter and time of birth of whoever has a number now."""
    if sys.platform != "linux":
        return _ask_psutil(pid)
    try:
        # `pid (name) state ppid ...`: the name may hold blanks and brackets. Birth is field 22 (man 5 proc).
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return fields[0], fields[19]


def _ask_psutil(pid: int) -> tuple[str, str] | None:
    """`_look` where there is no /proc."""
    import psutil

    try:
        process = psutil.Process(pid)
        return ("Z" if process.status() == psutil.STATUS_ZOMBIE else "R"), repr(process.create_time())
    except psutil.NoSuchProcess:
        return None


# --- the kernel's own killings --------------------------------------------------------------------------------------

Scope = Literal["group", "machine"]


@dataclass(frozen=True)
class OomKills:
    """How many processes the kernel has killed because main memory ran out; None where it does not tell."""

    group: int | None = None
    """In this process's cgroup (a container, a slice): its limit was reached."""
    machine: int | None = None

    def since(self, before: OomKills) -> Scope | None:
        """Where one was killed since `before`: in the group is nearly proof, on the machine makes it likely."""
        if before.group is not None and self.group is not None and self.group > before.group:
            return "group"
        if before.machine is not None and self.machine is not None and self.machine > before.machine:
            return "machine"
        return None

    def to_json(self) -> str:
        """For the database."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> OomKills:
        """The inverse of `to_json`."""
        return cls(**json.loads(text))


def oom_kills() -> OomKills:
    """The kernel's counts now. All None on systems without them."""
    return OomKills(_count(_cgroup_file()), _count(Path("/proc/vmstat")))


def _count(file: Path | None) -> int | None:
    try:
        found = re.search(r"^oom_kill (\d+)$", file.read_text(encoding="ascii"), re.MULTILINE) if file else None
    except OSError:
        return None
    return int(found[1]) if found else None


@cache
def _cgroup_file() -> Path | None:
    """The file with the count of this process's cgroup: version 2, then version 1."""
    root = Path("/sys/fs/cgroup")
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            found += [root / path.strip("/") / "memory.events", root / "memory.events"]
        elif "memory" in controllers.split(","):
            found += [root / "memory" / path.strip("/") / "memory.oom_control", root / "memory" / "memory.oom_control"]
    return next((file for file in found if file.is_file()), None)
