"""The previews of a job: a matrix of prompts and steps, the pictures, and small ones to look through."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from functools import lru_cache
from io import BytesIO
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter, Query
from fastapi.responses import FileResponse, Response
from PIL import Image
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from detour import UserError, files
from detour.config.load import load_text
from detour.data import images
from detour.report import gate
from detour.web.curves import history_of, process_of
from detour.web.found import FoundJob, Here
from detour.web.job_files import ran

if TYPE_CHECKING:
    from pathlib import Path

    from detour.jobs.store import Job, Store

router = APIRouter()

KEPT = {"Cache-Control": "private, max-age=31536000, immutable"}
"""Addresses of pictures carry a version, so that a browser need not ask again while somebody scrubs through steps."""

GATE = "teacher-gate.png"
"""Among the previews, what `train.run` leaves of the teacher gate."""
_NAME = re.compile(r"(\d{9,15})-(\d{2,6})\.png")
_BUDGET = images.Budget(40_000_000)  # pixels that all requests decode at once: 120 MB


class Row(BaseModel):
    """A prompt."""

    index: int
    """Its place in the job's list."""
    prompt: str | None
    """As it was drawn last; None where the events do not tell."""
    seed: int | None


class Column(BaseModel):
    """A step at which previews were drawn."""

    step: int
    version: int
    """Changes when a picture does; for the addresses of pictures (`?v=`)."""
    pictures: list[int]
    """The prompts that there is a picture of."""
    others: dict[int, str]
    """Prompts that were others than those of the rows: the job file was edited since."""


class Gate(BaseModel):
    """What the teacher gate found before the first step."""

    passed: bool
    says: str
    about: str
    figures: list[tuple[str, str]]
    """Label and value."""
    reasons: list[str]
    """Why the teacher should not teach as it is."""
    version: int | None
    """Of the picture that it has left, for its address; None where that is gone."""


class Samples(BaseModel):
    """Which previews there are."""

    process: int
    processes: int
    prompts: list[Row]
    steps: list[Column]
    untouched: list[int]
    """Prompts whose picture at step 0 is the untouched model's, drawn with the same prompt and seed."""
    gate: Gate | None
    """None where there was no teacher gate."""
    complete: bool
    """False: the events, which tell the prompts, are long, and more of them is read at the next request."""


@router.get("/api/jobs/{job_id:number}/samples")
def job_samples(here: Here, job: FoundJob, process: Annotated[int | None, Query(ge=1)] = None) -> Samples:
    """The matrix of previews of a process: rows are prompts, columns are steps."""
    which = process_of(job, process)
    with history_of(job, which) as reader:
        told, complete = dict(reader.history.samples), reader.complete
        record = reader.history.gate
    steps: dict[int, dict[int, int]] = {}
    for step, index, changed in _pictures(_folder(job, which)):
        steps.setdefault(step, {})[index] = changed
    last = {index: step for step in sorted(steps) for index in steps[step]}
    nothing: tuple[str | None, int | None] = (None, None)
    rows = {index: told.get((step, index), nothing) for index, step in sorted(last.items())}
    columns = [
        Column(
            step=step,
            version=max(found.values()) // 1000,
            pictures=sorted(found),
            others={
                index: told[step, index][0]
                for index in sorted(found)
                if (step, index) in told and told[step, index][0] != rows[index][0]
            },
        )
        for step, found in sorted(steps.items())
    ]
    same = [index for index in steps.get(0, ()) if rows[index][0] is not None and told.get((0, index)) == rows[index]]
    return Samples(
        process=which,
        processes=len(job.run_folders),
        prompts=[Row(index=index, prompt=prompt, seed=seed) for index, (prompt, seed) in rows.items()],
        steps=columns,
        untouched=sorted(same) if same and _begins_untouched(here.store, job) else [],
        gate=None if record is None else _gate(record, _folder(job, which)),
        complete=complete,
    )


@router.get(
    "/api/jobs/{job_id:number}/samples/{process:number}/{step:number}/{index:number}", response_class=FileResponse
)
def sample_picture(job: FoundJob, process: int, step: int, index: int) -> FileResponse:
    """A preview as it was drawn: a PNG, animated if it is a clip."""
    path, _ = _picture(job, process, step, index)
    return FileResponse(path, media_type="image/png", headers=KEPT)


