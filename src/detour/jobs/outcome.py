"""Why a run ended, from what it left: exit code or signal, its log, its events, the kernel's counts.

Exit codes: 0 finished, 2 a wrong job file, option or input, 3 refused, 130 stopped; anything else is a failure whose
cause stands in the log. `probably` is said where something is likely and not certain.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from detour import UserError, files
from detour.events import read_events
from detour.jobs.states import Verdict
from detour.jobs.store import KILL

if TYPE_CHECKING:
    from pathlib import Path

    from detour.jobs.processes import Scope
    from detour.jobs.states import Cause
    from detour.jobs.store import Job

FINISHED = "finished"  # reason in the `end` event of a run that did all its steps
REFUSED, STOPPED = 3, 130
TAIL = 1 << 16  # bytes of the log that are looked at
SHOWN = 1000  # characters of an error that are kept
LITTLE = 1 << 24  # bytes: a run that ends in silence with less on its disk probably could not write

STEP = re.compile(r'^\{"type": "step",.*?"step": (\d+)', re.M)
"""The step of a line of `events.jsonl`."""

_CHECKPOINT = re.compile(r"step-(\d{9})")
_BEGINNING = re.compile(
    r"^(error: |unexpected failure: |Traceback \(most recent call last\)|Fatal Python error: )", re.M
)
# What an error says -> what that means. The first that fits counts.
_KNOWN: tuple[tuple[re.Pattern[str], Cause, str], ...] = (
    (
        re.compile(r"OutOfMemoryError|(CUDA|HIP|XPU|MPS backend) out of memory|_STATUS_ALLOC_FAILED|cudaErrorMemory"),
        "out_of_memory",
        "the card's memory ran out",
    ),
    (
        re.compile(r"\bMemoryError|can't allocate memory|Cannot allocate memory"),
        "out_of_memory",
        "main memory ran out",
    ),
    (
        re.compile(r"No space left on device|: no space \(|Disk quota exceeded|File too large|the disk is full"),
        "disk_full",
        "the disk is full",
    ),
)
_CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)


@dataclass(frozen=True)
class Evidence:
    """What is known about an attempt that has ended."""

    status: int | None
    """Exit code, or minus a signal; None where nobody waited for it."""
    error: str = ""
    """The last error in the log, without its mark."""
    end: str | None = None
    """Reason in the run's `end` event."""
    step: int | None = None
    """The last step that its events tell of."""
    saved: int | None = None
    """Step of the newest checkpoint."""
    stops: int = 0
    """How urgently it was asked to stop."""
    oom: Scope | None = None
    """Where the kernel killed something for lack of memory while it ran."""
    full: bool = False
    """Its disk has next to no space."""
    restarted: bool = False
    """The machine is not in the boot in which it began."""


def gather(job: Job, log: Path, status: int | None, oom: Scope | None, *, restarted: bool = False) -> Evidence:
    """Look at everything that an attempt at a job has left."""
    end, step = None, None
    folder, records = _at_work_last(job)
    for record in records:
        if record["type"] in ("start", "step", "end"):
            step = record.get("step")
        end = record.get("reason") if record["type"] == "end" else None
    if end == FINISHED and folder != job.run_folders[-1]:
        end = None  # one process of the job is done, the next has said nothing yet
    saved, full = _newest_checkpoint(folder), _is_full(job, log)
    return Evidence(status, last_error(tail(log)), end, step, saved, job.stops, oom, full, restarted=restarted)


def judge(found: Evidence) -> Verdict:
    """Say why it ended."""
    status = found.status
    if status is None:
        return _without_exit_code(found)
    if status == 0:
        return Verdict("finished", "finished" if found.step is None else f"finished at step {found.step}", 0)
    if status == STOPPED:
        return _stopped(found, status)
    if status < 0:
        return _killed(found, -status)
    return _failed(found, status)


def training_in(job: Job) -> Path | None:
    """The folder of the process that trains now; None before the first step, and between two processes."""
    folder, records = _at_work_last(job)
    kinds = [record["type"] for record in records]
    return folder if "start" in kinds and kinds[-1] != "end" else None


