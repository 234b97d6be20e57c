"""The API of the export page: a job's LoRAs in each format, ComfyUI's folder, the model card, all in one archive."""

from __future__ import annotations

import time
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import quote

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import FileResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse, Response

from detour import UserError, archs
from detour.jobs.states import StateError
from detour.report import words
from detour.report.card import HUB_ID, CardOf, instructions, model_card, pictures
from detour.report.folder import open_run, read_job, training
from detour.report.lora import LoraOnDisk, header, loras
from detour.web import archive, comfyui, exporting
from detour.web.exporting import State, Tasks
from detour.web.found import FoundJob, Here

if TYPE_CHECKING:
    from pathlib import Path

    from detour.archs.base import ArchSpec
    from detour.config.job import TrainProcess
    from detour.jobs.store import Job
    from detour.report.folder import RunFolder
    from detour.web.context import Context

router = APIRouter()

Format = Literal["comfy", "diffusers", "kohya"]
SENDING = "ComfyUI"  # name of the task


class Lora(BaseModel):
    """A LoRA file that a job has made."""

    id: str
    process: int
    name: str
    step: int | None
    """None: the finished one."""
    format: Format
    bytes: int
    modified: float
    """Unix seconds."""
    formats: list[Format]
    """What it can be made into, its own first."""


class File(BaseModel):
    """A LoRA in a format."""

    id: str
    lora: str
    format: Format
    name: str
    state: State
    seconds: float = 0.0
    """How long it has been in the making."""
    bytes: int = 0
    proof: str = ""
    """Who loaded it back."""
    notes: list[str] = []
    """What its users should know."""
    error: str = ""


class Sent(BaseModel):
    """What came of sending to ComfyUI."""

    state: State
    says: str
    seconds: float = 0.0


class Exports(BaseModel):
    """What the page shows."""

    loras: list[Lora]
    files: list[File]
    """Formats that were made, are being made or could not be."""
    comfyui: str | None
    """The folder that LoRAs are sent to; None where none was named on the command line."""
    name: str
    """Proposed name of the file there."""
    sent: Sent | None
    how: str
    """How the LoRA is used in ComfyUI."""
    base: str | None
    """Hub id of the model that it was trained on, where the job says it."""


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Wanted(_Body):
    """A LoRA in a format."""

    lora: str
    format: Format


class ToComfyUI(_Body):
    """A LoRA for ComfyUI."""

    lora: str
    name: Annotated[str, Field(min_length=1, max_length=150)]
    """Of the file, without its ending."""
    replace: bool = False


class Card(BaseModel):
    """A model card."""

    text: str
    pictures: int
    bytes: int
    """Of the archive with LoRA, card and pictures, to within a few kilobytes."""


# --- what there is ----------------------------------------------------------------------------------------------------


class _Offer:
    """The LoRAs of a job, by id."""

    def __init__(self, here: Context, job: Job) -> None:
        self.found: dict[str, tuple[int, LoraOnDisk]] = {}
        self.processes: dict[int, TrainProcess] = {}
        self.job, self._folder = job, here.store.job_folder(job.id)
        for number, folder in enumerate(job.run_folders, 1):
            try:
                found = (folder / "job.yaml").stat()
            except FileNotFoundError:
                continue  # it has not begun
            name, process = _job_in(folder, found.st_size, found.st_mtime_ns)
            self.processes[number] = process
            if process.network.type != "full":
                there = loras(folder, name, process.save.formats)
                self.found |= {f"{number}-{lora.key}": (number, lora) for lora in there}

    def get(self, lora_id: str) -> tuple[int, LoraOnDisk]:
        """A LoRA and the number of its process."""
        if lora_id not in self.found:
            raise HTTPException(404, f"job {self.job.id} has no such LoRA; it may have been removed for a newer one")
        return self.found[lora_id]

    def spec(self, process: int) -> ArchSpec:
        return archs.spec(self.processes[process].model.arch)

    def formats(self, process: int, lora: LoraOnDisk) -> list[Any]:
        """What a LoRA can be made into, its own format first."""
        known = self.spec(process).lora_keys.formats
        return sorted(known, key=lambda fmt: (fmt != lora.format, known.index(fmt)))

    def place(self, process: int) -> Path:
        return exporting.folder_of(self._folder, process)

    def run_folder(self, process: int) -> Path:
        return self.job.run_folders[process - 1]

    def made(self, lora_id: str, fmt: str) -> exporting.Converted | None:
        """A LoRA in a format: as the run has left it, or converted."""
        process, lora = self.get(lora_id)
        if fmt == lora.format:
            return exporting.Converted(lora.path, "", [])
        return exporting.find(self.place(process), lora, fmt)

    def convert(self, lora_id: str, fmt: str) -> exporting.Converted:
        """The same, made if it is not there. Through the converter in any case, which proves the file."""
        process, lora = self.get(lora_id)
        found = exporting.find(self.place(process), lora, fmt)
        return found or exporting.convert(self.place(process), lora, self.spec(process).name, fmt)


