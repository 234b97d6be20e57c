"""Shows a run to a person: a live bar on a terminal, plain lines in a log, JSON lines for another program.

The sinks write to the stream they are given and nowhere else. With `--json` standard output belongs to the result, so
progress goes to standard error.
"""

import math
import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO

from detour.events import (
    DriftEvent,
    EndEvent,
    Event,
    GateEvent,
    PlateauEvent,
    SampleEvent,
    SaveEvent,
    Sink,
    StageEvent,
    StartEvent,
    StepEvent,
    StopEvent,
    ValidationEvent,
    WarningEvent,
    to_line,
    to_record,
)
from detour.report.words import duration

if TYPE_CHECKING:
    from rich.progress import TaskID

LOSS_MEMORY = 0.98  # share of the old mean kept at a step: the loss of one step says little, times are drawn at random
SPEED_MEMORY = 0.9
LISTED = 8  # details of a warning that are shown; `events.jsonl` has them all


def console_sink(
    stream: TextIO,
    *,
    json_lines: bool = False,
    quiet: bool = False,
    terminal: bool | None = None,
    every_seconds: float = 10.0,
) -> Sink:
    """The sink that fits a stream: JSON lines if asked for, a live bar on a terminal, plain lines otherwise.

    `quiet` shows warnings, stops and the end alone. `terminal` overrides what the stream says of itself. Plain step and
    stage lines come at most once in `every_seconds`, the first and the last always.
    """
    if json_lines:
        if stream is sys.stdout:
            raise ValueError("with --json standard output belongs to the result; pass standard error")
        return JsonSink(stream)
    live = stream.isatty() if terminal is None else terminal
    dumb = os.environ.get("TERM") in ("dumb", "unknown")  # these cannot move the cursor
    if live and not quiet and not dumb:
        return BarSink(stream, forced=terminal is True)
    return PlainSink(stream, quiet=quiet, every_seconds=every_seconds)


class JsonSink:
    """The lines of `events.jsonl`, written to a stream."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def emit(self, event: Event) -> None:
        """Write one line."""
        self._stream.write(to_line(to_record(event, time.time())).decode())
        self._stream.flush()

    def close(self) -> None:
        """Nothing is held back."""


class PlainSink:
    """One line for each thing that happens. Progress is thinned out, and up to date before any other news."""

    def __init__(
        self,
        stream: TextIO,
        *,
        quiet: bool = False,
        every_seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream
        self._quiet = quiet
        self._every = every_seconds
        self._clock = clock
        self._meter = Meter()
        self._written = -math.inf
        self._stage = ""
        self._held = ""

    def emit(self, event: Event) -> None:
        """Write the event's line, or hold it back."""
        if isinstance(event, StepEvent | StageEvent):
            self._progress(event)
            return
        if isinstance(event, StartEvent):
            self._meter = Meter(event)
        if self._quiet and not isinstance(event, WarningEvent | StopEvent | EndEvent):
            return
        self._flush()
        for line in describe(event):
            self._line(line)

    def close(self) -> None:
        """Write what was held back."""
        self._flush()

    def _progress(self, event: StepEvent | StageEvent) -> None:
        if isinstance(event, StepEvent):
            self._meter.take(event)
            text, key, last = f"step {self._meter.text()}", "", event.step >= self._meter.total
        else:
            text, key, last = _stage_text(event), event.name, event.done >= event.total
        if self._quiet:
            return
        if key != self._stage:  # another kind of progress begins
            self._flush()
            self._stage, self._written = key, -math.inf
        self._held = text
        if last or self._clock() - self._written >= self._every:
            self._flush()

    def _flush(self) -> None:
        if self._held:
            self._line(self._held)
            self._held, self._written = "", self._clock()

    def _line(self, text: str) -> None:
        self._stream.write(printable(text, self._stream) + "\n")
        self._stream.flush()


class BarSink:
    """A live bar at the bottom of a terminal, news above it, warnings in yellow."""

    def __init__(self, stream: TextIO, *, forced: bool = False) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.table import Column

        self._stream = stream
        self._console = Console(file=stream, force_terminal=True if forced else None, highlight=False, soft_wrap=True)
        figures = Column(ratio=1, no_wrap=True, overflow="ellipsis")  # a narrow terminal loses its end, not the bar
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(10),
            TextColumn("{task.fields[text]}", markup=False, table_column=figures),
        )
        self._progress = Progress(*columns, console=self._console, refresh_per_second=4, expand=True)
        self._meter = Meter()
        self._steps: TaskID | None = None
        self._stages: dict[str, TaskID] = {}

    def emit(self, event: Event) -> None:
        """Move the bar or print above it."""
        if isinstance(event, StepEvent):
            self._step(event)
        elif isinstance(event, StageEvent):
            self._stage(event)
        else:
            if isinstance(event, StartEvent):
                self._meter = Meter(event)
            self._print(event)

    def close(self) -> None:
        """Leave the bar as it is and give the terminal back."""
        self._progress.stop()

    def _step(self, event: StepEvent) -> None:
        self._meter.take(event)
        if self._steps is None:
            self._steps = self._progress.add_task("step", total=self._meter.total or None, text=self._meter.text())
            self._progress.start()
        last = event.step == self._meter.total
        self._progress.update(self._steps, completed=event.step, text=self._meter.text(), refresh=last)

    def _stage(self, event: StageEvent) -> None:
        if event.name not in self._stages:
            self._stages[event.name] = self._progress.add_task(event.name, total=event.total, text=_counts(event))
            self._progress.start()
        last = event.done >= event.total
        task = self._stages[event.name]
        self._progress.update(task, completed=event.done, total=event.total, text=_counts(event), refresh=last)
        if last:  # it leaves the live part; a line above stays
            self._progress.remove_task(self._stages.pop(event.name))
            self._console.print(_stage_text(event), markup=False)

    def _print(self, event: Event) -> None:
        from rich.text import Text

        style = "yellow" if isinstance(event, WarningEvent | StopEvent) else ""
        for line in describe(event):
            self._console.print(
                Text(printable(line, self._stream), style=style)
            )  # as a style of `print` it would colour the bar too


