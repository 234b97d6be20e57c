"""What a job leaves: its log, its job file, and the files that it made, to be taken home."""

from __future__ import annotations

import codecs
import os
import re
from typing import TYPE_CHECKING, Annotated, Literal

from fastapi import APIRouter, Query
from fastapi.responses import FileResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from detour import UserError, archs
from detour.config.document import MAX_BYTES
from detour.config.load import dump_job, load_text
from detour.files import MANIFEST
from detour.web.found import FoundJob, Here

if TYPE_CHECKING:
    from pathlib import Path

    from detour.jobs.store import Job

router = APIRouter()

PIECE = 1 << 16
"""Bytes of a log that are sent at once."""
MOST = 500
"""Files of a run that are listed."""

Kind = Literal["lora", "job", "report", "events", "checkpoint", "model"]
_STEP = re.compile(r"-(\d{9,})\.safetensors$")
_CHECKPOINT = re.compile(r"step-(\d{9,})")
_PLAIN: dict[str, Kind] = {"job.yaml": "job", "report.html": "report", "events.jsonl": "events"}


class Log(BaseModel):
    """A part of what an attempt printed."""

    attempt: int
    """0: it was never started."""
    text: str
    begin: int
    """Where in the file the part begins, in bytes."""
    offset: int
    """Where to go on."""
    size: int
    reset: bool
    """The log is shorter than what was asked for, or another attempt's: `text` is its end."""


class Texts(BaseModel):
    """A job file."""

    written: str
    """As it was written."""
    resolved: str
    """With every default visible, as a run of it would begin now; empty where it cannot be said (see `trouble`)."""
    ran: str | None
    """With every default visible, as the last run had it; None before the first."""
    notes: list[str]
    """What a file of another trainer asks for and Detour does differently."""
    trouble: str = ""


class RunFile(BaseModel):
    """A file or folder that a run has made."""

    process: int
    name: str
    kind: Kind
    step: int | None
    """Of a LoRA or checkpoint in the middle of the run."""
    bytes: int
    modified: float
    """Unix seconds."""
    download: bool
    """It is one file, to be had at `/api/jobs/ID/files/PROCESS/NAME`."""


class RunFiles(BaseModel):
    """What a job's runs have made, the newest first."""

    files: list[RunFile]
    folders: list[str]
    """Where they lie, by process."""
    left_out: int


# --- the log ----------------------------------------------------------------------------------------------------------


@router.get("/api/jobs/{job_id:number}/log")
def job_log(
    here: Here,
    job: FoundJob,
    offset: Annotated[int | None, Query(ge=0)] = None,
    attempt: Annotated[int | None, Query(ge=0)] = None,
    limit: Annotated[int, Query(ge=1, le=PIECE)] = PIECE,
) -> Log:
    """What the last attempt printed: its end, or what follows `offset` of the `attempt` that an answer named.

    At most `limit` bytes.
    """
    path = here.store.log_file(job)
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return Log(attempt=job.attempts, text="", begin=0, offset=0, size=0, reset=offset not in (None, 0))
    with file:
        size = os.fstat(file.fileno()).st_size
        goes_on = offset is not None and offset <= size and attempt in (None, job.attempts)
        begin = offset if goes_on and offset is not None else max(0, size - limit)
        file.seek(begin)
        data = file.read(limit)
    if not goes_on and begin:  # with a whole line
        cut = data.find(b"\n") + 1
        begin, data = begin + cut, data[cut:]
    text, taken = _decoded(data)
    return Log(
        attempt=job.attempts, text=text, begin=begin, offset=begin + taken, size=size,
        reset=offset is not None and not goes_on,
    )  # fmt: skip


