"""Typed progress events: the only channel from a run to anyone who watches it.

A run emits events into a `Sink` that was passed in. `events.jsonl` has one JSON object a line,
`{"type": "step", "time": 1767225600.25, "step": 12, ...}`; figures that are not finite are written as null.
"""

import contextlib
import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from detour import UserError, files


@dataclass(frozen=True, kw_only=True)
class StartEvent:
    """A run begins, or goes on from a checkpoint."""

    type: ClassVar[str] = "start"
    step: int
    """Steps done already."""
    total_steps: int
    name: str
    arch: str
    resumed_from: str | None
    """The checkpoint, or None for a fresh start."""
    facts: dict[str, str] = field(default_factory=dict)
    """Versions of the libraries, hashes of the inputs, the number of training pictures (`pictures`)."""


@dataclass(frozen=True, kw_only=True)
class StageEvent:
    """Progress of what is done before or between steps, such as caching latents."""

    type: ClassVar[str] = "stage"
    name: str
    done: int
    total: int
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class StepEvent:
    """An optimizer step."""

    type: ClassVar[str] = "step"
    step: int
    epoch: int
    loss: float
    lr: float
    grad_norm: float
    seconds: float
    """Length of the step."""
    seconds_outside: float
    """Time since the end of the step before, less this step: data, saving, sampling."""
    memory_bytes: int
    """Most memory held on the device so far."""
    pictures: list[str] | None = None
    picture_losses: list[tuple[float, float]] | None = None
    """Time and loss of each picture of the step; None where a loss is of several times, or of none."""


@dataclass(frozen=True, kw_only=True)
class SampleEvent:
    """A preview was drawn."""

    type: ClassVar[str] = "sample"
    step: int
    index: int
    """Place of the prompt in the list."""
    path: str
    prompt: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class SaveEvent:
    """A checkpoint was written and read back; `lora` is the LoRA file beside it, if one was written.

    `proof` says who loaded that file back, and how many layers took a part of it.
    """

    type: ClassVar[str] = "save"
    step: int
    checkpoint: str
    lora: str | None
    proof: str | None = None


@dataclass(frozen=True, kw_only=True)
class DriftEvent:
    """How far few-step pictures of control prompts have moved from the untouched model's (see `train.drift`)."""

    type: ClassVar[str] = "drift"
    step: int
    drift: float
    """Root mean square over latents, relative to the untouched pictures': 0 is unmoved."""
    by_prompt: dict[str, float]
    pixels: float
    """The same of pixels in [0, 1], not relative."""
    gap: float | None
    """Between pictures of few and of many steps of the same weights, relative; None where it was not measured."""
    gap_untouched: float | None
    """The same of the untouched model: few steps are kept where `gap` stays near it."""
    curvature: float
    """How bent the way from noise to picture is; 0 is straight."""
    curvature_untouched: float
    spread: float
    """Distance between two pictures of one prompt, relative to the untouched model's: below 1 variety is lost."""
    alarm: bool
    """Is `drift` above `preserve.drift.alarm`?"""
    sharpness: float | None = None
    """Of few-step pictures, relative to the untouched model's: below 1 they are blurred. Root mean square of the
    differences between neighbouring pixels; None where the untouched model's pictures are flat."""
    sharpness_long: float | None = None
    """Of many-step pictures, relative to the untouched model's of few steps; None where it was not measured."""


@dataclass(frozen=True, kw_only=True)
class GateEvent:
    """Before the first step: does being told more help the teacher (see `train.gate`)?"""

    type: ClassVar[str] = "gate"
    step: int
    passed: bool
    gain: float
    """How much closer to the training pictures its drawings come, as a share of the distance; and its standard error.
    """
    gain_error: float
    gap: float
    """What being told more changes in its predictions: the whole signal at the start."""
    colour: list[float]
    """Red, green and blue of its drawings less those of the pictures, of 0 to 1."""
    frame: str
    """The change of frame that fits the pictures better; empty where none does."""
    reasons: list[str]
    """Why it did not pass."""
    path: str
    """The drawings beside the pictures."""


@dataclass(frozen=True, kw_only=True)
class ValidationEvent:
    """Loss on pictures that are not trained on."""

    type: ClassVar[str] = "validation"
    step: int
    loss: float
    by_time: dict[str, float]
    """Loss at each time, the time written as in the job file."""


@dataclass(frozen=True, kw_only=True)
class PlateauEvent:
    """A training adapter is done: the loss on held-out pictures has stopped falling (see `train.plateau`)."""

    type: ClassVar[str] = "plateau"
    step: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class WarningEvent:
    """Something the user should know of; the run goes on."""

    type: ClassVar[str] = "warning"
    step: int | None
    message: str
    details: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class StopEvent:
    """Somebody asked the run to stop; it saves and ends."""

    type: ClassVar[str] = "stop"
    step: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class EndEvent:
    """The run is over."""

    type: ClassVar[str] = "end"
    step: int
    reason: str
    seconds: float


