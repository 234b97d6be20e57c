"""Jobs on disk: what there is, what state it is in, in which order it comes. Nothing here starts or ends a process.

Every function that changes a job is one transaction. What a supervisor or a worker reports carries the token of the
attempt it speaks of, so that a late report about an earlier attempt changes nothing.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detour import UserError, files
from detour.jobs.database import Database
from detour.jobs.frozen import Frozen, freeze, freeze_draft
from detour.jobs.processes import OomKills, Process
from detour.jobs.states import ACTIVE, ALLOWED, ENDED, Cause, State, StateError, UnknownJobError, Verdict, end_state

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Sequence


SAVE, NOW, KILL = 1, 2, 3
"""How urgently a job was asked to stop."""


def default_folder() -> Path:
    """`$DETOUR_FOLDER`, else `~/.local/share/detour`."""
    chosen = os.environ.get("DETOUR_FOLDER")
    return Path(chosen).expanduser() if chosen else Path.home() / ".local" / "share" / "detour"


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job as it stands in the store; its text is asked for by `Store.text`. Times are Unix seconds."""

    id: int
    name: str
    """`output_name` of the job file."""
    device: str
    """The queue it belongs to."""
    state: State
    position: int | None = None
    """Place among the queued jobs of its device, from 1."""
    cause: Cause | None = None
    """Why it ended, for programs."""
    reason: str = ""
    """Why it ended, or why it is where it is, for people."""
    exit_code: int | None = None
    """Of the last run; minus the signal that killed it."""
    source: str | None = None
    """The file it was read from."""
    cwd: Path
    """Where relative paths count from."""
    run_folders: tuple[Path, ...]
    """Where its processes leave their files, in order."""
    attempts: int = 0
    """How often it was started."""
    token: str | None = None
    """Names the attempt under way."""
    stops: int = 0
    """How urgently this attempt was asked to stop: 0, `SAVE`, `NOW`, `KILL`."""
    worker: Process | None = None
    """Who took it from the queue."""
    supervisor: Process | None = None
    process: Process | None = None
    """The run."""
    oom: OomKills | None = None
    """The kernel's counts when the run began."""
    created: float
    started: float | None = None
    """Beginning of the last attempt."""
    ended: float | None = None

    @property
    def is_draft(self) -> bool:
        """It was never started."""
        return self.state == "stopped" and self.attempts == 0

    @property
    def is_faulty(self) -> bool:
        """A draft whose job file has mistakes."""
        return self.is_draft and self.cause == "bad_input"


