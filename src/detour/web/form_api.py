"""The page of a new job, and what its form asks for. Everything works on the text that the form sends."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import tempfile
import threading
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, TypeAdapter
from starlette.responses import Response

from detour import UserError
from detour.archs.presets import Preset, presets
from detour.config.document import check_size, has_half_characters
from detour.config.form import FIRST, FormGroup, kinds
from detour.config.form_edit import change_entry, set_value
from detour.config.nodes import NAME
from detour.jobs.queue import RUN
from detour.jobs.states import ACTIVE, State, StateError
from detour.web import form
from detour.web.datasets import Settings, library
from detour.web.form import Finding, FormState
from detour.web.found import Here
from detour.web.pages import page

router = APIRouter()

CHECK_LIMIT = 120.0  # seconds; every picture of a dataset is looked at
_checks = threading.BoundedSemaphore(2)


class Description(BaseModel):
    """What there is to fill in: the fields of each kind of process, and the presets."""

    kinds: dict[str, tuple[FormGroup, ...]]
    presets: tuple[Preset, ...]
    first: tuple[str, ...]
    """The order of the fields that come first."""


class DatasetChoice(BaseModel):
    """A dataset of this UI."""

    name: str
    path: str
    """As a job file says it."""
    caption_ext: str
    trigger_word: str


class JobAtHand(BaseModel):
    """The job whose file is edited or copied."""

    id: int
    name: str
    state: State
    draft: bool
    """It was never started: it may be kept with mistakes."""
    locked: bool
    """It is at work: its job file can be changed once it has ended."""


class Start(BaseModel):
    """What a form begins with."""

    form: FormState
    edit: JobAtHand | None
    copy_of: JobAtHand | None
    datasets: list[DatasetChoice]
    folder: str
    """Where relative paths count from."""


def _whole(text: str) -> str:
    if has_half_characters(text):
        raise ValueError("the text holds half a character; type it again")
    return text


Text = Annotated[str, AfterValidator(_whole)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")
    text: Text
    process: int = Field(default=0, ge=0, lt=1000)
    """The process that the form shows."""


class Reading(_Body):
    """A text to be read."""


class Setting(_Body):
    """An option and its new value: null, or the default, takes it out. What was typed may be sent as text."""

    path: Text
    """`config.process[0].train.lr`"""
    value: JsonValue = None


class ListChange(_Body):
    """What is done to a list."""

    path: Text
    action: Literal["add", "remove", "move"]
    index: int = Field(default=0, ge=0)
    to: int = Field(default=0, ge=0)


class Choosing(_Body):
    """A preset by name. What was changed by hand stays, but for the paths (from the process down) in `overwrite`."""

    preset: Text
    overwrite: list[Text] = []


class Checking(BaseModel):
    """A text to be checked as `detour check` does."""

    model_config = ConfigDict(extra="forbid")
    text: Text
    like: int | None = None
    """A job from whose folder relative paths count; otherwise from the queue's."""


class Report(BaseModel):
    """What `detour check` found."""

    ok: bool
    errors: list[Finding]
    warnings: list[str]
    summary: list[str]


@router.get("/jobs/new", include_in_schema=False)
def new_job_page(request: Request) -> Response:
    """The form. What it begins with hangs on the address, which its script hands on to `/api/form/start`."""
    return page(request, "new_job.html")


@router.get("/api/form", response_model=Description)
def description() -> Response:
    """The fields and the presets. Both come with the program and never change while it runs."""
    return Response(_description(), media_type="application/json")


@router.get("/api/form/start")
def start(
    here: Here,
    edit: Annotated[int | None, Query(ge=1, lt=10**15)] = None,
    copy: Annotated[int | None, Query(alias="from", ge=1, lt=10**15)] = None,
    dataset: Annotated[str | None, Query(max_length=300)] = None,
) -> Start:
    """What a form begins with: an empty job (with a dataset), the file of a job to edit, or that of one to copy."""
    given = [job for job in (edit, copy) if job is not None]
    job = here.store.job(given[0]) if given else None
    cwd = here.folder if job is None else job.cwd
    choices = _datasets(here.folder, cwd)
    if job is None:
        text = form.beginning(next((choice.path for choice in choices if choice.name == dataset), None))
    else:
        text = here.store.text(job.id)
    if job is not None and edit is None:
        text = form.renamed(text, {other.name for other in here.store.jobs()})
    about = None
    if job is not None:
        about = JobAtHand(id=job.id, name=job.name, state=job.state, draft=job.is_draft, locked=job.state in ACTIVE)
    return Start(
        form=form.read(text),
        edit=about if edit is not None else None,
        copy_of=None if edit is not None else about,
        datasets=choices,
        folder=str(cwd),
    )


