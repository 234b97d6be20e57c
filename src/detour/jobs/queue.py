"""What the command line and the web UI do with a queue: ask jobs to stop, save or sample; see that it is served.

`settle` compares what the store says with what lives and puts it right. Everyone who looks may call it, at any time.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Literal

from detour import UserError, steering
from detour.jobs import outcome, processes
from detour.jobs.states import ACTIVE, StateError
from detour.jobs.store import KILL

if TYPE_CHECKING:
    from collections.abc import Sequence

    from detour.jobs.store import Job, Store

RUN = (sys.executable, "-P", "-m", "detour", "run")
"""What runs a job; the job file is added. `-P`: nothing is imported from the folder it runs in."""
PATIENCE = 20.0  # seconds for a worker to come up on a busy machine
LOG = "worker.log"

_workers: list[subprocess.Popen[bytes]] = []  # those that this process has started, so that it can bury them


def settle(store: Store) -> None:
    """Bring the states of all jobs in line with what lives. Safe to call from many processes at once."""
    for job in store.jobs(ACTIVE):
        if job.state == "starting":
            if job.worker is not None and not processes.alive(job.worker, store.worker_heartbeat):
                store.hand_back(job)
        elif _lives(store, job):
            if job.state == "stopping":
                with contextlib.suppress(UserError, OSError):  # again: one that came during preparation was not seen
                    _ask_to_stop(job)
        else:
            _conclude_unattended(store, job)


def stop(store: Store, job_id: int, *, kill: bool = False) -> Job:
    """Ask a job to save and stop; asked again it stops at once, as with Ctrl-C. `kill` ends it whatever it is doing.

    Returns the job as it is now: `stopping`, or `stopped` if it had not begun.
    """
    job = store.ask_stop(job_id, kill=kill)
    if job.state == "stopping" and job.process is not None:
        sent = processes.send(job.process, signal.SIGKILL if job.stops >= KILL else signal.SIGINT)
        try:
            _ask_to_stop(job)
        except (UserError, OSError):
            if not sent:
                raise
    return job


def request(store: Store, job_id: int, what: Literal["save", "sample"]) -> Job:
    """Ask a running job to save or to draw its previews after the step that it is in."""
    job = store.job(job_id)
    if job.state != "running":
        raise StateError(f"job {job_id} is {job.state}: only a running job can {what}")
    folder = outcome.training_in(job)
    if folder is None:  # a request would be taken for one to an earlier session, and dropped
        raise StateError(f"job {job_id} is still being prepared: there is nothing to {what} yet")
    steering.request(folder, what)
    return job


def worker_lives(store: Store) -> bool:
    """Whether somebody serves the queue."""
    worker = store.worker()
    return worker is not None and processes.alive(worker, store.worker_heartbeat)


def ensure_worker(store: Store, *, wait: bool = True, options: Sequence[str] = ()) -> None:
    """See that a worker serves the queue: one process for a folder, which lives on when this one ends.

    UserError with the end of its log if it does not come up. `options` are those of `detour.jobs.worker`.
    """
    _workers[:] = [worker for worker in _workers if worker.poll() is None]
    if worker_lives(store):
        return
    worker = _start_worker(store, options)
    deadline = time.monotonic() + PATIENCE
    while wait and not worker_lives(store):
        ended = worker.poll()
        if ended == 0 and not store.has_work():
            return  # it came, did everything and left
        if ended == 0 and time.monotonic() < deadline:  # it found another at work, which has left since
            worker = _start_worker(store, options)
        elif ended is not None or time.monotonic() > deadline:
            said = "\n".join(outcome.tail(store.folder / LOG).splitlines()[-5:])
            raise UserError(f"the queue's worker did not come up; {store.folder / LOG} ends with:\n{said}")
        time.sleep(0.02)


def _start_worker(store: Store, options: Sequence[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-P", "-m", "detour.jobs.worker", str(store.folder), *options]
    with (store.folder / LOG).open("ab") as log:
        worker = subprocess.Popen(  # noqa: S603
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=store.folder, start_new_session=True
        )
    _workers.append(worker)
    return worker


def last_step(job: Job) -> int | None:
    """The last step that the events of a job tell of, whichever attempt it was."""
    for folder in reversed(job.run_folders):
        with contextlib.suppress(OSError):
            steps = outcome.STEP.findall(outcome.tail(folder / "events.jsonl"))
            if steps:
                return int(steps[-1])
    return None


def _lives(store: Store, job: Job) -> bool:
    heartbeat = store.heartbeat(job.id)
    known = [process for process in (job.supervisor, job.process) if process is not None]
    return any(processes.alive(process, heartbeat) for process in known)


def _conclude_unattended(store: Store, job: Job) -> None:
    """Run and supervisor are gone, and the supervisor could not say how it ended."""
    assert job.process is not None
    restarted = processes.is_of_an_earlier_boot(job.process)
    before = job.oom if not restarted else None
    oom = processes.oom_kills().since(before) if before is not None else None
    found = outcome.gather(job, store.log_file(job), None, oom, restarted=restarted)
    store.conclude(job, outcome.judge(found))


def _ask_to_stop(job: Job) -> None:
    """Put the request where any of the job's processes looks; one that has no folder yet hears the signal."""
    for folder in job.run_folders:
        if folder.is_dir():
            steering.request(folder, "stop")