class Store:
    """The queue in a folder. May be shared by threads, and opened by any number of processes."""

    def __init__(self, folder: Path, *, create: bool = False) -> None:
        """Open a queue, or make one. UserError says what is in the way."""
        self.folder = folder.resolve()
        self._database = Database(self.folder, create=create)

    def close(self) -> None:
        """Close the connection."""
        self._database.close()

    # --- places -----------------------------------------------------------------------------------------------------

    def job_folder(self, job_id: int) -> Path:
        """Job file, logs and heartbeat of a job. What it trains lies in its `run_folders`."""
        return self.folder / "jobs" / str(job_id)

    def job_file(self, job_id: int) -> Path:
        """The frozen job file that `detour run` gets. Written anew at each start; `edit` changes the job."""
        return self.job_folder(job_id) / "job.yaml"

    def log_file(self, job: Job) -> Path:
        """What the last attempt printed. Not there before the first."""
        return self.job_folder(job.id) / f"log-{job.attempts}.txt"

    def heartbeat(self, job_id: int) -> Path:
        """Touched by the job's supervisor every second."""
        return self.job_folder(job_id) / "heartbeat"

    @property
    def hub_token(self) -> Path:
        """The hub's token for all jobs of this queue, if the UI was given one. Readable by its owner only."""
        return self.folder / "hub.token"

    @property
    def worker_heartbeat(self) -> Path:
        """Touched by the worker several times a second."""
        return self.folder / "worker.heartbeat"

    # --- reading ----------------------------------------------------------------------------------------------------

    def jobs(self, states: Sequence[State] = ()) -> list[Job]:
        """All jobs, or those in some states, in the order in which they were made."""
        wanted = tuple(states) or tuple(ALLOWED)
        rows = self._database.read(
            "SELECT * FROM job WHERE state IN (?, ?, ?, ?, ?, ?, ?) ORDER BY id",
            wanted + wanted[:1] * (len(ALLOWED) - len(wanted)),
        )
        return [_job(row) for row in rows]

    def job(self, job_id: int) -> Job:
        """One job. UnknownJobError if there is none of that number."""
        return _job(_one(self._database.read("SELECT * FROM job WHERE id = ?", (job_id,)), job_id))

    def text(self, job_id: int) -> str:
        """The job file as it was written."""
        return str(_one(self._database.read("SELECT text FROM document WHERE id = ?", (job_id,)), job_id)["text"])

    # --- what people do ---------------------------------------------------------------------------------------------

    def add(self, text: str, *, cwd: Path, source: str | None = None, queued: bool = True) -> Job:
        """Add a job at the end of its device's queue, or as a draft (`queued=False`: stopped, to be started later).

        JobError with every mistake of the text; UserError if a waiting or running job writes to the same folder.
        """
        frozen = freeze(text, cwd, source or "job.yaml")
        with self._database.transaction() as db:
            added = _insert(db, _new(frozen, cwd, source), text)
            return _enqueue(db, added) if queued else added

    def draft(self, text: str, *, cwd: Path) -> Job:
        """Add a draft, mistakes and all: it cannot be started before they are put right."""
        frozen = freeze_draft(text, cwd, "job.yaml", self.folder)
        with self._database.transaction() as db:
            return _insert(db, _new(frozen, cwd, None), text)

    def edit(self, job_id: int, text: str, *, draft: bool = False) -> Job:
        """Replace the job file of a job that is not at work. On another device it goes to the end of the queue.
        With `draft`, of one that was never started, mistakes and all."""
        before = self.job(job_id)
        name = before.source or "job.yaml"
        if draft and before.is_draft:
            frozen = freeze_draft(text, before.cwd, name, self.folder)
        else:
            frozen = freeze(text, before.cwd, name)
        with self._database.transaction() as db:
            job = _get(db, job_id)
            if frozen.faulty and not job.is_draft:
                raise StateError(f"job {job_id} is {job.state} by now: its job file has to be right")
            if job.state in ACTIVE:
                raise StateError(f"job {job_id} is {job.state}: its job file can be changed once it has ended")
            if job.state == "queued":
                _check_free(db, job_id, frozen.run_folders)
            edited = replace(job, name=frozen.name, device=frozen.device, run_folders=frozen.run_folders)
            if job.is_draft:
                edited = replace(edited, **_beginning(frozen))
            if job.position is not None and edited.device != job.device:
                edited = replace(edited, position=_length(db, edited.device) + 1)
            db.execute("UPDATE document SET text = ? WHERE id = ?", (text, job_id))
            _write(db, job, edited)
            _close_gaps(db, job.device)
            return _get(db, job_id)

    def clone(self, job_id: int) -> Job:
        """A copy as a draft. It writes to the same folder until its `output_name` is edited."""
        with self._database.transaction() as db:
            job = _get(db, job_id)
            text = db.execute("SELECT text FROM document WHERE id = ?", (job_id,)).fetchone()["text"]
            new = Job(
                id=0, name=job.name, device=job.device, state="stopped", source=job.source, cwd=job.cwd,
                cause="bad_input" if job.is_faulty else "not_started", run_folders=job.run_folders,
                reason=f"a copy of job {job_id}, not started yet", created=time.time(),
            )  # fmt: skip
            return _insert(db, new, str(text))

    def delete(self, job_id: int) -> None:
        """Forget a job that is not at work, with its logs. What it has trained stays."""
        with self._database.transaction() as db:
            job = _get(db, job_id)
            if job.state in ACTIVE:
                raise StateError(f"job {job_id} is {job.state}: stop it before you delete it")
            db.execute("DELETE FROM job WHERE id = ?", (job_id,))
            _close_gaps(db, job.device)
        if self.job_folder(job_id).is_dir():
            files.remove_directory(self.job_folder(job_id))

    def move(self, job_id: int, place: int) -> Job:
        """Put a queued job at a place of its queue: 1 comes next, a large number last."""
        with self._database.transaction() as db:
            job = _get(db, job_id)
            if job.state != "queued":
                raise StateError(f"job {job_id} is {job.state}: only queued jobs have a place in the queue")
            others = [other for other in _queue(db, job.device) if other != job_id]
            at = min(max(place, 1), len(others) + 1) - 1
            _renumber(db, job.device, [*others[:at], job_id, *others[at:]])
            return _get(db, job_id)

    def start(self, job_id: int) -> Job:
        """Queue a job that is not at work, at the end. It goes on from its last checkpoint.

        JobError with every mistake of a draft that was kept with them.
        """
        if self.job(job_id).is_faulty:
            self.edit(job_id, self.text(job_id))
        with self._database.transaction() as db:
            job = _get(db, job_id)
            if job.state not in ENDED:
                raise StateError(f"job {job_id} is {job.state} already")
            return _enqueue(db, job)

    def ask_stop(self, job_id: int, *, kill: bool = False) -> Job:
        """Note that a job is to stop; `queue.stop` tells its process. What has not begun is stopped at once."""
        with self._database.transaction() as db:
            job = _get(db, job_id)
            if job.state in ENDED:
                raise StateError(f"job {job_id} is not running: it is {job.state}")
            if job.state in ("queued", "starting"):
                return _end(db, job, Verdict("not_started", "stopped before it began"))
            stops = KILL if kill else min(job.stops + 1, NOW) if job.stops < KILL else KILL
            if job.state == "running":
                return _change(db, job, "stopping", stops=stops)
            return _write(db, job, replace(job, stops=stops))

    # --- what the worker and the supervisors report -------------------------------------------------------------------

    def waiting_devices(self) -> list[str]:
        """Devices with queued jobs and none at work."""
        rows = self._database.read(
            "SELECT DISTINCT device FROM job WHERE state = 'queued' AND device NOT IN "
            "(SELECT device FROM job WHERE state IN ('starting', 'running', 'stopping')) ORDER BY device"
        )
        return [str(row["device"]) for row in rows]

    def claim(self, device: str, worker: Process) -> Job | None:
        """Take the next job of a device; None if there is none or one is at work. Of several claimants one gets it."""
        with self._database.transaction() as db:
            busy = db.execute(
                "SELECT 1 FROM job WHERE device = ? AND state IN ('starting', 'running', 'stopping')", (device,)
            ).fetchone()
            waiting = _queue(db, device)
            if busy or not waiting:
                return None
            job = _get(db, waiting[0])
            return _change(
                db, job, "starting", position=None, token=secrets.token_hex(8), attempts=job.attempts + 1,
                worker=worker, stops=0, cause=None, reason="", exit_code=None, started=time.time(), ended=None,
            )  # fmt: skip

    def begin(self, job: Job, supervisor: Process, process: Process, oom: OomKills) -> bool:
        """The run of an attempt exists and waits for leave to begin; False says that it must not."""
        with self._database.transaction() as db:
            now = _attempt(db, job)
            if now is None or now.state != "starting":
                return False
            _change(db, now, "running", supervisor=supervisor, process=process, oom=oom, started=time.time())
            return True

    def hand_back(self, job: Job) -> bool:
        """Put a job at the head of its queue again: its worker died before it began. False if it has begun."""
        with self._database.transaction() as db:
            now = _attempt(db, job)
            if now is None or now.state != "starting":
                return False
            queue = _queue(db, now.device)
            reason = "queued again: its worker ended before it could begin"
            _change(db, now, "queued", token=None, worker=None, reason=reason, position=len(queue) + 1)
            _renumber(db, now.device, [now.id, *queue])
            return True

    def conclude(self, job: Job, verdict: Verdict) -> bool:
        """An attempt has ended; False if that is known already."""
        with self._database.transaction() as db:
            now = _attempt(db, job)
            if now is None:
                return False
            _end(db, now, verdict)
            return True

    def give_up(self, job: Job, reason: str) -> bool:
        """An attempt could not begin; False if it has begun."""
        with self._database.transaction() as db:
            now = _attempt(db, job)
            if now is None or now.state != "starting":
                return False
            _end(db, now, Verdict("failed", reason))
            return True

    # --- the worker ---------------------------------------------------------------------------------------------------

    def worker(self) -> Process | None:
        """Who serves the queue, or did and was killed."""
        rows = self._database.read("SELECT process FROM worker")
        return Process.from_json(rows[0]["process"]) if rows else None

    def enlist(self, worker: Process) -> None:
        """Note who serves the queue. Its lock says that it is the only one."""
        with self._database.transaction() as db:
            db.execute("INSERT OR REPLACE INTO worker (only, process) VALUES (1, ?)", (worker.to_json(),))

    def has_work(self) -> bool:
        """Whether any job is waiting or at work."""
        return bool(self.jobs(("queued", *ACTIVE)))

    def retire(self, worker: Process, *, idle_only: bool = True) -> bool:
        """The worker leaves; with `idle_only`, not as long as there is anything to do.

        In one transaction, so that whoever adds a job either is seen here or sees that nobody serves any more.
        """
        with self._database.transaction() as db:
            busy = db.execute(
                "SELECT 1 FROM job WHERE state IN ('queued', 'starting', 'running', 'stopping')"
            ).fetchone()
            if busy and idle_only:
                return False
            db.execute("DELETE FROM worker WHERE process = ?", (worker.to_json(),))
            return True

    def check_there(self) -> None:
        """FolderGoneError if the folder has been taken away."""
        self._database.check_there()