@router.get(
    "/api/jobs/{job_id:number}/samples/{process:number}/{step:number}/{index:number}/thumbnail",
    response_class=Response,
    responses={200: {"content": {"image/webp": {}}}},
)
def sample_thumbnail(
    here: Here, job: FoundJob, process: int, step: int, index: int, size: Literal["160", "320"] = "320"
) -> Response:
    """A preview no larger than `size` pixels; of a clip, its first frame."""
    path, found = _picture(job, process, step, index)
    name = f"{process}-{step}-{index}-{found.st_mtime_ns:x}-{found.st_size:x}-{size}.webp"
    kept = thumbnails(here.store, job.id) / name
    try:
        data = kept.read_bytes()
    except FileNotFoundError:
        data = _small(path, int(size))
        with contextlib.suppress(UserError, OSError):  # a full disk: it is made again next time
            files.write_bytes(kept, data)
    return Response(data, media_type="image/webp", headers=KEPT)


@router.get("/api/jobs/{job_id:number}/samples/{process:number}/teacher-gate", response_class=FileResponse)
def gate_picture(job: FoundJob, process: int) -> FileResponse:
    """What the teacher gate drew, beside the training pictures: a PNG."""
    if 1 <= process <= len(job.run_folders):
        path = _folder(job, process) / GATE
        if not path.is_symlink() and path.is_file():
            return FileResponse(path, media_type="image/png", headers=KEPT)
    raise HTTPException(404, f"job {job.id} has no drawings of a teacher gate")


def _gate(record: dict[str, Any], folder: Path) -> Gate | None:
    try:
        found = gate.read(record)
    except (KeyError, TypeError, ValueError):
        return None  # the timeline tells that it is damaged
    version = None
    with contextlib.suppress(OSError):
        version = (folder / GATE).lstat().st_mtime_ns // 1000
    return Gate(
        passed=found.passed, says=found.says, about=gate.ABOUT, figures=found.figures, reasons=found.reasons,
        version=version,
    )  # fmt: skip


def thumbnails(store: Store, job_id: int) -> Path:
    """Where the small pictures of a job are kept."""
    return store.folder / "cache" / "samples" / str(job_id)


def _folder(job: Job, process: int) -> Path:
    return job.run_folders[process - 1] / "samples"


def _pictures(folder: Path) -> list[tuple[int, int, int]]:
    """Step, prompt and time of change (nanoseconds) of every preview in a folder. Links are left out."""
    found = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                name = _NAME.fullmatch(entry.name)
                if name and entry.is_file(follow_symlinks=False):
                    with contextlib.suppress(FileNotFoundError):  # removed this moment
                        changed = entry.stat(follow_symlinks=False).st_mtime_ns
                        found.append((int(name[1]), int(name[2]), changed))
    except (FileNotFoundError, NotADirectoryError):
        return []
    return found


def _picture(job: Job, process: int, step: int, index: int) -> tuple[Path, os.stat_result]:
    """The file of a preview; 404 if there is none."""
    if 1 <= process <= len(job.run_folders):
        path = _folder(job, process) / f"{step:09d}-{index:02d}.png"
        with contextlib.suppress(OSError):
            found = path.lstat()
            if stat.S_ISREG(found.st_mode):
                return path, found
    raise HTTPException(404, f"job {job.id} has no preview of prompt {index} at step {step}")


def _small(path: Path, side: int) -> bytes:
    try:
        with Image.open(path, formats=("PNG",)) as picture:
            images.require_size(*picture.size)
            with _BUDGET.hold(picture.width * picture.height):
                shown = picture.convert("RGB")
                shown.thumbnail((side, side), images.RESAMPLE, reducing_gap=3.0)
    except (*images.DECODING, images.BadPictureError, Image.DecompressionBombError) as error:
        raise HTTPException(422, f"this preview is damaged ({error})") from None
    data = BytesIO()
    shown.save(data, "WEBP", quality=85)
    return data.getvalue()


def _begins_untouched(store: Store, job: Job) -> bool:
    text = ran(job)
    return _from_nothing(store.text(job.id) if text is None else text)


@lru_cache(maxsize=64)
def _from_nothing(text: str) -> bool:
    """Whether a job file's adapters begin as nothing, so that step 0 is the untouched model. False if nobody knows."""
    try:
        processes = load_text(text).job.config.process
    except UserError:
        return False
    return all(process.network.pretrained_lora_path is None for process in processes)