class Meter:
    """Means over the last steps: what a person can read from a run while it goes."""

    def __init__(self, start: StartEvent | None = None) -> None:
        self.total = start.total_steps if start else 0
        self._loss = _Mean(LOSS_MEMORY)
        self._seconds = _Mean(SPEED_MEMORY)
        self._all_seconds = _Mean(LOSS_MEMORY)
        self._event: StepEvent | None = None

    def take(self, event: StepEvent) -> None:
        """Add a step."""
        self._event = event
        self._loss.add(event.loss)
        self._seconds.add(event.seconds)
        self._all_seconds.add(event.seconds + event.seconds_outside)

    def text(self) -> str:
        """`12/3000  loss 0.0312  1.24 s/step  left 1 h 02 min  12.3 GiB  lr 1.0e-04`."""
        event = self._event
        if event is None:
            return ""
        of = f"/{self.total}" if self.total else ""
        parts = [f"{event.step}{of}", f"loss {self._loss.value:.4f}", _speed(self._seconds.value)]
        if self.total > event.step:
            parts.append(f"left {duration((self.total - event.step) * self._all_seconds.value)}")
        if event.memory_bytes:
            parts.append(f"{event.memory_bytes / 2**30:.1f} GiB")
        parts.append(f"lr {event.lr:.1e}")
        return "  ".join(parts)


class _Mean:
    """An exponential mean that starts at its first value's weight instead of zero. What is not finite is left out."""

    def __init__(self, memory: float) -> None:
        self._memory = memory
        self._sum = 0.0
        self._weight = 0.0

    def add(self, value: float) -> None:
        if math.isfinite(value):
            self._sum = self._memory * self._sum + (1 - self._memory) * value
            self._weight = self._memory * self._weight + (1 - self._memory)

    @property
    def value(self) -> float:
        return self._sum / self._weight if self._weight else math.nan


def describe(event: Event) -> list[str]:
    """The lines that say what happened; none for steps and stages, which are progress."""
    lines: list[str] = []
    if isinstance(event, StartEvent):
        begin = f"goes on at step {event.step} from {event.resumed_from}" if event.resumed_from else "starts"
        lines = [f"{event.name} ({event.arch}) {begin}: {event.total_steps} steps in all"]
    elif isinstance(event, SampleEvent):
        lines = [f"step {event.step}: preview {event.path}"]
    elif isinstance(event, SaveEvent):
        lines = [f"step {event.step}: saved {event.checkpoint}" + (f" and {event.lora}" if event.lora else "")]
    elif isinstance(event, ValidationEvent):
        parts = ", ".join(f"{loss:.4f} at {at}" for at, loss in event.by_time.items())
        lines = [f"step {event.step}: validation loss {event.loss:.4f}" + (f" ({parts})" if parts else "")]
    elif isinstance(event, DriftEvent | GateEvent | PlateauEvent):
        lines = [f"step {event.step}: {_measured(event)}"]
    elif isinstance(event, WarningEvent):
        where = "" if event.step is None else f"step {event.step}: "
        lines = [f"{where}warning: {event.message}", *(f"  {detail}" for detail in event.details[:LISTED])]
        if len(event.details) > LISTED:
            lines.append(f"  and {len(event.details) - LISTED} more")
    elif isinstance(event, StopEvent):
        lines = [f"step {event.step}: stopping ({event.reason}); saving first"]
    elif isinstance(event, EndEvent):
        lines = [f"ended at step {event.step} after {duration(event.seconds)}: {event.reason}"]
    return lines


def _measured(event: DriftEvent | GateEvent | PlateauEvent) -> str:
    if isinstance(event, GateEvent):
        closer = f"being told more brings it {event.gain:+.1%} (+-{event.gain_error:.1%}) closer to the pictures"
        return f"teacher gate: {closer}, context gap {event.gap:.4g}; look at {event.path}"
    if isinstance(event, PlateauEvent):
        return f"done: {event.reason}"
    gap = f", few against many steps {event.gap:.3f} (untouched {event.gap_untouched:.3f})" if event.gap else ""
    bent = f"curvature {event.curvature:.3f} (untouched {event.curvature_untouched:.3f})"
    sharp = "" if event.sharpness is None else f", sharpness {event.sharpness:.2f}"
    many = "" if event.sharpness_long is None else f" (many steps {event.sharpness_long:.2f})"
    return f"drift {event.drift:.3f}{gap}, {bent}, variety {event.spread:.2f}{sharp}{many}"


def printable(text: str, stream: TextIO) -> str:
    """`text` with what the stream's encoding lacks written as escapes: a file name in a warning must not end a run."""
    encoding = stream.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _speed(seconds: float) -> str:
    if not math.isfinite(seconds) or seconds >= 1.0:
        return f"{seconds:.2f} s/step"
    return f"{1 / max(seconds, 1e-6):.1f} steps/s"


def _counts(event: StageEvent) -> str:
    return f"{event.done}/{event.total}" + (f"  {event.note}" if event.note else "")


def _stage_text(event: StageEvent) -> str:
    return f"{event.name}  {_counts(event)}"
