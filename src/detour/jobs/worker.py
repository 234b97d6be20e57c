"""The process that serves a queue: starts the next job of each device, and keeps the states true. One for a folder.

`python -m detour.jobs.worker FOLDER [--idle SECONDS] [-- COMMAND...]` is started by whoever queues a job
(`queue.ensure_worker`), leaves when there has been nothing to do for a while, and owns nothing: the jobs belong to
their supervisors, and the next worker finds everything in the store.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from detour import UserError, files
from detour.jobs import outcome, processes, queue
from detour.jobs.database import FolderGoneError
from detour.jobs.store import Store

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType

    from detour.jobs.store import Job

LOOK = 0.25  # seconds between two looks at the queue
IDLE = 60.0  # seconds without anything to do after which a worker leaves
HANDOVER = 10.0  # seconds that a new worker gives one that is leaving

_log = logging.getLogger("detour.jobs.worker")


class Worker:
    """Starts jobs. Whoever makes one holds the folder's lock (`serve`)."""

    def __init__(self, store: Store, command: Sequence[str] = queue.RUN) -> None:
        """`command` gets a frozen job file as its last argument."""
        self.me = processes.this_process()
        self._store = store
        self._command = list(command)
        self._started: list[tuple[Job, subprocess.Popen[bytes]]] = []
        self._lost: list[tuple[Job, str]] = []  # attempts that could not begin, with the reason

    def tick(self) -> None:
        """Look at everything once, and start what can be started."""
        processes.beat(self._store.worker_heartbeat)
        self._bury()
        queue.settle(self._store)
        for device in self._store.waiting_devices():
            job = self._store.claim(device, self.me)
            if job is not None:
                self._start(job)

    def _start(self, job: Job) -> None:
        _log.info("job %d (%s) starts on %s, attempt %d", job.id, job.name, job.device, job.attempts)
        command = [sys.executable, "-P", "-m", "detour.jobs.supervisor", str(self._store.folder), str(job.id)]
        command += [str(job.token), "--", *self._command]
        try:
            files.make_folder(self._store.job_folder(job.id))
            with self._store.log_file(job).open("ab") as log:
                supervisor = subprocess.Popen(  # noqa: S603
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd=self._store.folder,
                    start_new_session=True,
                )
        except (OSError, UserError) as error:
            self._lost.append((job, f"could not be started: {error}"))
        else:
            self._started.append((job, supervisor))

    def _bury(self) -> None:
        """Look at supervisors that have ended; those that never began their job leave that to be said here."""
        ended = [(job, process) for job, process in self._started if process.poll() is not None]
        self._started = [(job, process) for job, process in self._started if process.returncode is None]
        for job, process in ended:
            said = outcome.tail(self._store.log_file(job)).strip()[-outcome.SHOWN :]
            self._lost.append((job, said or f"its supervisor ended ({process.returncode}) before it could begin"))
        while self._lost:
            job, reason = self._lost[0]
            if self._store.give_up(job, reason):  # raises while the disk is full, and is tried again
                _log.info("job %d could not begin: %s", job.id, reason)
            self._lost.pop(0)


class _Leave:
    """Set by SIGTERM and SIGINT: the worker ends, its jobs go on."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self.asked = True


def serve(store: Store, command: Sequence[str] = queue.RUN, idle: float = IDLE) -> int:
    """Serve the queue until it has been idle for a while. Returns at once, with 0, if another worker does."""
    lock = FileLock(store.folder / "worker.lock")
    deadline = time.monotonic() + HANDOVER
    while True:
        try:
            lock.acquire(timeout=0.1)
            break
        except Timeout:
            if queue.worker_lives(store) or time.monotonic() > deadline:
                return 0
    leave = _Leave()
    worker = Worker(store, command)
    store.enlist(worker.me)
    try:
        return _work(store, worker, leave, idle)
    finally:
        lock.release()


def _work(store: Store, worker: Worker, leave: _Leave, idle: float) -> int:
    said, busy = "", time.monotonic()
    while True:
        try:
            worker.tick()
            if store.has_work():
                busy = time.monotonic()
            left = time.monotonic() - busy > idle and store.retire(worker.me)
            if left or (leave.asked and store.retire(worker.me, idle_only=False)):
                return 0
            said = ""
        except FolderGoneError as error:
            _log.error("%s", error)
            return 1
        except UserError as error:  # a full disk, a lock: said once, tried again
            if str(error) != said:
                _log.error("%s", error)
                said = str(error)
            if leave.asked:
                return 1
        time.sleep(LOOK)


def main(arguments: Sequence[str]) -> int:
    """The process's beginning and end."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(message)s")
    parser = argparse.ArgumentParser(prog="python -m detour.jobs.worker", description="Serves a job queue.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--idle", type=float, default=IDLE, metavar="SECONDS", help="leave after so long without work")
    own, command = _split(arguments)
    options = parser.parse_args(own)
    if os.name == "nt":
        raise SystemExit("the job queue needs Linux or macOS; on Windows start jobs with `detour run JOB.yaml`")
    try:
        return serve(Store(options.folder), command or queue.RUN, options.idle)
    except UserError as error:
        _log.error("%s", error)
        return error.exit_code


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """What stands before and after `--`."""
    if "--" not in arguments:
        return list(arguments), []
    at = list(arguments).index("--")
    return list(arguments[:at]), list(arguments[at + 1 :])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
