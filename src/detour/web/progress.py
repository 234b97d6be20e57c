"""How far a job is, from the end of its event file: cheap enough for a list that is asked for every two seconds.

A file that has not changed is not opened again. Of others the last 16 KiB are read (about 50 steps; half of that where
a job has ended), and once, where the run's beginning is not among them, what is needed to find it: it says how many
steps there are in all.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO

from pydantic import BaseModel

from detour.events import parse_line
from detour.jobs.states import ACTIVE
from detour.web import event_files
from detour.web.event_files import number

if TYPE_CHECKING:
    import os
    from pathlib import Path

    from detour.jobs.store import Job

TAIL = {True: 1 << 14, False: 1 << 13}
"""Bytes that are read of a job at work, and of one that has ended: a page may list 200 of those for the first time."""
LONG_TAIL = 1 << 18  # where the last 16 KiB hold no step: warnings may be long
FAR = {True: 1 << 26, False: 1 << 22}
"""Bytes that are searched backwards for a run's beginning: of a job at work (few), and of one that has ended (many)."""
REMEMBERED = 4096  # files

_BLOCK = 1 << 20
_START = b'\n{"type": "start"'


class Stage(BaseModel):
    """What is done before the steps, such as caching latents."""

    name: str
    done: int
    total: int


class Progress(BaseModel):
    """How far a job is."""

    step: int
    total_steps: int | None
    """None where it is not known yet."""
    seconds_per_step: float | None
    """Of training alone."""
    seconds_left: float | None
    """By the clock, with saving and drawing; None for a job that is not at work."""
    stage: Stage | None
    """What is being prepared now."""
    process: int
    """Which process of the job, from 1."""
    processes: int


@dataclass
class _Found:
    """What the end of a file tells."""

    total: int | None = None
    started: bool = False
    """The run's last beginning is in this part."""
    finished: bool = False
    steps: list[tuple[float, int, float]] = field(default_factory=list)
    """Time, step and seconds of each step since that beginning."""
    step: int | None = None
    stage: Stage | None = None


@dataclass(frozen=True)
class _Known:
    """What was found in a file as it was."""

    inode: int
    size: int
    changed: int
    found: _Found


class Meter:
    """Progress of jobs. May be shared by threads."""

    def __init__(self) -> None:
        self._known: OrderedDict[Path, _Known] = OrderedDict()
        self._lock = threading.Lock()

    def progress(self, job: Job) -> Progress | None:
        """How far a job is; None before its first event."""
        last = newest(job)
        if last is None:
            return None
        index, path, stat = last
        at_work = job.state in ACTIVE
        found = self._look(path, stat, at_work=at_work)
        if found is None or (found.step is None and found.stage is None):
            return None
        total = found.step if found.finished else found.total
        return Progress(
            step=found.step or 0,
            total_steps=total,
            seconds_per_step=_speed(found),
            seconds_left=_left(found, total) if at_work else None,
            stage=found.stage if at_work and stat.st_mtime >= (job.started or 0.0) else None,
            process=index + 1,
            processes=len(job.run_folders),
        )

    def _look(self, path: Path, stat: os.stat_result, *, at_work: bool) -> _Found | None:
        tail, far = TAIL[at_work], FAR[at_work]
        with self._lock:
            known = self._known.get(path)
        if known is not None and (known.inode, known.size, known.changed) == _identity(stat):
            return known.found
        file = event_files.opened(path)
        if file is None:
            return None
        with file:
            found = _tail(file, stat.st_size, tail)
            if found.step is None and stat.st_size > tail:
                found = _tail(file, stat.st_size, LONG_TAIL)
            if not found.started:
                same = known is not None and known.inode == stat.st_ino and known.size <= stat.st_size
                # What was appended since may hold a new beginning, if it is more than what was read now.
                appended = stat.st_size - known.size if known is not None and same else far
                start = _last_start(file, stat.st_size, min(far, appended + tail))
                found.total = start if start is not None or known is None or not same else known.found.total
        with self._lock:
            self._known[path] = _Known(*_identity(stat), found)
            self._known.move_to_end(path)
            while len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        return found


METER = Meter()
"""Of this process: what it remembers hangs on nothing but the files."""


def _identity(stat: os.stat_result) -> tuple[int, int, int]:
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def newest(job: Job) -> tuple[int, Path, os.stat_result] | None:
    """The event file that was written to last: of the process that is, or was, at work."""
    found = []
    for index, folder in enumerate(job.run_folders):
        path = folder / event_files.NAME
        try:
            found.append((index, path, path.stat()))
        except OSError:
            continue
    return max(found, key=lambda one: (one[2].st_mtime_ns, one[0]), default=None)


def _tail(file: BinaryIO, size: int, length: int) -> _Found:
    begin = max(0, size - length)
    file.seek(begin)
    lines = file.read(size - begin).split(b"\n")
    found = _Found()
    for line in lines[1 if begin else 0 : -1]:
        record = parse_line(line)
        if record is not None:
            _take(found, record)
    return found


def _take(found: _Found, record: dict[str, Any]) -> None:
    kind, step = record["type"], number(record, "step")
    if kind == "start":
        found.steps.clear()
        found.total, found.started = _whole(number(record, "total_steps")), True
    if kind == "stage":
        done, total = number(record, "done"), number(record, "total")
        found.stage = Stage(name=str(record.get("name", "")), done=int(done or 0), total=int(total or 0))
    elif kind in ("start", "step", "end"):
        found.stage = None
        found.finished = kind == "end" and record.get("reason") == "finished"
        if step is not None:
            found.step = int(step)
    if kind == "step" and step is not None:
        found.steps.append((number(record, "time") or 0.0, int(step), number(record, "seconds") or 0.0))


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def _last_start(file: BinaryIO, size: int, far: int) -> int | None:
    """`total_steps` of the last beginning in the last `far` bytes of a file."""
    end, limit = size, max(0, size - far)
    while end > limit:
        begin = max(limit, end - _BLOCK)
        file.seek(begin)
        block = file.read(end - begin)
        at = block.rfind(_START)
        at = at + 1 if at >= 0 else 0 if begin == 0 and block.startswith(_START[1:]) else -1
        if at >= 0:
            file.seek(begin + at)
            record = parse_line(file.readline(event_files.LONGEST))
            return _whole(number(record, "total_steps")) if record is not None else None
        end = begin + len(_START) - 1 if begin > limit else begin  # it may lie across two blocks
    return None


def _speed(found: _Found) -> float | None:
    last = [seconds for _, _, seconds in found.steps[-20:]]
    return sum(last) / len(last) if last else None


def _left(found: _Found, total: int | None) -> float | None:
    if total is None or len(found.steps) < 2:
        return None
    (began, first, _), (now, last, _) = found.steps[0], found.steps[-1]
    return max(0.0, (total - last) * (now - began) / (last - first)) if last > first else None