def last_error(log: str) -> str:
    """The last error that a run has printed, at most `SHOWN` characters; of a traceback its last line."""
    beginnings = list(_BEGINNING.finditer(log))
    if not beginnings:
        return ""
    text = log[beginnings[-1].start() :].strip().removesuffix("(--debug shows where)").strip()
    if text.startswith("Traceback"):
        text = text.splitlines()[-1]
    text = text.removeprefix("error: ").removeprefix("unexpected failure: ")
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def _without_exit_code(found: Evidence) -> Verdict:
    """The run's supervisor was killed, so that nobody knows how it ended; its own words count."""
    if found.end is not None:
        return Verdict("finished", f"finished at step {found.step}") if found.end == FINISHED else _stopped(found, None)
    if found.restarted:
        return Verdict("machine", f"the machine went down or was restarted while it ran{_goes_on(found)}")
    if found.error:
        return _failed(found, None)
    if found.oom is not None and found.stops < KILL:
        return _by_kernel(found, None)
    if found.stops:
        return _stopped(found, None)
    return Verdict("killed", f"killed together with its supervisor, by what is not known{_goes_on(found)}")


def _stopped(found: Evidence, code: int | None) -> Verdict:
    if found.end is not None:
        return Verdict("stopped", f"stopped and saved at step {found.step}", code)
    if found.step is None:
        return Verdict("not_started", "stopped before the first step", code)
    return Verdict("stopped", f"stopped at once after step {found.step}{_goes_on(found)}", code)


def _killed(found: Evidence, number: int) -> Verdict:
    code = -number
    try:
        name = f"signal {number} ({signal.Signals(number).name})"
    except ValueError:
        name = f"signal {number}"
    if number == (signal.SIGKILL if found.stops >= KILL else signal.SIGINT) and found.stops:
        return _stopped(found, code)
    if number == signal.SIGKILL and found.oom is not None:
        return _by_kernel(found, code)
    if number == signal.SIGXFSZ:
        return Verdict("disk_full", f"a file became larger than this user may make (ulimit -f){_goes_on(found)}", code)
    crash = ", a crash in native code such as a driver or a kernel" if number in _CRASHES else ""
    return Verdict("killed", f"killed by {name}{crash}{_goes_on(found)}", code)


def _by_kernel(found: Evidence, code: int | None) -> Verdict:
    if found.oom == "group" and code is not None:
        why = "killed by the kernel: main memory ran out (the limit of its container or group)"
    else:
        why = "probably killed by the kernel because main memory ran out"
    return Verdict("killed_by_kernel", why + _goes_on(found), code)


def _failed(found: Evidence, status: int | None) -> Verdict:
    error = found.error
    if status == REFUSED:
        return Verdict("refused", f"refused before it began: {error}", status)
    for pattern, cause, meaning in _KNOWN:
        if pattern.search(error):
            return Verdict(cause, f"{meaning}: {error}", status)
    if not error and found.full:
        return Verdict("disk_full", f"probably the disk is full{_goes_on(found)}", status)
    if status == UserError.exit_code:
        return Verdict("bad_input", error or "the job file, an option or an input is wrong; its log tells", status)
    code = "" if status is None else f" (exit code {status})"
    return Verdict("failed", f"failed{code}: {error}" if error else f"failed without a word{code}", status)


def _goes_on(found: Evidence) -> str:
    return "" if found.saved is None else f"; it goes on from step {found.saved} when started again"


def _at_work_last(job: Job) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of the process that was at work last, with its events of this attempt.

    A file that cannot be read tells nothing.
    """
    began = job.started or 0.0
    for folder in reversed(job.run_folders):
        with contextlib.suppress(UserError, OSError):
            found = [record for record in read_events(folder / "events.jsonl") if record.get("time", 0.0) >= began]
            if found:
                return folder, found
    return next((folder for folder in reversed(job.run_folders) if folder.is_dir()), job.run_folders[-1]), []


def _newest_checkpoint(folder: Path) -> int | None:
    """The step that a run would go on from. Its name is given to a checkpoint only once it is whole."""
    steps = [_CHECKPOINT.fullmatch(path.parent.name) for path in folder.glob(f"checkpoints/step-*/{files.MANIFEST}")]
    return max((int(match[1]) for match in steps if match), default=None)


def tail(log: Path) -> str:
    """The end of a file; nothing if it cannot be read."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def _is_full(job: Job, log: Path) -> bool:
    try:
        return min(files.free_bytes(place) for place in (log, *job.run_folders)) < LITTLE
    except OSError:
        return False
