"""A folder of the UI with much in it, for `web.py`: jobs in all states with what they have left, and datasets.

Nothing is trained: event files, LoRAs and previews are written by hand, a few whole runs, copied for all other jobs.
"""

from __future__ import annotations

import math
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import runs_made
from detour.events import Event, StepEvent
from detour.jobs import processes
from detour.jobs.processes import OomKills
from detour.jobs.states import Cause, Verdict
from detour.jobs.store import Job, Store

if TYPE_CHECKING:
    from detour.jobs.processes import Process

DEVICES = ("cpu", "cuda:0", "cuda:1")
"""A job is at work on each: one of each kind of being at work."""
ENDS: tuple[tuple[Cause, str], ...] = (
    ("finished", "finished at step 600"), ("stopped", "stopped and saved at step 300"),
    ("out_of_memory", "the card's memory was not enough at step 1"), ("failed", "failed: the log tells"),
    ("not_started", "not started yet"),
)  # fmt: skip
COUNTS = {"queued": 0.05, "draft": 0.1}
"""Shares of the jobs; the others have ended."""
PROMPTS = ["a zig in a boat", "a zig under a tree", "a boat", "a street at night"]


@dataclass(frozen=True)
class Amount:
    """How much there is."""

    jobs: int
    long: int
    """Jobs with a long history."""
    long_steps: int
    pictures: int
    """In the largest dataset."""
    large: int
    """Of them with the pixels of a camera's picture."""
    datasets: int


FULL = Amount(jobs=1000, long=8, long_steps=50_000, pictures=10_000, large=100, datasets=20)
QUICK = Amount(jobs=30, long=2, long_steps=4_000, pictures=120, large=6, datasets=3)


@dataclass(frozen=True)
class Place:
    """What is in the folder, by number."""

    folder: Path
    long: list[int]
    ended: list[int]
    """Jobs with runs of an ordinary length."""
    running: int


def make(folder: Path, amount: Amount) -> Place:
    """Write everything. This process stands for the worker and for the runs that are at work: they live as long."""
    store = Store(folder, create=True)
    me = processes.this_process()
    store.enlist(me)
    models = _runs(folder.with_name("models"), amount)
    text = _job_text(models["short"])
    long, ended = [], []
    queued, drafts = (max(1, int(amount.jobs * share)) for share in COUNTS.values())
    for number in range(1, amount.jobs - len(DEVICES) - queued - drafts + 1):
        is_long = len(long) < amount.long
        job = _ended(store, _add(store, text, number, DEVICES[number % 3]), me, ENDS[0 if is_long else number % 4])
        _leave(job, models["long" if is_long else "short"], store)
        (long if is_long else ended).append(job.id)
    for number in range(drafts):
        _add(store, text, 20_000 + number, "cpu", queued=False)
    at_work = [_add(store, text, 30_000 + number, device) for number, device in enumerate(DEVICES)]
    for job in at_work:
        _leave(job, models["short"], store)
        claimed = store.claim(job.device, me)
        assert claimed is not None
        assert claimed.id == job.id
        if job.device != "cuda:1":  # which goes on starting
            assert store.begin(claimed, me, me, OomKills())
    store.ask_stop(at_work[1].id)
    for number in range(queued):
        _add(store, text, 40_000 + number, DEVICES[number % 3])
    store.close()
    _datasets(folder / "datasets", amount)
    return Place(folder, long, ended, at_work[0].id)


def _add(store: Store, text: str, number: int, device: str, *, queued: bool = True) -> Job:
    own = text.replace("NAME", f"zig-{number:05d}").replace("DEVICE", device)
    return store.add(own, cwd=store.folder, queued=queued)


def _ended(store: Store, job: Job, me: Process, end: tuple[Cause, str]) -> Job:
    claimed = store.claim(job.device, me)
    assert claimed is not None
    assert claimed.id == job.id
    assert store.begin(claimed, me, me, OomKills())
    assert store.conclude(store.job(job.id), Verdict(*end, exit_code=0))
    return store.job(job.id)


