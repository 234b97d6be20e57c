"""`detour queue`: the job queue without the UI. Each command returns what is to be printed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detour import UserError
from detour.files import DiskFullError
from detour.jobs import queue
from detour.jobs.database import NAME
from detour.jobs.store import Store, default_folder

if TYPE_CHECKING:
    from detour.config.load import Loaded
    from detour.jobs.store import Job


def add(loaded: Loaded, folder: Path | None) -> list[str]:
    """Queue a job file that has been read, and see that somebody works at it."""
    store = Store(folder or default_folder(), create=True)
    queue.settle(store)
    job = store.add(loaded.text, cwd=Path.cwd(), source=str(loaded.path.resolve()))
    queue.ensure_worker(store)
    return [f"job {job.id} ({job.name}) is queued on {job.device}, place {job.position}", _hint(store)]


def listing(folder: Path | None) -> dict[str, Any]:
    """The queue as one JSON object, with states that are true now."""
    place = (folder or default_folder()).resolve()
    if not (place / NAME).exists():
        return {"folder": str(place), "worker": False, "note": "there is no queue yet", "jobs": []}
    store, note = Store(place), None
    try:
        queue.settle(store)
    except DiskFullError as error:  # what the store says can still be read
        note = f"states may be out of date: {error}"
    worker = queue.worker_lives(store)
    return {"folder": str(place), "worker": worker, "note": note, "jobs": [_as_json(store, j) for j in store.jobs()]}


def table(found: dict[str, Any]) -> list[str]:
    """`listing` for people."""
    lines = [f"{'id':>4}  {'state':<9} {'device':<7} {'place':>5}  {'step':>7}  name"] if found["jobs"] else ["no jobs"]
    for job in found["jobs"]:
        place, step = (("" if job[key] is None else job[key]) for key in ("position", "step"))
        lines.append(f"{job['id']:>4}  {job['state']:<9} {job['device']:<7} {place:>5}  {step:>7}  {job['name']}")
        if job["reason"]:
            lines += [f"      {line}" for line in job["reason"].splitlines()]
    if found["note"]:
        lines.append(found["note"])
    if not found["worker"] and any(job["state"] == "queued" for job in found["jobs"]):
        lines.append("nobody works at the queue; `detour queue start` sees to that")
    return lines


def stop(job_id: int, *, kill: bool, folder: Path | None) -> list[str]:
    """Ask a job to stop."""
    store = Store(folder or default_folder())
    queue.settle(store)
    job = queue.stop(store, job_id, kill=kill)
    if job.state == "stopped":
        return [f"job {job_id} is stopped: it had not begun"]
    if kill:
        return [f"job {job_id} is being killed; what was saved before is intact"]
    if job.stops == 1:
        return [f"job {job_id} ends its step, saves and stops; asked once more it stops at once"]
    return [f"job {job_id} stops at once; what was saved before is intact"]


def start(job_id: int | None, folder: Path | None) -> list[str]:
    """Queue a job again, or only see that the queue is worked at."""
    store = Store(folder or default_folder())
    queue.settle(store)
    lines = []
    if job_id is not None:
        job = store.start(job_id)
        lines.append(f"job {job.id} ({job.name}) is queued on {job.device}, place {job.position}")
    elif not store.has_work():
        raise UserError(f"no job waits in {store.folder}; `detour queue add JOB.yaml` adds one")
    queue.ensure_worker(store)
    return [*lines, _hint(store)]


def _as_json(store: Store, job: Job) -> dict[str, Any]:
    until = job.ended or time.time()
    return {
        "id": job.id,
        "name": job.name,
        "state": job.state,
        "device": job.device,
        "position": job.position,
        "step": queue.last_step(job),
        "cause": job.cause,
        "reason": job.reason,
        "exit_code": job.exit_code,
        "attempts": job.attempts,
        "created": job.created,
        "started": job.started,
        "ended": job.ended,
        "seconds": until - job.started if job.started is not None and job.state != "queued" else None,
        "source": job.source,
        "run_folders": [str(path) for path in job.run_folders],
        "log": str(store.log_file(job)) if job.attempts else None,
    }


def _hint(store: Store) -> str:
    where = "" if store.folder == default_folder().resolve() else f" --folder {store.folder}"
    return f"it goes on when this window is closed; `detour queue list{where}` shows how far it is"
