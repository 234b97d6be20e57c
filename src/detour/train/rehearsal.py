"""`detour run --dry-run`: the whole road in two steps, in a scratch folder: previews, a save, a resume, a LoRA."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from detour.train.session import run_job

if TYPE_CHECKING:
    from detour.config.job import Job
    from detour.events import Sink
    from detour.train.control import Control
    from detour.train.session import Result

STEPS = 2


def rehearse(job: Job, control: Control, sink: Sink) -> list[Result]:
    """Run a job's first step, stop, resume from the checkpoint, finish. Caches that it fills stay; the rest goes.

    The results name no LoRA, since it is gone, too.
    """
    processes = [
        process.model_copy(
            update={
                "train": process.train.model_copy(update={"steps": STEPS, "epochs": None}),
                "save": process.save.model_copy(update={"save_every": 1}),
                "logging": process.logging.model_copy(update={"tensorboard": False, "trackio": False, "wandb": False}),
            }
        )
        for process in job.config.process
    ]
    with tempfile.TemporaryDirectory(prefix="detour-rehearsal-") as scratch:
        config = job.config.model_copy(update={"process": processes, "output_folder": Path(scratch)})
        short = job.model_copy(update={"config": config})
        control.stop_at = 1
        run_job(short, control, sink)
        control.stop_at = control.stop_reason = None
        return [replace(result, lora=None) for result in run_job(short, control, sink)]
