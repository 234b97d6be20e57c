"""The API of the queue: what jobs there are, how far they are, and everything that is done with them."""

from __future__ import annotations

import hashlib
import shlex
from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter, Header, Query
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from detour import UserError, files
from detour.jobs import queue
from detour.jobs.states import ACTIVE, ALLOWED, ENDED, Cause, State
from detour.jobs.store import KILL, default_folder
from detour.web.extending import extended
from detour.web.found import FoundJob, Here
from detour.web.progress import METER, Progress
from detour.web.samples import thumbnails

if TYPE_CHECKING:
    from detour.jobs.store import Job, Store

router = APIRouter()

MOST = 200  # jobs of a page


class JobSummary(BaseModel):
    """A job as lists show it. Times are Unix seconds."""

    id: int
    name: str
    device: str
    """The queue it belongs to."""
    state: State
    position: int | None
    """Place among the queued jobs of its device, from 1."""
    says: str
    """What it is doing, or why it ended, in plain words."""
    cause: Cause | None
    reason: str
    exit_code: int | None
    attempts: int
    stops: int
    """How urgently it was asked to stop: 1 saves first, 2 at once, 3 kills."""
    created: float
    started: float | None
    ended: float | None
    progress: Progress | None


class Device(BaseModel):
    """The queue of a device."""

    name: str
    at_work: int | None
    """The job that is at work."""
    queued: int


class JobList(BaseModel):
    """A page of the jobs: by device those at work, then those that wait, in order; then what has ended, newest first.

    `counts` and `devices` are those of all jobs.
    """

    jobs: list[JobSummary]
    total: int
    """Jobs that fit the filter."""
    offset: int
    counts: dict[State, int]
    devices: list[Device]
    worker: bool
    """Somebody works at the queue. Nobody has to as long as nothing is queued."""


class JobDetail(JobSummary):
    """A job with what its own page needs."""

    source: str | None
    """The file it was read from."""
    cwd: str
    run_folders: list[str]
    queue_folder: str
    commands: dict[str, str]
    """What does the same on the command line, by action."""


class Acted(BaseModel):
    """What an action came to."""

    job: JobSummary
    note: str
    """In plain words."""


class Forgotten(BaseModel):
    """A job was deleted."""

    note: str


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class NewJob(_Body):
    """A job file."""

    text: str
    queued: bool = True
    """Start it when its turn comes; otherwise it is a draft, which may have mistakes."""
    like: int | None = Field(default=None, ge=1, lt=10**15)
    """A job from whose folder relative paths count, as in a copy of it; otherwise from the queue's folder."""


class JobText(_Body):
    """A job file in place of another."""

    text: str
    draft: bool = False
    """It may have mistakes, if the job was never started."""


class Stop(_Body):
    """How to stop."""

    kill: bool = False
    """End it whatever it is doing, without saving."""


class Move(_Body):
    """Where to."""

    place: int = Field(ge=1)
    """1 comes next."""


class Extend(_Body):
    """How much further."""

    steps: int = Field(ge=1, le=10_000_000)
    """Optimizer steps more than now."""


# --- reading ----------------------------------------------------------------------------------------------------------


@router.get("/api/jobs", response_model=JobList, responses={304: {"description": "As it was (If-None-Match)"}})
def job_list(
    here: Here,
    state: Annotated[list[State] | None, Query()] = None,
    search: Annotated[str, Query(max_length=200)] = "",
    offset: Annotated[int, Query(ge=0)] = 0,
    limit: Annotated[int, Query(ge=1, le=MOST)] = 50,
    if_none_match: Annotated[str, Header()] = "",
) -> Response:
    """The jobs, a page at a time; `search` is a part of the name or a number. Cheap enough to ask every two seconds."""
    jobs = here.store.jobs()
    wanted = [job for job in jobs if (not state or job.state in state) and _fits(job, search)]
    shown = sorted(wanted, key=_order)[offset : offset + limit]
    listed = JobList(
        jobs=[summary(job) for job in shown],
        total=len(wanted),
        offset=offset,
        counts=dict.fromkeys(ALLOWED, 0) | Counter(job.state for job in jobs),
        devices=_devices(jobs),
        worker=queue.worker_lives(here.store),
    )
    content = listed.model_dump_json().encode()
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    if tag in if_none_match:
        return Response(status_code=304, headers={"ETag": tag})
    return Response(content, media_type="application/json", headers={"ETag": tag})


