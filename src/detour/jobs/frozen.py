"""What the queue keeps of a job file: its text as it is now, so that later edits of the file change nothing."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path

from detour import UserError

# What a machine with a card has: NVIDIA, AMD, Windows' Linux. Torch would know for certain, and takes seconds to load.
_CARDS = (Path("/dev/nvidiactl"), Path("/dev/nvidia0"), Path("/dev/kfd"), Path("/dev/dxg"))


@dataclass(frozen=True)
class Frozen:
    """A job file that has been found right."""

    text: str
    name: str
    device: str
    """Whose queue it stands in: `cpu`, `mps`, `cuda:0`."""
    run_folders: tuple[Path, ...]
    """Where its processes leave their files, in order."""
    notes: tuple[str, ...] = ()
    """What a file of another trainer asks for and Detour does differently."""
    faulty: bool = False
    """It has mistakes: name and queue are guesses, and it cannot run."""


def freeze(text: str, cwd: Path, name: str) -> Frozen:
    """Check a job file's text. `JobError` with every mistake; `name` stands before the lines.

    Relative paths count from `cwd`, where the run will be started.
    """
    from detour.config.load import load_text, run_folder

    loaded = load_text(text, name)
    config = loaded.job.config
    folders = [(cwd / run_folder(loaded.job, index)).resolve() for index in range(len(config.process))]
    devices = {queue_of(process.device) for process in config.process}
    if len(devices) > 1:
        place = loaded.place("device", 1)
        raise UserError(
            f"{place}: device: the processes of a queued job share one device, found {' and '.join(sorted(devices))}; "
            f"make them jobs of their own"
        )
    return Frozen(text, config.output_name, devices.pop(), tuple(folders), tuple(loaded.notes))


def freeze_draft(text: str, cwd: Path, name: str, queue: Path) -> Frozen:
    """The same for a draft, whose text may have mistakes: its run's folder is then one that is never there."""
    from detour.config.document import check_size, has_half_characters, parse
    from detour.config.explain import lookup

    check_size(text, name)
    if has_half_characters(text):
        raise UserError(f"{name}: the text holds half a character; type it again")
    try:
        return freeze(text, cwd, name)
    except UserError:
        title: object = None
    with contextlib.suppress(UserError):
        title = lookup(parse(text, name).data, ("config", "output_name"))
    shown = title if isinstance(title, str) and title.isprintable() and title.strip() else "draft"
    return Frozen(text, shown[:100], queue_of("auto"), (queue / "jobs" / "draft",), faulty=True)


def queue_of(device: str) -> str:
    """The queue of a job file's `device`: `auto` and `cuda` share the first card's.

    A queue only says which jobs wait for each other. What a run computes on it decides itself, when it starts.
    """
    if device == "cuda":
        return "cuda:0"
    if device != "auto":
        return device
    if any(path.exists() for path in _CARDS):
        return "cuda:0"
    return "mps" if sys.platform == "darwin" else "cpu"