# --- inside a transaction ---------------------------------------------------------------------------------------------


def _one(rows: list[sqlite3.Row], job_id: int) -> sqlite3.Row:
    if not rows:
        raise UnknownJobError(f"there is no job {job_id}; `detour queue list` shows what there is")
    return rows[0]


def _get(db: sqlite3.Connection, job_id: int) -> Job:
    return _job(_one(db.execute("SELECT * FROM job WHERE id = ?", (job_id,)).fetchall(), job_id))


def _attempt(db: sqlite3.Connection, job: Job) -> Job | None:
    """The job now, if the attempt that `job` speaks of is still the one under way."""
    rows = db.execute("SELECT * FROM job WHERE id = ? AND token = ?", (job.id, job.token)).fetchall()
    return _job(rows[0]) if rows else None


def _change(db: sqlite3.Connection, job: Job, state: State, **values: Any) -> Job:  # noqa: ANN401
    """Bring a job into another state: the only place that does. The table of changes in the file says so too."""
    assert state in ALLOWED[job.state], f"{job.state} -> {state}"
    changed = _write(db, job, replace(job, state=state, **values))
    if job.position is not None and changed.position is None:
        _close_gaps(db, job.device)
    return changed


def _write(db: sqlite3.Connection, old: Job, new: Job) -> Job:
    """Write a job over what it was, if that is still what stands there."""
    written = db.execute(
        "UPDATE job SET name = :name, device = :device, state = :state, position = :position, cause = :cause, "
        "reason = :reason, exit_code = :exit_code, run_folders = :run_folders, attempts = :attempts, token = :token, "
        "stops = :stops, worker = :worker, supervisor = :supervisor, process = :process, oom = :oom, "
        "started = :started, ended = :ended WHERE id = :id AND state = :old_state AND token IS :old_token",
        _values(new) | {"old_state": old.state, "old_token": old.token},
    )
    assert written.rowcount == 1, f"job {old.id} is not {old.state} any more"
    return new