def _leave(job: Job, run: Path, store: Store) -> None:
    """What a run leaves, in the job's folders."""
    shutil.copytree(run, job.run_folders[0])
    log = store.log_file(job if job.attempts else store.job(job.id))
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("step 1: loss 0.5\n" * 20_000)


def _job_text(run: Path) -> str:
    """The job file of a run, with a name and device to be filled in."""
    lines = (run / "job.yaml").read_text(encoding="utf-8").splitlines()
    named = {"output_name": "NAME", "output_folder": "output", "device": "DEVICE"}
    return "\n".join(_named(line, named) for line in lines) + "\n"


def _named(line: str, values: dict[str, str]) -> str:
    key = line.strip().removeprefix("- ").partition(":")[0]
    return f"{line.partition(':')[0]}: {values[key]}" if key in values else line


# --- runs -------------------------------------------------------------------------------------------------------------


def _runs(folder: Path, amount: Amount) -> dict[str, Path]:
    short, long = runs_made.made(folder / "short"), runs_made.made(folder / "long")
    _write(short, 600, every=100)
    _write(long, amount.long_steps, every=max(250, amount.long_steps // 40))
    return {"short": short.folder, "long": long.folder}


def _write(run: runs_made.Made, steps: int, every: int) -> None:
    """A run with validations, measurements of drift, previews and saves at every so many steps."""
    run.start(total=steps)
    run.warn("something to know", None, ["a detail"] * 5)
    run.gate(["its drawings are more red than the pictures"])
    run.sample(0, PROMPTS, (256, 256))
    for first in range(1, steps + 1, every):
        last = min(first + every - 1, steps)
        run.emit_all([_step(step) for step in range(first, last + 1)])
        run.sample(last, PROMPTS, (256, 256))
        run.drift(last, 0.1, dict.fromkeys(PROMPTS, 0.1))
        run.validate(last, 0.5)
        run.save(last, final=last == steps)
    run.end(steps)


def _step(step: int) -> Event:
    time = step * 0.618 % 1
    loss = 0.3 + 0.2 * math.sin(step * 1.7) + 0.1 * time
    return StepEvent(
        step=step, epoch=step // 40, loss=loss, lr=1e-4, grad_norm=1 / step, seconds=2.0123456, seconds_outside=0.0123,
        memory_bytes=2**34, pictures=["IMG_20260101_123456.jpg"], picture_losses=[(time, loss)],
    )  # fmt: skip


# --- datasets ---------------------------------------------------------------------------------------------------------


def _datasets(folder: Path, amount: Amount) -> None:
    """One with very many pictures, some with few."""
    figures = np.random.default_rng(0)
    kinds = [_picture(figures, (320, 240)) for _ in range(10)]
    large = [_picture(figures, (3000, 2000)) for _ in range(2)]
    for number in range(amount.datasets):
        place = folder / ("many" if number == 0 else f"few-{number:02d}")
        place.mkdir(parents=True)
        count = amount.pictures if number == 0 else 10
        for at in range(count):
            is_large = number == 0 and at < amount.large
            data = large[at % len(large)] if is_large else kinds[at % len(kinds)]
            (place / f"picture-{at:05d}.jpg").write_bytes(data)
            if at % 50:
                (place / f"picture-{at:05d}.txt").write_text(
                    f"a zig of kind {at % 10}, seen from the side, number {at}"
                )


def _picture(figures: np.random.Generator, size: tuple[int, int]) -> bytes:
    """A JPEG of smooth noise, of the weight of a photograph."""
    from io import BytesIO

    coarse = figures.integers(0, 256, (size[1] // 20, size[0] // 20, 3), np.uint8)
    out = BytesIO()
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(out, "JPEG", quality=90)
    return out.getvalue()