@lru_cache(maxsize=64)
def _job_in(folder: Path, _size: int, _changed: int) -> tuple[str, TrainProcess]:
    """Name of the LoRA and process of a run; read again when its job file changes, since that takes 40 ms."""
    _, job, process = read_job(folder)
    return job.config.output_name, training(process)


def _tasks(request: Request) -> Tasks:
    found: Tasks = request.app.state.exports
    return found


Doing = Annotated[Tasks, Depends(_tasks)]


@router.get("/api/jobs/{job_id:number}/exports")
def exports(here: Here, job: FoundJob, tasks: Doing) -> Exports:
    """The LoRAs of a job, what was made of them, and where they can go."""
    offer = _Offer(here, job)
    shown = [_lora(offer, lora_id) for lora_id in offer.found]
    made = [_file(offer, tasks, lora.id, fmt) for lora in shown for fmt in lora.formats if fmt != lora.format]
    process = next(iter(offer.processes.values()), None)
    task = tasks.find(job.id, SENDING)
    first = next(iter(offer.found.values()), None)
    base = None if process is None else process.model.name_or_path
    published = [] if process is None else [v.repo for v in archs.spec(process.model.arch).variants.values()]
    return Exports(
        loras=shown,
        files=[file for file in made if file is not None],
        comfyui=str(comfyui.place(here.comfyui)) if here.comfyui is not None else None,
        name=job.name if first is None else first[1].path.name.removesuffix(".safetensors"),
        sent=None if task is None else _sent(task),
        how="" if process is None else instructions(process),
        base=base if base in published else None,
    )


def _lora(offer: _Offer, lora_id: str) -> Lora:
    process, lora = offer.get(lora_id)
    found = lora.path.stat()
    return Lora(
        id=lora_id, process=process, name=lora.path.name, step=lora.step, format=lora.format, bytes=found.st_size,
        modified=found.st_mtime, formats=offer.formats(process, lora),
    )  # fmt: skip


def _file(offer: _Offer, tasks: Tasks, lora_id: str, fmt: Format) -> File | None:
    """A LoRA in a format, if anything is known of that."""
    _, lora = offer.get(lora_id)
    file = File(
        id=f"{lora_id}.{fmt}", lora=lora_id, format=fmt, name=exporting.file_name(lora, fmt), state="running"
    )  # fmt: skip
    task = tasks.find(offer.job.id, file.id)
    if task is not None and task.state == "running":
        return file.model_copy(update={"seconds": time.time() - task.began})
    made = offer.made(lora_id, fmt)
    if made is not None:
        found = {"name": made.path.name, "bytes": made.path.stat().st_size, "proof": made.proof, "notes": made.notes}
        return file.model_copy(update={"state": "done", **found})
    if task is None or task.state != "failed":
        return None  # or it was made, and the LoRA has changed since
    return file.model_copy(update={"state": "failed", "error": task.says})


def _sent(task: exporting.Task) -> Sent:
    seconds = time.time() - task.began if task.state == "running" else 0.0
    return Sent(state=task.state, says=task.says, seconds=seconds)


# --- files ------------------------------------------------------------------------------------------------------------


@router.post("/api/jobs/{job_id:number}/exports", status_code=202)
def make(here: Here, job: FoundJob, tasks: Doing, wanted: Wanted) -> File:
    """Make a LoRA in a format, in the background. What there is already is not made again."""
    offer = _Offer(here, job)
    process, lora = offer.get(wanted.lora)
    if wanted.format not in offer.formats(process, lora):
        spec = offer.spec(process)
        raise UserError(f"no program reads a LoRA of {spec.title} in the format {wanted.format}")
    if offer.made(wanted.lora, wanted.format) is None:
        tasks.start(job.id, f"{wanted.lora}.{wanted.format}", lambda: offer.convert(wanted.lora, wanted.format).proof)
    file = _file(offer, tasks, wanted.lora, wanted.format)
    assert file is not None
    return file


@router.get("/api/jobs/{job_id:number}/exports/{export_id}", response_class=FileResponse)
def download(here: Here, job: FoundJob, export_id: str) -> FileResponse:
    """A LoRA in a format, as a file. The id is that of a LoRA with a dot and the format behind it."""
    made = _made(_Offer(here, job), export_id)
    return FileResponse(
        made.path, filename=made.path.name, media_type="application/octet-stream", content_disposition_type="attachment"
    )