@router.post("/api/form/read")
def read_text(body: Reading) -> FormState:
    """What the form shows of a text. Mistakes in it are part of the answer."""
    return form.read(body.text, body.process)


@router.post("/api/form/set")
def set_option(body: Setting) -> FormState:
    """The text with one option changed and every other line as it was, and what the form shows of it."""
    return form.read(set_value(body.text, body.path, body.value), body.process)


@router.post("/api/form/list")
def change_list(body: ListChange) -> FormState:
    """The text with an entry of a list added, taken out or moved."""
    if body.action == "add":
        return form.read(form.add(body.text, body.path), body.process)
    return form.read(change_entry(body.text, body.path, body.action, body.index, body.to), body.process)


@router.post("/api/form/preset")
def choose_preset(body: Choosing) -> FormState:
    """The text with the values of a preset. `differences` say what stayed because it was changed by hand."""
    return form.read(form.choose(body.text, body.preset, body.process, body.overwrite), body.process)


@router.post("/api/form/translate")
def translate(body: Reading) -> FormState:
    """A file in ai-toolkit's layout, rewritten in Detour's. Its comments stay behind."""
    return form.read(form.translated(body.text), body.process)


@router.post("/api/form/check")
def check(here: Here, body: Checking) -> Report:
    """What `detour check` finds: the job file, its paths, and every picture of its datasets."""
    check_size(body.text, NAME)
    cwd = here.folder if body.like is None else here.store.job(body.like).cwd
    if not _checks.acquire(blocking=False):
        raise StateError("two checks are running already; try again when they are done")
    try:
        return _check(body.text, cwd, here.folder / "cache")
    finally:
        _checks.release()


def _check(text: str, cwd: Path, cache_folder: Path) -> Report:
    cache_folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="check-", dir=cache_folder) as scratch:
        file = Path(scratch) / NAME
        file.write_text(text, encoding="utf-8", newline="")
        command = [*RUN[:-1], "check", str(file), "--json"]
        try:
            done = subprocess.run(  # noqa: S603
                command, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, timeout=CHECK_LIMIT, check=False
            )
        except subprocess.TimeoutExpired:
            raise UserError(f"not done after {CHECK_LIMIT:g} seconds; run `detour check` in a terminal") from None
        said = done.stdout.decode(errors="replace")
        report: dict[str, Any] = {}
        with contextlib.suppress(ValueError):
            report = json.loads(said)
        if not report:
            ended = done.stderr.decode(errors="replace").strip().splitlines()[-3:]
            raise UserError("`detour check` failed: " + ("\n".join(ended) or f"exit code {done.returncode}"))
        report = json.loads(said.replace(json.dumps(str(file))[1:-1], NAME))
    return Report(
        ok=report["ok"],
        errors=[_finding(error) for error in report["errors"]],
        warnings=report["warnings"],
        summary=report["summary"],
    )


def _finding(error: str) -> Finding:
    """An error of the report, which names a line: `job.yaml:12: train.lr: ...`"""
    line = re.search(rf"{re.escape(NAME)}:(\d+)", error)
    message = re.sub(rf"^{re.escape(NAME)}:\d+: ", "", error)
    return Finding(where="", line=int(line[1]) if line else None, message=message)


def _datasets(folder: Path, cwd: Path) -> list[DatasetChoice]:
    """The UI's datasets, as a job that counts its paths from `cwd` says them."""
    there = library(folder)
    found = []
    for name in there.names():
        settings = Settings()
        with contextlib.suppress(UserError):  # damaged: the dataset's own page says so
            settings = there.dataset(name).settings
        path = f"datasets/{name}" if cwd == folder else str(folder / "datasets" / name)
        found.append(
            DatasetChoice(name=name, path=path, caption_ext=settings.caption_ext, trigger_word=settings.trigger_word)
        )
    return found


@cache
def _description() -> bytes:
    return TypeAdapter(Description).dump_json(Description(kinds=kinds(), presets=presets(), first=tuple(FIRST)))
