"""A job's events as they come: server-sent events that go on where a client has lost its connection.

Each event carries the place behind it in the files that it comes from. A client that comes back with that place
(`Last-Event-ID`) gets what follows, once, in the same order, from this server or the next.
"""

from __future__ import annotations

import asyncio
import heapq
import json
from collections.abc import AsyncIterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Depends, Header, Query
from fastapi.sse import EventSourceResponse, ServerSentEvent
from starlette.concurrency import run_in_threadpool

from detour import UserError
from detour.jobs.states import ENDED, UnknownJobError
from detour.web import event_files
from detour.web.event_files import Mark
from detour.web.found import FoundJob, Here

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path
    from typing import BinaryIO

    from detour.jobs.store import Job, Store

router = APIRouter()

POLL = 0.5  # seconds between two looks at the files: their size is asked for, and nothing is opened if it is the same
PIECE = 500  # events that are read at once, at most
PIECE_BYTES = 1 << 20
PATIENCE = 60_000  # milliseconds after which a client may ask again about a job that has ended


@dataclass(frozen=True, slots=True)
class Position:
    """A place in the event files of a job, one for each of its processes."""

    marks: tuple[Mark, ...]

    def __str__(self) -> str:
        return "_".join(map(str, self.marks))

    @classmethod
    def start(cls, folders: Sequence[Path]) -> Position:
        """Before everything."""
        return cls((Mark(),) * len(folders))

    @classmethod
    def end(cls, folders: Sequence[Path]) -> Position:
        """Behind everything that is there now."""
        marks = []
        for folder in folders:
            file = event_files.opened(folder / event_files.NAME)
            if file is None:
                marks.append(Mark())
                continue
            with file:
                marks.append(event_files.end(file))
        return cls(tuple(marks))

    @classmethod
    def parse(cls, text: str) -> Position | None:
        """The inverse of `str`; None for anything else."""
        marks = [Mark.parse(part) for part in text.split("_")]
        known = tuple(mark for mark in marks if mark is not None)
        return cls(known) if len(known) == len(marks) else None


@dataclass(frozen=True, slots=True)
class Taken:
    """What was read."""

    events: list[tuple[str, Position]]
    """JSON objects, each with the place behind it."""
    replaced: bool = False
    """The place is in a file that is not there any more: everything has to be read again."""


def take(folders: Sequence[Path], position: Position, most: int = PIECE) -> Taken:
    """The events behind a place. Those of several processes by time, so that their order is that of writing."""
    if len(folders) != len(position.marks):
        return Taken([], replaced=True)
    marks, sources = list(position.marks), []
    with ExitStack() as stack:
        for index, folder in enumerate(folders):
            file = event_files.opened(folder / event_files.NAME)
            if file is None:
                continue
            stack.enter_context(file)
            name = event_files.beginning(file)
            if not event_files.holds(file, name, marks[index]):
                return Taken([], replaced=True)
            marks[index] = Mark(name, marks[index].offset) if name else Mark()
            sources.append(_records(file, index, marks[index].offset))
        events, size = list[tuple[str, Position]](), 0
        for _, index, text, offset in islice(heapq.merge(*sources, key=lambda found: found[0]), most):
            marks[index] = Mark(marks[index].beginning, offset)
            events.append((text, Position(tuple(marks))))
            size += len(text)
            if size > PIECE_BYTES:
                break
    return Taken(events)


def _records(file: BinaryIO, index: int, offset: int) -> Iterator[tuple[float, int, str, int]]:
    """Time, process, text and the place behind it of every event."""
    for line, behind in event_files.lines(file, offset):
        record = event_files.event(line)
        yield event_files.number(record, "time") or 0.0, index, json.dumps(record, ensure_ascii=False), behind


@dataclass(frozen=True, slots=True)
class Look:
    """A job and its new events at a moment. The state is older than the events."""

    job: Job
    taken: Taken


class Follower:
    """Goes along with a job."""

    def __init__(self, store: Store, job_id: int, position: Position | None) -> None:
        """`position` None stands for one that nobody knows: everything is read again."""
        self._store = store
        self._job_id = job_id
        self.position = position
        self._seen: object = None

    def look(self) -> Look:
        """What is new. Files that are as they were after everything in them was read are not opened."""
        job = self._store.job(self._job_id)  # first: what was written before the end is then among the events
        if self.position is None:
            self.position, self._seen = Position.start(job.run_folders), None
            return Look(job, Taken([], replaced=True))
        now = _signature(job.run_folders)
        if now == self._seen:
            return Look(job, Taken([]))
        taken = take(job.run_folders, self.position)
        if taken.replaced:
            self.position = Position.start(job.run_folders)
        elif taken.events:
            self.position = taken.events[-1][1]
        else:
            self._seen = now
        return Look(job, taken)


def _signature(folders: Sequence[Path]) -> object:
    """Changes whenever an event file does."""
    found: list[tuple[Path, int, int, int] | Path] = []
    for folder in folders:
        try:
            stat = (folder / event_files.NAME).stat()
            found.append((folder, stat.st_ino, stat.st_size, stat.st_mtime_ns))
        except OSError:
            found.append(folder)
    return found


async def follow(follower: Follower, poll: float = POLL) -> AsyncIterator[ServerSentEvent]:
    """Everything behind the follower's place until the job has ended and all was sent.

    Messages are the events, with their places. Besides them come `state` (whenever it changes), `reset` (what was sent
    before is no more; everything follows again), and last `done`, `gone` (the job was deleted) or `trouble`.
    """
    shown: dict[str, Any] = {}
    while True:
        try:
            look = await run_in_threadpool(follower.look)
        except UnknownJobError:
            yield ServerSentEvent(event="gone", data={}, retry=PATIENCE)
            return
        except (UserError, OSError) as error:
            yield ServerSentEvent(event="trouble", data={"error": str(error)})
            return
        state = {"state": look.job.state, "reason": look.job.reason, "attempts": look.job.attempts}
        if state != shown:
            yield ServerSentEvent(event="state", data=state)
            shown = state
        if look.taken.replaced:
            yield ServerSentEvent(event="reset", data={}, id=str(follower.position))
            continue
        for text, position in look.taken.events:
            yield ServerSentEvent(raw_data=text, id=str(position))
        if look.taken.events:
            continue
        if look.job.state in ENDED:
            yield ServerSentEvent(event="done", data=state, retry=PATIENCE)
            return
        await asyncio.sleep(poll)


def _position(
    job: FoundJob,
    since: Annotated[str, Query(max_length=4096)] = "",
    last_event_id: Annotated[str, Header(max_length=4096)] = "",
) -> Position | None:
    """Where a client wants to go on; None for a place that is none."""
    place = last_event_id or since
    if place == "end":
        return Position.end(job.run_folders)
    return Position.parse(place) if place else Position.start(job.run_folders)


@router.get("/api/jobs/{job_id:number}/events", response_class=EventSourceResponse)
async def job_events(
    here: Here, job: FoundJob, position: Annotated[Position | None, Depends(_position)]
) -> AsyncIterator[ServerSentEvent]:
    """Server-sent events: the lines of `events.jsonl`, all of them or those behind a place.

    `since` is the `id` of an event, or `end` for what is yet to come; a reconnecting browser says `Last-Event-ID`.
    Messages without a name are the run's events. `state` tells of the job's state, `reset` that everything follows
    again (the run was started afresh), `done`, `gone` and `trouble` come last. A comment comes every 15 s.
    """
    async for message in follow(Follower(here.store, job.id, position)):
        yield message
