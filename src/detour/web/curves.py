"""The curves of a job and its timeline, as its page draws them."""

from __future__ import annotations

import heapq
import re
from contextlib import contextmanager
from math import isfinite
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Query
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from detour.report import gate, words
from detour.web import event_files, progress
from detour.web.event_files import number
from detour.web.found import FoundJob
from detour.web.history import BANDS, EDGES, HISTORIES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from detour.jobs.store import Job
    from detour.web.history import History, Reader

router = APIRouter()

POINTS = 2000
"""Of a curve, at most: about as many as a screen has columns."""
CHUNKS = 100
"""Points of each band's curve: a step has too few pictures for a point of its own."""
DETAILS = 50
"""Lines of a warning."""

_CURSOR = re.compile(r"([0-9a-f]+-\d+-\d+)\.(\d{1,9})\.(\d{1,9})\.(\d{1,9})")

Values = list[float | None]
"""One for each step beside it; null is not finite, or not there."""


class StepCurves(BaseModel):
    """Training steps. Of long runs some are left out, never the first and the last."""

    step: list[int]
    time: Values
    """Unix seconds."""
    loss: Values
    loss_mean: Values
    """Mean loss of the steps from behind the point before to this one."""
    lr: Values
    grad_norm: Values
    seconds: Values
    """Length of the step."""
    seconds_outside: Values
    """Between it and the step before: data, saving, drawing."""
    memory_bytes: Values


class BandCurves(BaseModel):
    """Mean loss of pictures by the time that was drawn for them, over stretches of steps."""

    edges: list[float]
    """In [0, 1], 0 is clean and 1 noise. Band i goes from edges[i] to edges[i + 1]."""
    step: list[int]
    """Last step of each stretch."""
    loss: list[Values]
    """By band."""
    pictures: list[list[int]]
    """By band: how many the mean is of."""


class ValidationCurves(BaseModel):
    """Loss on pictures that are not trained on, always at the same noise and times."""

    step: list[int]
    loss: Values
    by_time: dict[str, Values]


class DriftCurves(BaseModel):
    """How far few-step pictures of control prompts have moved; relative to the untouched model's."""

    step: list[int]
    drift: Values
    pixels: Values
    gap: Values
    gap_untouched: Values
    curvature: Values
    curvature_untouched: Values
    spread: Values
    alarm: list[bool]


class Curves(BaseModel):
    """The curves of a process of a job: all of them, or the points behind `since`."""

    process: int
    processes: int
    arch: str
    total_steps: int | None
    cursor: str
    """For `since`."""
    reset: bool
    """What was sent before does not hold any more: these are all points."""
    complete: bool
    """False: the file is long and more of it is read at the next request."""
    steps: StepCurves
    bands: BandCurves | None
    """Always of the whole run. None where losses are not of one time each."""
    validation: ValidationCurves
    drift: DriftCurves


class Moment(BaseModel):
    """Something that happened."""

    kind: str
    """`created`, `stage`, `start`, `gate`, `plateau`, `warning`, `save`, `stop`, `broke_off`, `end`; last `verdict` or
    `failed`."""
    time: float | None
    """Unix seconds."""
    step: int | None
    text: str
    details: list[str] = []
    process: int


class Timeline(BaseModel):
    """What happened to a job, the oldest first."""

    moments: list[Moment]
    left_out: int
    """Older ones that are not kept."""
    complete: bool
    """False: a file is long and more of it is read at the next request."""


@contextmanager
def history_of(job: Job, process: int, share: float = 1.0) -> Iterator[Reader]:
    """The history of a process (from 1), read on, and held as long as it is looked at."""
    reader = HISTORIES.of(job.run_folders[process - 1] / event_files.NAME)
    with reader.lock:
        reader.update(share)
        yield reader


def process_of(job: Job, asked: int | None) -> int:
    """The process that is asked for, or the one that was at work last. 404 if there is none of that number."""
    if asked is None:
        last = progress.newest(job)
        return 1 if last is None else last[0] + 1
    if asked > len(job.run_folders):
        raise HTTPException(404, f"job {job.id} has {len(job.run_folders)} processes")
    return asked


@router.get("/api/jobs/{job_id:number}/curves")
def job_curves(
    job: FoundJob,
    process: Annotated[int | None, Query(ge=1)] = None,
    since: Annotated[str, Query(max_length=100)] = "",
    points: Annotated[int, Query(ge=2, le=POINTS)] = POINTS,
) -> Curves:
    """The curves of a job. `since` is the `cursor` of an earlier answer: only what came after it is sent."""
    which = process_of(job, process)
    with history_of(job, which) as reader:
        history = reader.history
        ends = len(history.steps), len(history.validations), len(history.drifts)
        known = _CURSOR.fullmatch(since)
        counts = tuple(int(known[place]) for place in (2, 3, 4)) if known else ()
        goes_on = (
            known is not None and known[1] == history.version and all(c <= e for c, e in zip(counts, ends, strict=True))
        )
        steps, validations, drifts = counts if goes_on else (0, 0, 0)
        return Curves(
            process=which,
            processes=len(job.run_folders),
            arch=history.arch,
            total_steps=history.total_steps,
            cursor=".".join([history.version, *map(str, ends)]),
            reset=not goes_on,
            complete=reader.complete,
            steps=_steps(history, steps, points),
            bands=_bands(history),
            validation=_validation(history.validations[validations:]),
            drift=_drift(history.drifts[drifts:]),
        )