def _insert(db: sqlite3.Connection, job: Job, text: str) -> Job:
    added = db.execute(
        "INSERT INTO job (name, device, state, cause, reason, source, cwd, run_folders, attempts, stops, created) "
        "VALUES (:name, :device, :state, :cause, :reason, :source, :cwd, :run_folders, :attempts, :stops, :created)",
        _values(job),
    )
    assert added.lastrowid is not None
    db.execute("INSERT INTO document (id, text) VALUES (?, ?)", (added.lastrowid, text))
    return replace(job, id=added.lastrowid)


def _new(frozen: Frozen, cwd: Path, source: str | None) -> Job:
    return Job(
        id=0, name=frozen.name, device=frozen.device, state="stopped", source=source, cwd=cwd.resolve(),
        run_folders=frozen.run_folders, created=time.time(), **_beginning(frozen),
    )  # fmt: skip


def _beginning(frozen: Frozen) -> dict[str, Any]:
    """Why a draft is where it is."""
    if frozen.faulty:
        return {"cause": "bad_input", "reason": "a draft with mistakes: edit it to see them"}
    return {"cause": "not_started", "reason": "not started yet"}


def _enqueue(db: sqlite3.Connection, job: Job) -> Job:
    if job.is_faulty:
        raise StateError(f"job {job.id} is a draft with mistakes: put them right before it is started")
    _check_free(db, job.id, job.run_folders)
    place = _length(db, job.device) + 1
    return _change(db, job, "queued", position=place, cause=None, reason="", exit_code=None)