@router.get("/api/jobs/{job_id:number}")
def one_job(here: Here, job: FoundJob) -> JobDetail:
    """One job."""
    return JobDetail(
        **summary(job).model_dump(),
        source=job.source,
        cwd=str(job.cwd),
        run_folders=[str(folder) for folder in job.run_folders],
        queue_folder=str(here.folder),
        commands=_commands(here.store, job),
    )


def summary(job: Job) -> JobSummary:
    """A job as lists show it. Opens its event file if that has changed since the last time."""
    progress = METER.progress(job)
    return JobSummary(
        id=job.id, name=job.name, device=job.device, state=job.state, position=job.position,
        says=_says(job, progress), cause=job.cause, reason=job.reason, exit_code=job.exit_code, attempts=job.attempts,
        stops=job.stops, created=job.created, started=job.started, ended=job.ended, progress=progress,
    )  # fmt: skip


def _fits(job: Job, search: str) -> bool:
    text = search.strip().casefold()
    return not text or text in job.name.casefold() or text.removeprefix("#") == str(job.id)


def _order(job: Job) -> tuple[int, str, float]:
    if job.state in ENDED:
        return 1, "", -(job.ended or job.created)
    return 0, job.device, float(job.position or 0)


def _devices(jobs: list[Job]) -> list[Device]:
    at_work = {job.device: job.id for job in jobs if job.state in ACTIVE}
    queued = Counter(job.device for job in jobs if job.state == "queued")
    return [Device(name=name, at_work=at_work.get(name), queued=queued[name]) for name in sorted({*at_work, *queued})]


def _says(job: Job, progress: Progress | None) -> str:
    if job.state in ENDED:
        return job.reason
    if job.state == "queued":
        note = f" ({job.reason})" if job.reason else ""
        return f"waits for its turn on {job.device}{note}"
    if job.state == "stopping":
        return ("", "ends its step, saves and stops", "stops at once", "is being killed")[min(job.stops, KILL)]
    if job.state == "starting" or progress is None:
        return "is being started"
    if progress.stage is not None:
        return f"prepares: {progress.stage.name} {progress.stage.done} of {progress.stage.total}"
    return f"trains on {job.device}"


def _commands(store: Store, job: Job) -> dict[str, str]:
    where = "" if store.folder == default_folder().resolve() else f" --folder {shlex.quote(str(store.folder))}"
    asked = shlex.quote(str(job.run_folders[-1] / "requests"))
    file = shlex.quote(str(store.job_file(job.id)))
    return {
        "start": f"detour queue start {job.id}{where}",
        "stop": f"detour queue stop {job.id}{where}",
        "kill": f"detour queue stop {job.id} --kill{where}",
        "save": f"touch {asked}/save",
        "sample": f"touch {asked}/sample",
        "extend": f"detour run {file} --set train.steps=N",
        "list": f"detour queue list{where}",
    }


# --- doing ------------------------------------------------------------------------------------------------------------


@router.post("/api/jobs", status_code=201)
def add_job(here: Here, new: NewJob) -> Acted:
    """Add a job file, at the end of its device's queue or as a draft. Every mistake in it is reported at once.

    A draft is kept with its mistakes; it cannot be started before they are put right.
    """
    queue.settle(here.store)
    cwd = here.folder if new.like is None else here.store.job(new.like).cwd
    if new.queued:
        job = here.store.add(new.text, cwd=cwd)
        return _acted(here.store, job, _waits(here.store, job))
    job = here.store.draft(new.text, cwd=cwd)
    mistakes = ", with its mistakes" if job.is_faulty else ""
    return _acted(here.store, job, f"job {job.id} is kept as a draft{mistakes}")


@router.put("/api/jobs/{job_id:number}")
def edit_job(here: Here, job: FoundJob, new: JobText) -> Acted:
    """Replace the job file of a job that is not at work."""
    queue.settle(here.store)
    edited = here.store.edit(job.id, new.text, draft=new.draft)
    return _acted(here.store, edited, f"job {job.id} has its new job file")


