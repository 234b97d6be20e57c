"""LoRA files in other formats: `detour convert` in a process of its own, and what has come of it.

The files lie with the job (`jobs/ID/exports`), each with a note beside it of what it was made from: one whose LoRA has
changed since counts for nothing. What is being made, and what could not be, is known to this server alone.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from detour import UserError, files

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from detour.report.lora import LoraOnDisk

CONVERT = (sys.executable, "-P", "-m", "detour", "convert")
"""Proves what it writes by loading it back. `-P`: nothing is imported from the folder it runs in."""
PATIENCE = 1800.0  # seconds; a LoRA of 1 GB took 40 on two cores
_PROVEN = re.compile(r"\((\d+ layers, proven by loading with [^()]+)\)\s*$")

State = Literal["running", "done", "failed"]


@dataclass(frozen=True)
class Converted:
    """A LoRA in a format, whole and proven."""

    path: Path
    proof: str
    notes: list[str]
    """What its users should know."""


@dataclass
class Task:
    """Something that takes more than a moment."""

    state: State
    began: float
    """Unix seconds."""
    says: str = ""
    """What came of it, or why nothing did."""


class Tasks:
    """What this server does besides answering: one conversion at a time, since each loads torch (1 GB)."""

    def __init__(self) -> None:
        self._tasks: dict[tuple[int, str], Task] = {}
        self._lock = threading.Lock()
        self._one = threading.Lock()

    def start(self, job: int, name: str, work: Callable[[], str]) -> Task:
        """Do something unless it is being done. `work` returns what is to be said of it, or raises UserError."""
        with self._lock:
            task = self._tasks.get((job, name))
            if task is not None and task.state == "running":
                return task
            task = self._tasks[job, name] = Task("running", time.time())
        threading.Thread(target=self._do, args=(task, work), daemon=True, name=f"job {job}: {name}").start()
        return task

    def find(self, job: int, name: str) -> Task | None:
        """What is known of it."""
        with self._lock:
            return self._tasks.get((job, name))

    def _do(self, task: Task, work: Callable[[], str]) -> None:
        said, state = "this failed unexpectedly; the terminal in which `detour ui` runs shows where", "failed"
        try:
            with self._one:
                said = work()
            state = "done"
        except (UserError, OSError, subprocess.SubprocessError) as error:
            said = str(error)
        finally:
            task.says = said
            task.state = "done" if state == "done" else "failed"


def folder_of(job_folder: Path, process: int) -> Path:
    """Where the exports of a job's process lie."""
    return job_folder / "exports" / str(process)


def file_name(lora: LoraOnDisk, fmt: str) -> str:
    """`zig.diffusers.safetensors` for `zig.safetensors`."""
    stem = lora.path.name.removesuffix(".safetensors").removesuffix(f".{lora.format}")
    return f"{stem}.{fmt}.safetensors"


def find(folder: Path, lora: LoraOnDisk, fmt: str) -> Converted | None:
    """A LoRA in a format, if it has been made and the LoRA is still the same."""
    path = folder / file_name(lora, fmt)
    try:
        note = json.loads(_note(path).read_bytes())
        if path.is_file() and note["made_from"] == _identity(lora.path):
            return Converted(path, str(note["proof"]), [str(line) for line in note["notes"]])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not there, or the note is damaged: it is made again
    return None


def convert(folder: Path, lora: LoraOnDisk, arch: str, fmt: str) -> Converted:
    """Write a LoRA in a format into a folder, with its note. UserError with the converter's own words."""
    path, made_from = folder / file_name(lora, fmt), _identity(lora.path)
    files.make_folder(folder)
    _note(path).unlink(missing_ok=True)
    ran = subprocess.run(  # noqa: S603
        [*CONVERT, str(lora.path), str(path), "--arch", arch, "--to", fmt],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", cwd=folder, timeout=PATIENCE,
        check=False,
    )  # fmt: skip
    proven = _PROVEN.search(ran.stdout)
    if ran.returncode != 0 or proven is None:
        raise UserError(_error(ran.stderr) or f"`detour convert` ended with exit code {ran.returncode}")
    notes = [line.removeprefix("note: ") for line in ran.stderr.splitlines() if line.startswith("note: ")]
    files.write_json(_note(path), {"made_from": made_from, "proof": proven[1], "notes": notes})
    return Converted(path, proven[1], notes)


def _error(text: str) -> str:
    """The converter's error, without its mark; it may have several lines."""
    _, mark, said = text.rpartition("error: ")
    return said.strip() if mark else text.strip()[-1000:]


def _note(path: Path) -> Path:
    return path.with_suffix(".json")


def _identity(path: Path) -> list[int]:
    """What changes when a file does."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]
