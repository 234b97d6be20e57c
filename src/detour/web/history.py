"""What the events of a run tell, kept between requests: each reads on where the last one stopped.

A run that goes on from a checkpoint does some steps again: what came after that checkpoint is dropped, so that the
curves are those of the weights as they are. The timeline and the list of samples keep everything.
"""

from __future__ import annotations

import threading
import time
from array import array
from bisect import bisect_right
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from math import nan
from typing import TYPE_CHECKING, Any

from detour.web import event_files
from detour.web.event_files import Mark, number

if TYPE_CHECKING:
    from pathlib import Path

FIGURES = ("time", "loss", "lr", "grad_norm", "seconds", "seconds_outside", "memory_bytes")
"""Of each step, besides its number. Not finite is kept as NaN."""
EDGES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Bands of times, in [0, 1] with 0 clean and 1 noise; each holds its lower edge, the last its upper one too."""
BANDS = len(EDGES) - 1
WORK = 0.06
"""Seconds of processor time that one request spends on reading: 3 000 steps. Of work and not of bytes, so that an
answer comes as soon on a slow machine; not by the clock, so that it holds as much on a busy one."""
_AT_ONCE = 50  # lines between two looks at the time
MOST_STEPS = 200_000  # of a run; of longer ones every second is dropped, then every second of those, ...
MOST_IN_ALL = 400_000  # steps of all runs that are kept at once: about 60 MB
MOST_RUNS = 16
MOST_MOMENTS = 1000  # of a timeline


@dataclass
class Steps:
    """The steps of a run in columns, 140 bytes a step."""

    step: array[int] = field(default_factory=lambda: array("q"))
    figures: dict[str, array[float]] = field(default_factory=lambda: {name: array("d") for name in FIGURES})
    sums: list[array[float]] = field(default_factory=lambda: [array("d") for _ in range(BANDS)])
    """Of the losses of a step's pictures in each band of times."""
    counts: list[array[int]] = field(default_factory=lambda: [array("q") for _ in range(BANDS)])
    dropped: int = 0
    """How often every second step was dropped."""

    def __len__(self) -> int:
        return len(self.step)

    def add(self, record: dict[str, Any], step: int) -> None:
        """Append a step."""
        self.step.append(step)
        for name, column in self.figures.items():
            value = number(record, name)
            column.append(nan if value is None else value)
        sums, counts = _by_band(record.get("picture_losses"))
        for band in range(BANDS):
            self.sums[band].append(sums[band])
            self.counts[band].append(counts[band])
        if len(self) > MOST_STEPS:
            self._halve()

    def cut(self, after: int) -> None:
        """Forget the steps after one."""
        at = bisect_right(self.step, after)
        for column in self._columns:
            del column[at:]

    @property
    def _columns(self) -> list[array[Any]]:
        return [self.step, *self.figures.values(), *self.sums, *self.counts]

    def _halve(self) -> None:
        """Drop every second step but the first and the last; its pictures count for the one behind it."""
        last = len(self) - 1
        both: list[array[Any]] = [*self.sums, *self.counts]
        for column in both:
            for at in range(1, last, 2):
                column[at + 1] += column[at]
        for column in self._columns:
            del column[1:last:2]
        self.dropped += 1


def _by_band(pairs: object) -> tuple[list[float], list[int]]:
    """Sum and number of the losses in each band."""
    sums, counts = [0.0] * BANDS, [0] * BANDS
    for pair in pairs if isinstance(pairs, list) else ():
        match pair:
            case [int() | float() as time, int() | float() as loss]:
                band = min(max(bisect_right(EDGES, time) - 1, 0), BANDS - 1)
                sums[band] += loss
                counts[band] += 1
    return sums, counts