def _decoded(data: bytes) -> tuple[str, int]:
    """Text, and of how many bytes: a character that is not whole yet stays for the next time."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = decoder.decode(data)
    return text, len(data) - len(decoder.getstate()[0])


# --- the job file -----------------------------------------------------------------------------------------------------


@router.get("/api/jobs/{job_id:number}/text")
def job_text(here: Here, job: FoundJob) -> Texts:
    """The job file as it was written, and with every default visible."""
    return texts(here.store.text(job.id), job)


def texts(written: str, job: Job) -> Texts:
    """What `job_text` answers."""
    last = ran(job)
    try:
        loaded = load_text(written)
        config = loaded.job.config
        processes = [archs.resolve(process) for process in config.process]
        resolved = loaded.job.model_copy(update={"config": config.model_copy(update={"process": processes})})
    except UserError as error:  # written for an older Detour
        return Texts(written=written, resolved="", ran=last, notes=[], trouble=str(error))
    return Texts(written=written, resolved=dump_job(resolved), ran=last, notes=loaded.notes)


def ran(job: Job) -> str | None:
    """The job file that the last run has put down in its folder."""
    for folder in reversed(job.run_folders):
        path = folder / "job.yaml"
        try:
            if not path.is_symlink() and path.stat().st_size <= 2 * MAX_BYTES:
                return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
    return None


# --- what it made -----------------------------------------------------------------------------------------------------


@router.get("/api/jobs/{job_id:number}/files")
def job_files(job: FoundJob) -> RunFiles:
    """LoRAs, checkpoints, the job file and the report."""
    found = [file for process, folder in enumerate(job.run_folders, 1) for file in _listed(folder, process)]
    found.sort(key=lambda file: (-file.modified, file.name))
    folders = [str(folder) for folder in job.run_folders]
    return RunFiles(files=found[:MOST], folders=folders, left_out=max(0, len(found) - MOST))


@router.get("/api/jobs/{job_id:number}/files/{process:number}/{name}", response_class=FileResponse)
def job_file(job: FoundJob, process: int, name: str) -> FileResponse:
    """One of the files, always as a download."""
    if not 1 <= process <= len(job.run_folders):
        raise HTTPException(404, f"job {job.id} has {len(job.run_folders)} processes")
    folder = job.run_folders[process - 1]
    found = next((file for file in _listed(folder, process) if file.name == name and file.download), None)
    if found is None:
        raise HTTPException(404, f"job {job.id} has no such file")
    return FileResponse(
        folder / found.name,
        filename=found.name,
        media_type="application/octet-stream",
        content_disposition_type="attachment",
    )


def _listed(folder: Path, process: int) -> list[RunFile]:
    """What may be shown of a run's folder. Names come from the disk, never from a client; links are left out."""
    found = []
    for entry in _entries(folder):
        kind = _kind(entry, folder)
        if kind is not None:
            found.append(_shown(entry, process, kind, _STEP.search(entry.name)))
    for entry in _entries(folder / "checkpoints"):
        number = _CHECKPOINT.fullmatch(entry.name)
        if number and entry.is_dir(follow_symlinks=False) and (folder / "checkpoints" / entry.name / MANIFEST).exists():
            found.append(_shown(entry, process, "checkpoint", number))
    return [file for file in found if file is not None]


def _shown(entry: os.DirEntry[str], process: int, kind: Kind, step: re.Match[str] | None) -> RunFile | None:
    """None for one that is being removed just now, as old checkpoints are."""
    try:
        stat, is_folder = entry.stat(follow_symlinks=False), entry.is_dir(follow_symlinks=False)
        size = sum(part.stat(follow_symlinks=False).st_size for part in _entries(entry.path)) if is_folder else 0
    except FileNotFoundError:
        return None
    return RunFile(
        process=process, name=entry.name, kind=kind, step=int(step[1]) if step else None,
        bytes=size or stat.st_size, modified=stat.st_mtime, download=not is_folder,
    )  # fmt: skip


def _kind(entry: os.DirEntry[str], folder: Path) -> Kind | None:
    if entry.is_dir(follow_symlinks=False):
        return "model" if entry.name == folder.name else None  # a fine-tuned denoiser bears the run's name
    if not entry.is_file(follow_symlinks=False):
        return None
    return "lora" if entry.name.endswith(".safetensors") else _PLAIN.get(entry.name)


def _entries(folder: Path | str) -> list[os.DirEntry[str]]:
    """What lies in a folder; nothing where there is none yet."""
    try:
        with os.scandir(folder) as found:
            return list(found)
    except (FileNotFoundError, NotADirectoryError):
        return []