def _made(offer: _Offer, export_id: str) -> exporting.Converted:
    lora_id, _, fmt = export_id.rpartition(".")
    process, lora = offer.get(lora_id)
    if fmt not in offer.formats(process, lora):
        raise HTTPException(404, f"job {offer.job.id} has no such file")
    made = offer.made(lora_id, fmt)
    if made is None:
        raise StateError(f"{exporting.file_name(lora, fmt)} has not been made yet; make it first")
    return made


# --- ComfyUI ----------------------------------------------------------------------------------------------------------


@router.post("/api/jobs/{job_id:number}/comfyui", status_code=202)
def send(here: Here, job: FoundJob, tasks: Doing, wanted: ToComfyUI) -> Sent:
    """Put a LoRA into ComfyUI's folder, proven and whole. 409 where a file of that name is, unless `replace` is set."""
    if here.comfyui is None:
        raise UserError("no ComfyUI folder is known; start the UI with `detour ui --comfyui DIR`")
    target = comfyui.target(here.comfyui, wanted.name)
    comfyui.check_free(target, replace=wanted.replace)
    offer = _Offer(here, job)
    process, lora = offer.get(wanted.lora)
    if "comfy" not in offer.formats(process, lora):
        raise UserError(f"ComfyUI reads no LoRA of {offer.spec(process).title}")

    def work() -> str:
        made = offer.convert(wanted.lora, "comfy")
        comfyui.put(made.path, target, replace=wanted.replace)
        size = words.size(target.stat().st_size)
        return "\n".join([f"{target} is written: {size}, {made.proof}.", *made.notes])

    return _sent(tasks.start(job.id, SENDING, work))


# --- the card ---------------------------------------------------------------------------------------------------------

_HUB = Query(pattern=f"^({HUB_ID.pattern})?$", max_length=200, description="A name on the hub, `user/model`, or empty.")


@router.get("/api/jobs/{job_id:number}/card/{export_id}")
def card(
    here: Here, job: FoundJob, export_id: str, base: Annotated[str, _HUB] = "", repository: Annotated[str, _HUB] = ""
) -> Card:
    """The model card for the hub, about one of the files."""
    run, about = _about(_Offer(here, job), export_id, base, repository)
    text, shown = model_card(run, about), pictures(run, about.step)
    size = about.file.stat().st_size + len(text.encode()) + sum(picture.path.stat().st_size for picture in shown)
    return Card(text=text, pictures=len(shown), bytes=size)


@router.get("/api/jobs/{job_id:number}/card/{export_id}/README.md", response_class=PlainTextResponse)
def card_text(
    here: Here, job: FoundJob, export_id: str, base: Annotated[str, _HUB] = "", repository: Annotated[str, _HUB] = ""
) -> Response:
    """The same as a file."""
    run, about = _about(_Offer(here, job), export_id, base, repository)
    return PlainTextResponse(model_card(run, about), headers=_attachment("README.md"))


@router.get("/api/jobs/{job_id:number}/card/{export_id}/archive.zip", response_class=StreamingResponse)
def card_archive(
    here: Here, job: FoundJob, export_id: str, base: Annotated[str, _HUB] = "", repository: Annotated[str, _HUB] = ""
) -> Response:
    """LoRA, card and pictures: what a repository on the hub holds."""
    run, about = _about(_Offer(here, job), export_id, base, repository)
    entries: list[tuple[str, bytes | Path]] = [("README.md", model_card(run, about).encode()), (about.name, about.file)]
    entries += [(picture.place, picture.path) for picture in pictures(run, about.step)]
    name = f"{about.name.removesuffix('.safetensors')}.zip"
    return StreamingResponse(archive.chunks(entries), media_type="application/zip", headers=_attachment(name))


def _about(offer: _Offer, export_id: str, base: str, repository: str) -> tuple[RunFolder, CardOf]:
    """The run, and what its card is about."""
    lora_id, _, fmt = export_id.rpartition(".")
    made = _made(offer, export_id)
    process, lora = offer.get(lora_id)
    run = open_run(offer.run_folder(process), steps=False)
    own = next((other.proof for other in run.loras if other.path == made.path), None)
    step = lora.step or int(header(lora.path).get("detour.step", run.history.last_step))
    about = CardOf(
        file=made.path, name=made.path.name, format=fmt, step=step, proof=made.proof or own, base=base or None,
        repository=repository or None,
    )  # fmt: skip
    return run, about


def _attachment(name: str) -> dict[str, str]:
    return {"Content-Disposition": f"attachment; filename*=UTF-8''{quote(name)}"}