@router.get("/api/jobs/{job_id:number}/timeline")
def job_timeline(job: FoundJob) -> Timeline:
    """What happened to a job: its events that are not figures, with what the queue knows."""
    added = Moment(kind="created", time=job.created, step=None, text="added to the queue", process=1)
    by_process, left_out, complete = list[list[Moment]](), 0, True
    for process in range(1, len(job.run_folders) + 1):
        with history_of(job, process, 1 / len(job.run_folders)) as reader:
            by_process.append(list(_moments(reader.history, process)))
            left_out += reader.history.left_out
            complete = complete and reader.complete
    moments = [added, *heapq.merge(*by_process, key=lambda moment: moment.time or 0.0)]  # each as in its file
    if job.ended is not None and job.cause is not None:
        last = len(job.run_folders)
        kind = "failed" if job.state == "failed" else "verdict"
        moments.append(Moment(kind=kind, time=job.ended, step=None, text=job.reason, process=last))
    return Timeline(moments=moments, left_out=left_out, complete=complete)


# --- curves -----------------------------------------------------------------------------------------------------------


def _steps(history: History, begin: int, points: int) -> StepCurves:
    steps = history.steps
    chosen = thinned(begin, len(steps), points)
    figures = {name: [_finite(column[at]) for at in chosen] for name, column in steps.figures.items()}
    loss, after = steps.figures["loss"], [begin, *(at + 1 for at in chosen)]
    means = [_mean(loss[first : last + 1]) for first, last in zip(after, chosen, strict=False)]
    return StepCurves(step=[steps.step[at] for at in chosen], loss_mean=means, **figures)


def thinned(begin: int, end: int, points: int) -> list[int]:
    """At most so many of the places from `begin` up to `end`, evenly, with the first and the last."""
    count = end - begin
    if count <= points:
        return list(range(begin, end))
    return [begin + round(place * (count - 1) / (points - 1)) for place in range(points)]


def _bands(history: History) -> BandCurves | None:
    steps = history.steps
    if not any(any(counts) for counts in steps.counts):
        return None
    chunks = min(CHUNKS, len(steps))
    ends = [round((chunk + 1) * len(steps) / chunks) for chunk in range(chunks)]
    spans = list(zip([0, *ends[:-1]], ends, strict=True))
    pictures = [[sum(steps.counts[band][first:last]) for first, last in spans] for band in range(BANDS)]
    sums = [[sum(steps.sums[band][first:last]) for first, last in spans] for band in range(BANDS)]
    loss: list[Values] = [
        [total / count if count else None for total, count in zip(sums[band], pictures[band], strict=True)]
        for band in range(BANDS)
    ]
    return BandCurves(edges=list(EDGES), step=[steps.step[end - 1] for end in ends], loss=loss, pictures=pictures)


def _validation(records: Sequence[dict[str, Any]]) -> ValidationCurves:
    tables = [found if isinstance(found := record.get("by_time"), dict) else {} for record in records]
    times = sorted({time for table in tables for time in table})
    return ValidationCurves(
        step=[int(record["step"]) for record in records],
        loss=[number(record, "loss") for record in records],
        by_time={time: [number(table, time) for table in tables] for time in times},
    )


def _drift(records: Sequence[dict[str, Any]]) -> DriftCurves:
    names = ("drift", "pixels", "gap", "gap_untouched", "curvature", "curvature_untouched", "spread")
    return DriftCurves(
        step=[int(record["step"]) for record in records],
        alarm=[record.get("alarm") is True for record in records],
        **{name: [number(record, name) for record in records] for name in names},
    )


def _finite(value: float) -> float | None:
    return value if isfinite(value) else None


def _mean(values: Sequence[float]) -> float | None:
    known = [value for value in values if isfinite(value)]
    return sum(known) / len(known) if known else None


# --- the timeline -----------------------------------------------------------------------------------------------------


def _moments(history: History, process: int) -> Iterator[Moment]:
    trains = False
    for record in history.moments:
        kind, step = str(record["type"]), number(record, "step")
        text, details = _words(record)
        moment = Moment(
            kind=kind, time=number(record, "time"), step=None if step is None else int(step), text=text,
            details=details, process=process,
        )  # fmt: skip
        if trains and kind in ("start", "stage"):
            text = "broke off without a word: it was killed, or failed (the log tells)"
            yield moment.model_copy(update={"kind": "broke_off", "step": None, "text": text, "details": []})
            trains = False
        trains = kind == "start" or (trains and kind != "end")
        yield moment


def _words(record: dict[str, Any]) -> tuple[str, list[str]]:
    """A moment in plain words, with its details."""
    match record["type"]:
        case "start":
            begins = f"goes on at step {record.get('step')}" if record.get("resumed_from") else "starts"
            return f"{begins}: {record.get('total_steps')} steps in all", []
        case "stage":
            note = f" ({record['note']})" if record.get("note") else ""
            took = (number(record, "time") or 0.0) - (number(record, "began") or number(record, "time") or 0.0)
            after = f", in {words.duration(took)}" if took >= 1 else ""
            return f"{record.get('name')}: {record.get('done')} of {record.get('total')}{note}{after}", []
        case "gate":
            return gate.told(record)
        case "save":
            lora = f" and {_file(record['lora'])}" if record.get("lora") else ""
            proof = [str(record["proof"])] if record.get("proof") else []
            return f"saved {_file(record.get('checkpoint'))}{lora}", proof
        case "plateau" | "stop" | "end" as kind:
            ended = f"ended after {words.duration(number(record, 'seconds') or 0.0)}:"
            begins = {"plateau": "done:", "stop": "asked to stop, and saves first:", "end": ended}[kind]
            return f"{begins} {record.get('reason')}", []
    details = [str(line) for line in found] if isinstance(found := record.get("details"), list) else []
    more = [f"and {len(details) - DETAILS} more"] if len(details) > DETAILS else []
    return str(record.get("message", "")), details[:DETAILS] + more


def _file(path: object) -> str:
    """The name of a file that an event tells of: folders are of no interest here."""
    return re.split(r"[/\\]", str(path))[-1]
