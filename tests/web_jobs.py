"""Jobs for the tests of pages: in the store, in any state, with event files written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient

from detour.jobs import processes
from detour.jobs.processes import OomKills
from detour.jobs.states import Cause, Verdict
from detour.jobs.store import Job, Store
from queueing import job_text

T0 = 1_767_225_600.0
"""Unix seconds at which the event files here begin."""


def store_of(client: TestClient) -> Store:
    return client.app.state.context.store


def add(store: Store, name: str = "zig", *, queued: bool = False, text: str | None = None, **meta: Any) -> Job:
    return store.add(text or job_text(store.folder, name, **meta), cwd=store.folder, queued=queued)


def begun(store: Store, job: Job) -> Job:
    """A job that runs, in this very process."""
    if job.state != "queued":
        store.start(job.id)
    me = processes.this_process()
    claimed = store.claim(job.device, me)
    assert claimed is not None
    assert claimed.id == job.id
    assert store.begin(claimed, me, me, OomKills())
    return store.job(job.id)


def ended(store: Store, job: Job, cause: Cause = "finished", reason: str = "finished at step 3") -> Job:
    """A job that has run and ended."""
    store.conclude(begun(store, job), Verdict(cause, reason, 0))
    return store.job(job.id)


def write(folder: Path, *records: dict[str, Any], torn: str = "") -> Path:
    """Append events to a run's file; `torn` is what a process was writing when it was killed."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "events.jsonl"
    with path.open("a") as file:
        file.write("".join(json.dumps(record) + "\n" for record in records) + torn)
    return path


def start(step: int = 0, total: int = 100, at: float = T0) -> dict[str, Any]:
    checkpoint = f"step-{step:09d}" if step else None
    return {"type": "start", "time": at, "step": step, "total_steps": total, "name": "zig", "arch": "zimage",
            "resumed_from": checkpoint}  # fmt: skip


def step(number: int, loss: float | None = 0.5, **more: Any) -> dict[str, Any]:
    return {
        "type": "step", "time": T0 + number, "step": number, "epoch": 0, "loss": loss, "lr": 1e-4, "grad_norm": 0.25,
        "seconds": 0.75, "seconds_outside": 0.25, "memory_bytes": 2**30, "pictures": None, "picture_losses": None,
    } | more  # fmt: skip


def stop_event(step: int, reason: str = "stop requested") -> dict[str, Any]:
    return {"type": "stop", "time": T0 + step, "step": step, "reason": reason}


def end(step: int, reason: str = "finished") -> dict[str, Any]:
    return {"type": "end", "time": T0 + step, "step": step, "reason": reason, "seconds": float(step)}