Event = (
    StartEvent
    | StageEvent
    | StepEvent
    | SampleEvent
    | SaveEvent
    | ValidationEvent
    | DriftEvent
    | GateEvent
    | PlateauEvent
    | WarningEvent
    | StopEvent
    | EndEvent
)


class Sink(Protocol):
    """Whoever watches a run."""

    def emit(self, event: Event) -> None:
        """Take one event."""

    def close(self) -> None:
        """Nothing more will come."""


def to_record(event: Event, at: float) -> dict[str, Any]:
    """The JSON object of an event that happened at `at` (Unix seconds)."""
    record = {"type": event.type, "time": at} | dataclasses.asdict(event)
    return {key: _finite(value) for key, value in record.items()}


def to_line(record: dict[str, Any]) -> bytes:
    """A record as one line of `events.jsonl`."""
    return (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode(errors="backslashreplace")


def _finite(value: object) -> object:
    """JSON has no NaN and no infinity, and browsers refuse a line that holds one: they become null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Tee:
    """Passes each event to several sinks. All get it, even if one of them raises."""

    def __init__(self, *sinks: Sink) -> None:
        self._sinks = sinks

    def emit(self, event: Event) -> None:
        """Emit to each sink, in order."""
        with contextlib.ExitStack() as stack:  # runs every callback, then raises; last in, first out
            for sink in reversed(self._sinks):
                stack.callback(sink.emit, event)

    def close(self) -> None:
        """Close each sink, in order."""
        with contextlib.ExitStack() as stack:
            for sink in reversed(self._sinks):
                stack.callback(sink.close)


class JsonlSink:
    """Appends one JSON line for each event and flushes it at once.

    A line that an earlier process left unfinished is completed if only its end is missing, and removed otherwise.
    A full disk does not end a run: lines that do not fit are counted, told to `warn`, and named in the file once there
    is room.
    """

    def __init__(self, path: Path, warn: Callable[[str], None] | None = None) -> None:
        files.make_folder(path.parent)
        self._path = path
        self._warn = warn
        self._lost = 0
        with files.explained(path):
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | files.BINARY, 0o666)
            _mend(self._fd)

    def emit(self, event: Event) -> None:
        """Append the event. UserError if the file cannot be written for a reason other than a full disk."""
        at = time.time()
        if self._lost:
            note = WarningEvent(step=None, message=f"{self._lost} events are missing here: the disk was full")
            if not self._append(to_record(note, at)):
                self._lost += 1
                return
            self._lost = 0
        if not self._append(to_record(event, at)):
            self._lost = 1
            if self._warn is not None:
                self._warn(
                    f"{self._path} cannot be written: the disk is full. The run goes on without recording events"
                )

    def close(self) -> None:
        """Bring what was written to the disk. May be called twice."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            with contextlib.suppress(OSError):
                os.fsync(fd)
            os.close(fd)

    def _append(self, record: dict[str, Any]) -> bool:
        before = os.fstat(self._fd).st_size
        try:
            with files.explained(self._path):
                files.write_all(self._fd, to_line(record))
        except files.DiskFullError:
            os.ftruncate(self._fd, before)  # no torn line stays
            return False
        return True


def _mend(fd: int) -> None:
    """Complete an unfinished last line if only its end is missing, otherwise remove it."""
    size = os.fstat(fd).st_size
    start, tail = size, b""
    while start > 0 and b"\n" not in tail:  # backwards to the last line end
        block = min(1 << 16, start)
        start -= block
        os.lseek(fd, start, os.SEEK_SET)
        tail = os.read(fd, block) + tail
    torn = tail[tail.rfind(b"\n") + 1 :]
    if parse_line(torn) is not None:
        files.write_all(fd, b"\n")
    elif torn:
        os.ftruncate(fd, size - len(torn))


def read_events(path: Path, *, without: Collection[str] = ()) -> Iterator[dict[str, Any]]:
    """Yield the events of a file, also while it is being written: a last line without its end is left out.

    Whole lines of types in `without` are passed over unread: nearly all are of steps, and to read one takes 15 us.
    UserError, with the line's number, for any other line that is not an event.
    """
    passed = tuple(f'{{"type": "{kind}",'.encode() for kind in without)
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    with file:
        for number, line in enumerate(file, 1):
            if passed and line.startswith(passed) and line.endswith(b"}\n"):
                continue
            record = parse_line(line)
            if record is not None:
                yield record
            elif line.endswith(b"\n"):
                found = f"line {number} is not an event: {line[:80]!r}"
                raise UserError(f"{path}, {found}. The file was damaged or edited; remove that line")


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The record of a line of `events.jsonl`; None where it is not an event."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("type"), str) else None
