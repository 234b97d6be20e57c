"""`detour run --dry-run`: the whole road in two steps, in a scratch folder: previews, a save, a resume, a LoRA."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from detour.config.job import AdapterProcess
from detour.train.session import run_job

if TYPE_CHECKING:
    from detour.config.job import Job, Process
    from detour.events import Sink
    from detour.train.control import Control
    from detour.train.session import Result

STEPS = 2
PICTURES = 2
"""That a model draws to learn from, besides the held-out one."""


def rehearse(job: Job, control: Control, sink: Sink) -> list[Result]:
    """Run a job's first step, stop, resume from the checkpoint, finish. Caches that it fills stay; the rest goes.

    The results name no LoRA, since it is gone, too.
    """
    processes = [_short(process) for process in job.config.process]
    with tempfile.TemporaryDirectory(prefix="detour-rehearsal-") as scratch:
        config = job.config.model_copy(update={"process": processes, "output_folder": Path(scratch)})
        short = job.model_copy(update={"config": config})
        control.stop_at = 1
        run_job(short, control, sink)
        control.stop_at = control.stop_reason = None
        return [replace(result, lora=None) for result in run_job(short, control, sink)]


def _short(process: Process) -> Process:
    updates: dict[str, object] = {
        "train": process.train.model_copy(update={"steps": STEPS, "epochs": None}),
        "save": process.save.model_copy(update={"save_every": 1}),
        "logging": process.logging.model_copy(update={"tensorboard": False, "trackio": False, "wandb": False}),
    }
    if isinstance(process, AdapterProcess):
        stop = process.adapter.stop.model_copy(update={"held_out": 1, "every": 1})
        updates["adapter"] = process.adapter.model_copy(update={"pictures": 1 + PICTURES, "stop": stop})
    return process.model_copy(update=updates)
