"""The states of a job and the changes between them that exist. The store holds its table to `ALLOWED`, in SQL too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from detour import UserError

State = Literal["queued", "starting", "running", "stopping", "finished", "stopped", "failed"]
Cause = Literal[
    "finished",  # all steps were done
    "stopped",  # asked to stop; what it had is saved
    "not_started",  # a draft, taken out of the queue, or stopped before it began
    "bad_input",  # the job file, an option or an input is wrong (exit code 2)
    "refused",  # refused before start: plan, dataset health, disk (exit code 3)
    "out_of_memory",  # the card's memory, or memory asked for in vain
    "disk_full",
    "killed_by_kernel",  # main memory ran out and the kernel ended the process
    "killed",  # ended by a signal
    "machine",  # the machine went down or restarted
    "failed",  # anything else; the log tells
]

ALLOWED: Mapping[State, frozenset[State]] = {
    "queued": frozenset({"starting", "stopped"}),
    "starting": frozenset({"running", "queued", "stopped", "failed"}),
    "running": frozenset({"stopping", "finished", "stopped", "failed"}),
    "stopping": frozenset({"finished", "stopped", "failed"}),
    "finished": frozenset({"queued"}),
    "stopped": frozenset({"queued"}),
    "failed": frozenset({"queued"}),
}
ACTIVE: tuple[State, ...] = ("starting", "running", "stopping")
"""A process is at work, or about to be: at most one such job on a device."""
ENDED: tuple[State, ...] = ("finished", "stopped", "failed")


class StateError(UserError):
    """What was asked for is not possible in the state that a job is in."""


class UnknownJobError(UserError):
    """There is no job of that number."""


def end_state(cause: Cause) -> State:
    """The state that a job with this cause of its end is in."""
    if cause == "finished":
        return "finished"
    return "stopped" if cause in ("stopped", "not_started") else "failed"


@dataclass(frozen=True)
class Verdict:
    """How an attempt at a job ended, for programs (`cause`) and for people (`reason`)."""

    cause: Cause
    reason: str
    exit_code: int | None = None
    """Of the run; minus the signal that killed it; None where nobody knows."""
