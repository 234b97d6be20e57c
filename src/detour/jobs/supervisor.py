"""The process beside a run: starts it, waits for it, and writes down how it ended, whatever becomes of everyone else.

`python -m detour.jobs.supervisor FOLDER ID TOKEN -- COMMAND...` is started by the worker and depends on it no more.
The run is forked behind a gate: it begins only once its number and birth are in the store. A supervisor that is
killed before takes the gate with it, and so at no moment is there a run that nobody knows of.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from detour import UserError, files
from detour.jobs import outcome, processes, queue
from detour.jobs.database import FolderGoneError
from detour.jobs.store import Store

if TYPE_CHECKING:
    from collections.abc import Sequence

    from detour.jobs.processes import Scope
    from detour.jobs.store import Job

LOOK = 0.1  # seconds between two looks at the run
AGAIN = 1.0  # seconds between two attempts at writing down the end
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def supervise(store: Store, job_id: int, token: str, command: Sequence[str]) -> int:
    """Run an attempt at a job to its end. 0 unless it could not even begin."""
    job = store.job(job_id)
    if job.token != token:
        return 0  # taken back while this process was coming up
    files.write_bytes(store.job_file(job_id), store.text(job_id))
    processes.beat(store.heartbeat(job_id))
    for number in _ENDING:  # the run inherits these, also where whoever started us had them ignored
        signal.signal(number, signal.SIG_DFL)
    _hand_over_token(store)
    pid, gate = _fork_behind_gate([*command, str(store.job_file(job_id))], job.cwd)
    for number in _ENDING:  # from here on this process ends with its run
        signal.signal(number, signal.SIG_IGN)
    try:
        begun = store.begin(job, processes.this_process(), processes.identify(pid), processes.oom_kills())
        if begun:
            with contextlib.suppress(BrokenPipeError):  # killed before it began; `_wait` will say by what
                os.write(gate, b"go")
    finally:
        os.close(gate)
    status, oom = _wait(store, job_id, pid)
    return _write_down(store, job, status, oom) if begun else 0


def _hand_over_token(store: Store) -> None:
    """Tell the run where the hub's token lies, if the queue has one: it counts more than the environment's.

    By its place, which `huggingface_hub` reads, and not by itself: environments are printed into logs.
    """
    if store.hub_token.is_file():
        os.environ["HF_TOKEN_PATH"] = str(store.hub_token)
        os.environ.pop("HF_TOKEN", None)
        os.environ.pop("HUGGING_FACE_HUB_TOKEN", None)


def _fork_behind_gate(command: list[str], cwd: Path) -> tuple[int, int]:
    """The child's number, and the pipe that lets it begin once something is written into it."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(writer)
        _become(command, cwd, reader)
    os.close(reader)
    return pid, writer


def _become(command: list[str], cwd: Path, gate: int) -> None:
    """In the child: wait for leave, then be the run. Never returns."""
    try:
        os.setsid()  # Ctrl-C in somebody's terminal is not meant for it
        if os.read(gate, 2):
            os.chdir(cwd)
            os.execv(command[0], command)  # noqa: S606
    except OSError as error:
        where = f"{cwd}, from which the job was queued" if error.filename == str(cwd) else command[0]
        os.write(2, f"error: {where}: {error.strerror}\n".encode(errors="replace"))
    finally:
        os._exit(UserError.exit_code)


def _wait(store: Store, job_id: int, pid: int) -> tuple[int, Scope | None]:
    """Wait for the run, with a heartbeat. Its exit code or minus its signal, and where the kernel killed just then."""
    counts = [processes.oom_kills()] * 2  # at the last two heartbeats: what was killed hours ago is no evidence
    beaten = time.monotonic()
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), processes.oom_kills().since(counts[0])
        if time.monotonic() - beaten >= processes.BEAT:
            processes.beat(store.heartbeat(job_id))
            counts = [counts[1], processes.oom_kills()]
            beaten = time.monotonic()
        time.sleep(LOOK)


def _write_down(store: Store, job: Job, status: int, oom: Scope | None) -> int:
    """Conclude the attempt, however long it takes: the disk may be full now and have space tomorrow."""
    said = ""
    while True:
        verdict = outcome.judge(outcome.gather(job, store.log_file(job), status, oom))
        try:
            now = store.job(job.id)  # it may have been asked to stop
            store.conclude(job, outcome.judge(outcome.gather(now, store.log_file(job), status, oom)))
        except FolderGoneError as error:
            _say(f"{error}. The job ended: {verdict.reason}")
            return 1
        except UserError as error:
            if str(error) != said:
                _say(f"its end cannot be written down yet: {error}")
                said = str(error)
            processes.beat(store.heartbeat(job.id))
            time.sleep(AGAIN)
        else:
            return 0


def _say(text: str) -> None:
    """Into the job's log, if that can be written: on a full disk it cannot."""
    with contextlib.suppress(OSError):
        os.write(2, f"supervisor: {text}\n".encode(errors="replace"))


def main(arguments: Sequence[str]) -> int:
    """`FOLDER ID TOKEN -- COMMAND...`."""
    folder, job_id, token, _, *command = arguments
    try:
        store = Store(Path(folder))
        code = supervise(store, int(job_id), token, command)
        if store.waiting_devices():  # the worker may have been killed meanwhile: the queue goes on
            queue.ensure_worker(store, wait=False, options=("--", *command))
    except UserError as error:
        _say(str(error))
        return error.exit_code
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
