"""A job for more steps: `train.steps` changed in its text, everything else as it was, comments included."""

from __future__ import annotations

from typing import TYPE_CHECKING

from detour import UserError, archs
from detour.config import edit
from detour.config.load import load_text

if TYPE_CHECKING:
    from detour.config.document import Key

STEPS: Key = ("config", "process", 0, "train", "steps")


def extended(text: str, more: int) -> tuple[str, int]:
    """The job file with so many steps more, and how many that makes. UserError where that is not for us to decide."""
    processes = load_text(text).job.config.process
    if len(processes) > 1:
        raise UserError(f"this job has {len(processes)} processes: say in its job file which one gets more train.steps")
    now = archs.resolve(processes[0]).train
    if now.steps is None:
        raise UserError(
            f"this job counts epochs (train.epochs: {now.epochs}): change that number in its job file, and start it"
        )
    total = now.steps + more
    changed = edit.put(text, STEPS, total)
    found = load_text(changed).job.config.process[0].train.steps
    if found != total:
        raise UserError(f"train.steps of this job file cannot be changed from here (it is {found}); edit the job file")
    return changed, total