def _end(db: sqlite3.Connection, job: Job, verdict: Verdict) -> Job:
    return _change(
        db, job, end_state(verdict.cause), position=None, token=None, worker=None, supervisor=None, process=None,
        oom=None, cause=verdict.cause, reason=verdict.reason, exit_code=verdict.exit_code, ended=time.time(),
    )  # fmt: skip


def _check_free(db: sqlite3.Connection, job_id: int, folders: tuple[Path, ...]) -> None:
    """Two jobs in one folder would overwrite each other, or the second would find the first one's end."""
    rows = db.execute(
        "SELECT id, state, run_folders FROM job "
        "WHERE id != ? AND state IN ('queued', 'starting', 'running', 'stopping')",
        (job_id,),
    )
    for row in rows:
        shared = {str(folder) for folder in folders} & set(json.loads(row["run_folders"]))
        if shared:
            raise UserError(
                f"job {row['id']} ({row['state']}) writes to {min(shared)} too; change config.output_name, or wait "
                f"until it has ended"
            )


def _queue(db: sqlite3.Connection, device: str) -> list[int]:
    rows = db.execute("SELECT id FROM job WHERE device = ? AND state = 'queued' ORDER BY position", (device,))
    return [int(row["id"]) for row in rows]


def _length(db: sqlite3.Connection, device: str) -> int:
    return len(_queue(db, device))


def _close_gaps(db: sqlite3.Connection, device: str) -> None:
    _renumber(db, device, _queue(db, device))


def _renumber(db: sqlite3.Connection, device: str, order: list[int]) -> None:
    """Give queued jobs the places 1, 2, ...; by way of negative ones, since no two may share a place."""
    db.executemany("UPDATE job SET position = ? WHERE id = ?", [(-place, job) for place, job in enumerate(order, 1)])
    db.execute("UPDATE job SET position = -position WHERE device = ? AND position < 0", (device,))


def _json(value: Process | OomKills | None) -> str | None:
    return None if value is None else value.to_json()


def _values(job: Job) -> dict[str, Any]:
    """A job as it is written into its row."""
    values = {field.name: getattr(job, field.name) for field in fields(job)}
    values |= {name: _json(values[name]) for name in ("worker", "supervisor", "process", "oom")}
    # As JSON: a path may hold bytes that are no UTF-8, which SQLite would refuse.
    paths = {"source": job.source, "cwd": str(job.cwd), "run_folders": [str(folder) for folder in job.run_folders]}
    return values | {name: json.dumps(value) for name, value in paths.items()}


def _job(row: sqlite3.Row) -> Job:
    """The inverse of `_values`."""
    values = dict(row)
    for name in ("worker", "supervisor", "process"):
        values[name] = Process.from_json(values[name]) if values[name] is not None else None
    values["oom"] = OomKills.from_json(values["oom"]) if values["oom"] is not None else None
    values["source"] = json.loads(values["source"])
    (values["cwd"],) = _paths(f"[{values['cwd']}]")
    values["run_folders"] = _paths(values["run_folders"])
    return Job(**values)


@lru_cache(maxsize=4096)
def _paths(text: str) -> tuple[Path, ...]:
    """From a list as JSON. Two thirds of the time that a list of jobs takes, and they hardly ever change."""
    return tuple(Path(folder) for folder in json.loads(text))
