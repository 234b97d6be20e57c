"""What happened in a run, from its `events.jsonl`: sessions, and the curves of the steps that count.

A run that was killed goes on from its last checkpoint, so that some steps are done again. What came after that
checkpoint before is dropped: the curves are those of the weights that the run ended with.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from detour import UserError
from detour.events import read_events
from detour.report.gate import read as read_gate

if TYPE_CHECKING:
    from pathlib import Path

    from detour.report.gate import Gate

    Record = dict[str, Any]

_CURVES = ("step", "validation", "drift", "sample", "save")
"""Events that belong to a step."""


@dataclass
class Session:
    """What one process of a run did."""

    began: float
    """Unix seconds: the beginning of its preparations, where the events tell."""
    first_step: int
    resumed_from: str | None
    last_step: int
    last: float
    """Unix seconds of its last event."""
    dropped: int = 0
    """Steps of the session before that it did again."""
    stop: str | None = None
    """Why somebody asked it to stop."""
    reason: str | None = None
    """Why it ended; None where no end was written: it was killed, it failed, or it is still running."""
    seconds: float = 0.0

    @property
    def words(self) -> str:
        """How it ended, for people."""
        if self.reason is None:
            return f"broke off after step {self.last_step}"
        return f"finished at step {self.last_step}" if self.finished else f"stopped at step {self.last_step}"

    @property
    def finished(self) -> bool:
        """Were all steps done?"""
        return self.reason == "finished"


@dataclass
class History:
    """A run, over all its sessions. Lists hold records of `events.jsonl` in the order of their steps."""

    name: str
    arch: str
    total_steps: int
    sessions: list[Session] = field(default_factory=list)
    steps: list[Record] = field(default_factory=list)
    validations: list[Record] = field(default_factory=list)
    drifts: list[Record] = field(default_factory=list)
    samples: list[Record] = field(default_factory=list)
    saves: list[Record] = field(default_factory=list)
    warnings: list[Record] = field(default_factory=list)
    gate: Gate | None = None
    """What the teacher gate found, where there was one."""
    facts: dict[str, str] = field(default_factory=dict)
    """Versions and hashes of the last session."""

    @property
    def last_step(self) -> int:
        """The last step that counts."""
        return self.sessions[-1].last_step

    @property
    def seconds(self) -> float:
        """Time spent in all sessions, preparations included where the events tell."""
        return sum(session.seconds for session in self.sessions)


def read_history(path: Path, *, steps: bool = True) -> History:
    """Read a run's events, also of one that was killed or is still running. UserError where there is nothing.

    Without `steps`, what the other events tell alone, which takes a twentieth of the time.
    """
    reader = _Reader()
    if not path.is_file():
        raise UserError(f"{path} does not exist; name the folder of a run, <output_folder>/<output_name>")
    for number, record in enumerate(read_events(path, without=() if steps else ("step",)), 1):
        try:
            reader.take(record)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            kind = record["type"]
            place = f"line {number}" if steps else "an event"
            raise UserError(
                f"{path}, {place}: this {kind!r} event is not as Detour writes it ({error!r}); remove that line"
            ) from error
    return reader.history(path)


class _Reader:
    """Goes through the events once."""

    def __init__(self) -> None:
        self._found: History | None = None
        self._open: Session | None = None
        self._preparing: float | None = None
        self._by_step: dict[str, dict[tuple[int, int], Record]] = {kind: {} for kind in _CURVES}
        self._warnings: list[Record] = []

    def take(self, record: Record) -> None:
        """Take the next event."""
        kind, at = record["type"], float(record["time"])
        if kind == "stage":  # only in preparations: whatever was at work before is not any more
            self._close()
            self._preparing = at if self._preparing is None else self._preparing
        elif kind == "start":
            self._start(record, at)
        elif kind == "warning":
            self._warnings.append({**record, "message": str(record["message"]), "details": list(record["details"])})
        elif kind == "end":
            self._end(record, at)
        elif kind == "gate" and self._found is not None:
            self._found.gate = read_gate(record)
        elif kind in _CURVES:
            step, index = int(record["step"]), int(record.get("index", 0))
            self._by_step[kind][step, index] = record
            if self._open is not None:
                self._open.last_step = max(self._open.last_step, step)
        elif kind == "stop" and self._open is not None:
            self._open.stop = str(record["reason"])
        if self._open is not None:
            self._open.last = max(self._open.last, at)

    def history(self, path: Path) -> History:
        """What was found."""
        self._close()
        if self._found is None:
            raise UserError(f"{path}: nothing has run here yet, so there is nothing to report on; start it first")
        found, ordered = self._found, {kind: dict(sorted(held.items())) for kind, held in self._by_step.items()}
        found.steps, found.saves = list(ordered["step"].values()), list(ordered["save"].values())
        found.validations, found.drifts = list(ordered["validation"].values()), list(ordered["drift"].values())
        found.samples, found.warnings = list(ordered["sample"].values()), self._warnings
        return found

    def _start(self, record: Record, at: float) -> None:
        step = int(record["step"])
        self._close()
        before = self._found.last_step if self._found is not None else step
        for held in self._by_step.values():
            for key in [key for key in held if key[0] > step]:
                del held[key]
        if self._found is None:
            self._found = History(name="", arch="", total_steps=0)
        found = self._found
        found.name, found.arch, found.total_steps = str(record["name"]), str(record["arch"]), int(record["total_steps"])
        found.facts = {str(key): str(value) for key, value in record.get("facts", {}).items()}
        self._open = Session(
            began=at if self._preparing is None else self._preparing,
            first_step=step,
            resumed_from=record["resumed_from"],
            last_step=step,
            last=at,
            dropped=max(0, before - step),
        )
        found.sessions.append(self._open)
        self._preparing = None

    def _end(self, record: Record, at: float) -> None:
        """An end without a beginning is that of a run that was finished before and had nothing to do."""
        if self._open is not None:
            session, self._open = self._open, None
            session.reason, session.last = str(record["reason"]), max(session.last, at)
            session.last_step, session.seconds = int(record["step"]), float(record["seconds"])
        self._preparing = None

    def _close(self) -> None:
        """The session at work broke off."""
        if self._open is not None:
            self._open.seconds = self._open.last - self._open.began
            self._open = None