@dataclass
class History:
    """A run so far."""

    file: str = ""
    """How its event file begins."""
    starts: int = 0
    """Beginnings so far."""
    name: str = ""
    arch: str = ""
    total_steps: int | None = None
    steps: Steps = field(default_factory=Steps)
    validations: list[dict[str, Any]] = field(default_factory=list)
    drifts: list[dict[str, Any]] = field(default_factory=list)
    samples: dict[tuple[int, int], tuple[str, int | None]] = field(default_factory=dict)
    """(step, index) -> prompt and seed."""
    gate: dict[str, Any] | None = None
    """What the teacher gate found."""
    moments: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=MOST_MOMENTS))
    """Beginnings, stages, gates, plateaus, warnings, saves, stops and ends, as in the file."""
    left_out: int = 0
    """Older moments that are not kept."""

    @property
    def version(self) -> str:
        """Another one when points that were told of have gone."""
        return f"{self.file or '0'}-{self.starts}-{self.steps.dropped}"

    @property
    def size(self) -> int:
        """What it holds, in steps."""
        return len(self.steps) + len(self.validations) + len(self.drifts) + len(self.samples)

    def take(self, record: dict[str, Any]) -> None:
        """Take the next event."""
        kind, step = record["type"], number(record, "step")
        if kind == "step" and step is not None:
            if self.steps.step and step <= self.steps.step[-1]:  # no beginning was written: as if there had been one
                self._go_back(int(step) - 1)
            self.steps.add(record, int(step))
        elif kind == "validation" and step is not None:
            self.validations.append(record)
        elif kind == "drift" and step is not None:
            self.drifts.append(record)
        elif kind == "sample" and step is not None:
            seed = number(record, "seed")
            place = int(step), int(number(record, "index") or 0)
            self.samples[place] = str(record.get("prompt", "")), None if seed is None else int(seed)
        elif kind in ("start", "stage", "gate", "plateau", "warning", "save", "stop", "end"):
            self._moment(record)
            if kind == "start":
                self._start(record, int(step or 0))
            elif kind == "gate":
                self.gate = record

    def _start(self, record: dict[str, Any], step: int) -> None:
        total = number(record, "total_steps")
        self.name, self.arch = str(record.get("name", "")), str(record.get("arch", ""))
        self.total_steps = None if total is None else int(total)
        self._go_back(step)

    def _go_back(self, step: int) -> None:
        """What was after a step is done again."""
        self.starts += 1
        self.steps.cut(step)
        for found in (self.validations, self.drifts):
            found[:] = [old for old in found if old["step"] <= step]

    def _moment(self, record: dict[str, Any]) -> None:
        """Of a stage that goes on, only how far it is now."""
        last = self.moments[-1] if self.moments else {}
        if record["type"] == "stage" and last.get("type") == "stage" and last.get("name") == record.get("name"):
            self.moments[-1] = record | {"began": last.get("began", last.get("time"))}
            return
        self.left_out += len(self.moments) == MOST_MOMENTS
        self.moments.append(record)


class Reader:
    """Reads an event file bit by bit. Used by one thread at a time, which holds its `lock`."""

    def __init__(self, path: Path) -> None:
        self.lock = threading.Lock()
        self.history = History()
        self.complete = False
        """Everything that was there was read."""
        self._path = path
        self._mark = Mark()

    def update(self, share: float = 1.0) -> None:
        """Read on, for about that share of `WORK` at most. UserError where the file cannot be read."""
        file = event_files.opened(self._path)
        self.complete = True
        if file is None:
            return
        with file:
            name = event_files.beginning(file)
            if not event_files.holds(file, name, self._mark):  # another file has the name now
                self._mark, self.history = Mark(), History()
            self.history.file = name
            until = time.thread_time() + share * WORK
            for number, (line, behind) in enumerate(event_files.lines(file, self._mark.offset), 1):
                self.history.take(event_files.event(line))
                self._mark = Mark(name, behind)
                if number % _AT_ONCE == 0 and time.thread_time() >= until:
                    self.complete = False
                    return


class Histories:
    """Those that were asked for last. What they remember hangs on nothing but the files."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Path, Reader] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, path: Path) -> Reader:
        """The reader of an event file."""
        with self._lock:
            found = self._kept.setdefault(path, Reader(path))
            self._kept.move_to_end(path)
            while len(self._kept) > 1 and (
                len(self._kept) > MOST_RUNS or sum(reader.history.size for reader in self._kept.values()) > MOST_IN_ALL
            ):
                self._kept.popitem(last=False)
            return found


HISTORIES = Histories()