@router.delete("/api/jobs/{job_id:number}")
def delete_job(here: Here, job: FoundJob) -> Forgotten:
    """Forget a job that is not at work, with its logs. What it has trained stays."""
    queue.settle(here.store)
    here.store.delete(job.id)
    if thumbnails(here.store, job.id).is_dir():
        files.remove_directory(thumbnails(here.store, job.id))
    return Forgotten(note=f"job {job.id} is forgotten; what it has trained stays in {job.run_folders[0]}")


@router.post("/api/jobs/{job_id:number}/start")
def start_job(here: Here, job: FoundJob) -> Acted:
    """Queue a job that is not at work. It goes on from its last checkpoint."""
    queue.settle(here.store)
    started = here.store.start(job.id)
    return _acted(here.store, started, _waits(here.store, started))


@router.post("/api/jobs/{job_id:number}/stop")
def stop_job(here: Here, job: FoundJob, how: Stop) -> Acted:
    """Ask a job to save and stop; asked again it stops at once. What is only queued leaves the queue."""
    queue.settle(here.store)
    stopped = queue.stop(here.store, job.id, kill=how.kill)
    if stopped.state == "stopped":
        note = f"job {job.id} is stopped: it had not begun"
    elif stopped.stops == 1:
        note = f"job {job.id} ends its step, saves and stops; asked once more it stops at once"
    else:
        note = f"job {job.id} {_says(stopped, None)}; what was saved before is intact"
    return _acted(here.store, stopped, note)


@router.post("/api/jobs/{job_id:number}/clone", status_code=201)
def clone_job(here: Here, job: FoundJob) -> Acted:
    """A copy as a draft. It writes to the same folder until its `output_name` is edited."""
    copy = here.store.clone(job.id)
    return _acted(here.store, copy, f"job {copy.id} is a copy of job {job.id}; give it another name before it starts")


@router.post("/api/jobs/{job_id:number}/move")
def move_job(here: Here, job: FoundJob, to: Move) -> Acted:
    """Give a queued job another place in its queue."""
    moved = here.store.move(job.id, to.place)
    return _acted(here.store, moved, f"job {job.id} has place {moved.position} on {moved.device}")


@router.post("/api/jobs/{job_id:number}/save")
def save_now(here: Here, job: FoundJob) -> Acted:
    """Save after the step that is under way."""
    return _requested(here.store, job, "save")


@router.post("/api/jobs/{job_id:number}/sample")
def sample_now(here: Here, job: FoundJob) -> Acted:
    """Draw the previews after the step that is under way."""
    return _requested(here.store, job, "sample")


@router.post("/api/jobs/{job_id:number}/extend")
def extend_job(here: Here, job: FoundJob, further: Extend) -> Acted:
    """Raise `train.steps` in the job file of a job that is not at work, comments kept, and start it again."""
    queue.settle(here.store)
    text, total = extended(here.store.text(job.id), further.steps)
    changed = here.store.edit(job.id, text)
    if changed.state in ENDED:
        changed = here.store.start(job.id)
    return _acted(here.store, changed, f"to {total} steps: {_waits(here.store, changed)}")


@router.post("/api/queue/serve")
def serve_queue(here: Here) -> dict[str, Any]:
    """See that somebody works at the queue."""
    queue.settle(here.store)
    queue.ensure_worker(here.store)
    return {"worker": queue.worker_lives(here.store)}


def _acted(store: Store, job: Job, note: str) -> Acted:
    return Acted(job=summary(store.job(job.id)), note=note)


def _requested(store: Store, job: Job, what: Literal["save", "sample"]) -> Acted:
    queue.request(store, job.id, what)
    words = {"save": "saves", "sample": "draws its previews"}
    return _acted(store, job, f"job {job.id} {words[what]} after the step that it is in")


def _waits(store: Store, job: Job) -> str:
    """That it waits, and that somebody serves it: the job is queued whether or not a worker comes up."""
    said = f"job {job.id} is queued on {job.device}, place {job.position}"
    try:
        queue.ensure_worker(store)
    except UserError as error:
        return f"{said}; {error}"
    return said
