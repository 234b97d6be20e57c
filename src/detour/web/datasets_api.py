"""Datasets for pages and programs: making, renaming, removing; captions, one or many at a time; undoing."""

from __future__ import annotations

import contextlib
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from fastapi import APIRouter, Depends, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from detour import UserError, archs
from detour.config.job import TrainProcess
from detour.config.load import load_text
from detour.jobs.states import ACTIVE, StateError
from detour.web import captions_edit, dataset_names
from detour.web.captions_edit import SHOWN, Edit
from detour.web.dataset_health import Health, default_arch, spec_of
from detour.web.dataset_history import ChangeKind
from detour.web.datasets import CAPTION_ENDINGS, Dataset, Library, Settings
from detour.web.errors import MissingError
from detour.web.found import Here
from detour.web.pages import page
from detour.web.thumbnails import identity

if TYPE_CHECKING:
    from starlette.responses import Response

router = APIRouter(tags=["datasets"])
MOST = 200  # pictures in one answer
READ = 1000  # captions that one request reads anew before it looks at all of them: 0.02 s, 0.1 s where much goes on


def library(request: Request) -> Library:
    """Of the app that a request came to; for `Depends`."""
    found: Library = request.app.state.library
    return found


def health(request: Request) -> Health:
    """Of the app that a request came to; for `Depends`."""
    found: Health = request.app.state.health
    return found


Books = Annotated[Library, Depends(library)]
Reports = Annotated[Health, Depends(health)]


def _dataset(name: str, books: Books) -> Dataset:
    """MissingError (404) where there is none."""
    return books.dataset(name)


FoundDataset = Annotated[Dataset, Depends(_dataset)]


class Body(BaseModel):
    """What a client sends: nothing that is not known."""

    model_config = ConfigDict(extra="forbid")


class Name(Body):
    """A name for a dataset."""

    name: Annotated[str, Field(max_length=1000)]


class Summary(BaseModel):
    """A dataset in the list."""

    name: str
    pictures: int
    captions: int
    """Of the pictures; others are missing."""


class Trashed(BaseModel):
    """A dataset that was removed."""

    id: str
    name: str
    at: float


class Datasets(BaseModel):
    """All that there are."""

    datasets: list[Summary]
    trash: list[Trashed]


class Changes(Body):
    """Settings to change; what is left out stays."""

    caption_ext: str | None = None
    trigger_word: Annotated[str, Field(max_length=100)] | None = None
    arch: Annotated[str, Field(max_length=40)] | None = None
    resolution: Annotated[int, Field(ge=64, le=4096)] | None = None


class Details(BaseModel):
    """One dataset."""

    name: str
    folder_path: str
    """As a job file that the pages make names it."""
    pictures: int
    captions: int
    lone_captions: int
    others: int
    """Files that are neither pictures nor captions."""
    settings: Settings
    divisibility: int
    """Of the architecture in the settings."""
    text_tokens: int


class PictureInfo(BaseModel):
    """A picture with its caption."""

    key: str
    v: str
    """Changes when the file does: for the addresses of its thumbnails."""
    text: str | None
    """None: no caption, or one that cannot be read."""
    version: str
    """Of the caption; `none` where there is none."""
    problem: str


class Pictures(BaseModel):
    """Some of the pictures of a dataset."""

    total: int
    """That fit the search."""
    offset: int
    pictures: list[PictureInfo]
    complete: bool = True
    """False: none yet, since captions are being read for the first time; ask again."""


class CaptionInfo(BaseModel):
    """A caption."""

    text: str | None
    version: str
    problem: str


class Saved(Body):
    """A caption to save, over the version that was seen."""

    text: Annotated[str, Field(max_length=captions_edit.LARGEST)]
    version: Annotated[str, Field(max_length=64)]


class Bulk(Body):
    """An edit of many captions."""

    edit: Edit
    keys: Annotated[list[str], Field(max_length=100_000)] | None = None
    """Of these pictures alone."""


class Confirmed(Bulk):
    """An edit of many captions whose preview was seen."""

    token: Annotated[str, Field(max_length=64)]


class PlannedChange(BaseModel):
    """What an edit would do to one caption."""

    key: str
    before: str
    after: str


class Preview(BaseModel):
    """What an edit would do."""

    changed: int
    shown: list[PlannedChange]
    unreadable: list[str]
    """Pictures whose captions cannot be read: they stay as they are."""
    token: str
    """To be sent back with the edit."""


class Done(BaseModel):
    """How many files were changed, and which change it is in the history."""

    changed: int
    change: int | None


class Keys(Body):
    """Pictures."""

    keys: Annotated[list[str], Field(min_length=1, max_length=100_000)]


class ChangeInfo(BaseModel):
    """A change in the history."""

    id: int
    kind: ChangeKind
    title: str
    at: float
    count: int
    undone: bool


class HistoryInfo(BaseModel):
    """The latest changes, the newest first."""

    changes: list[ChangeInfo]
    kept_bytes: int
    """What undoing takes on the disk."""


class Figures(BaseModel):
    """See `captions_edit.Figures`."""

    complete: bool
    pictures: int
    missing: int
    empty: int
    unreadable: int
    shortest: int
    median: float
    longest: int
    lengths: list[tuple[int, int]]
    words: list[tuple[str, int]]
    tags: list[tuple[str, int]]


# ----------------------------------------------------------------------------------------------------------- pages


@router.get("/datasets", include_in_schema=False)
def datasets_page(request: Request) -> Response:
    """The list."""
    return page(request, "datasets.html")


@router.get("/datasets/{name}", include_in_schema=False)
def dataset_page(request: Request, dataset: FoundDataset) -> Response:
    """One dataset."""
    models = [(name, archs.spec(name).title) for name in archs.built()]
    return page(
        request,
        "dataset.html",
        dataset=dataset,
        endings=CAPTION_ENDINGS,
        models=models,
        chosen=dataset.settings.arch or default_arch(),
        settings=dataset.settings,
    )


# -------------------------------------------------------------------------------------------------------- datasets


@router.get("/api/datasets")
def list_datasets(books: Books) -> Datasets:
    """All datasets, with counts, and the trash."""
    found = []
    for name in books.names():
        with contextlib.suppress(MissingError):  # removed a moment ago
            listing = books.dataset(name).listing()
            found.append(Summary(name=name, pictures=len(listing.pictures), captions=listing.captioned))
    return Datasets(datasets=found, trash=[Trashed(id=one.id, name=one.name, at=one.at) for one in books.trashed()])


@router.post("/api/datasets", status_code=201)
def create_dataset(given: Name, books: Books, here: Here) -> Summary:
    """Make an empty dataset."""
    here.store.check_there()
    return Summary(name=books.create(given.name).name, pictures=0, captions=0)


@router.get("/api/datasets/{name}")
def read_dataset(dataset: FoundDataset) -> Details:
    """Counts and settings."""
    listing, settings = dataset.listing(), dataset.settings
    spec = spec_of(settings)
    return Details(
        name=dataset.name,
        folder_path=f"datasets/{dataset.name}",
        pictures=len(listing.pictures),
        captions=listing.captioned,
        lone_captions=len(listing.lone),
        others=len(listing.others) + len(listing.unread),
        settings=settings,
        divisibility=spec.bucket_divisibility,
        text_tokens=spec.default.text_tokens or spec.text_tokens,
    )


@router.patch("/api/datasets/{name}")
def change_settings(dataset: FoundDataset, given: Changes) -> Settings:
    """Change settings."""
    changes = given.model_dump(exclude_none=True)
    if changes.get("arch"):
        changes["arch"] = archs.spec(archs.name_of(changes["arch"])).name
    if changes.get("caption_ext", "txt") not in CAPTION_ENDINGS:
        raise UserError(f"caption_ext: captions may end in {', '.join(CAPTION_ENDINGS)}")
    settings = Settings.model_validate(dataset.settings.model_dump() | changes)
    dataset.set(settings)
    return settings


@router.post("/api/datasets/{name}/rename")
def rename_dataset(dataset: FoundDataset, given: Name, books: Books, reports: Reports, here: Here) -> Name:
    """Give it another name, unless a job is at work with it."""
    new = dataset_names.checked(given.name)
    _require_unused(here, dataset)
    books.rename(dataset.name, new)
    reports.renamed(dataset.name, new)
    return Name(name=new)


@router.delete("/api/datasets/{name}")
def remove_dataset(dataset: FoundDataset, books: Books, here: Here) -> Trashed:
    """Move it to the trash, unless a job is at work with it."""
    _require_unused(here, dataset)
    gone = books.remove(dataset.name)
    return Trashed(id=gone.id, name=gone.name, at=gone.at)


@router.post("/api/trash/{trash_id}/restore")
def restore_dataset(trash_id: str, books: Books) -> Name:
    """Bring a dataset back."""
    return Name(name=books.restore(trash_id).name)


@router.delete("/api/trash/{trash_id}", status_code=204)
def destroy_dataset(trash_id: str, books: Books) -> None:
    """Delete a dataset in the trash for good."""
    books.destroy(trash_id)


def _require_unused(here: Here, dataset: Dataset) -> None:
    """StateError if a job that runs or waits reads the dataset."""
    for job in here.store.jobs((*ACTIVE, "queued")):
        text = here.store.text(job.id)
        if dataset.name not in text and "\\" not in text:
            continue  # it is not named, plainly or with escapes
        try:
            processes = load_text(text).job.config.process
        except UserError:
            continue  # one that cannot be read will not run
        configs = [process for process in processes if isinstance(process, TrainProcess)]
        paths = [config.folder_path for process in configs for config in process.all_datasets]
        if any(_inside(job.cwd / path.expanduser(), dataset.folder) for path in paths):
            raise StateError(f"job {job.id} ({job.name}) needs {dataset.name!r}: wait for it, or stop it first")


def _inside(path: Path, folder: Path) -> bool:
    resolved, target = path.resolve(), folder.resolve()
    return resolved.is_relative_to(target) or target.is_relative_to(resolved)


# -------------------------------------------------------------------------------------------- pictures and captions


@router.get("/api/datasets/{name}/pictures")
def list_pictures(
    dataset: FoundDataset,
    offset: Annotated[int, Query(ge=0)] = 0,
    limit: Annotated[int, Query(ge=1, le=MOST)] = 60,
    q: Annotated[str, Query(max_length=200)] = "",
    only: Literal["all", "uncaptioned"] = "all",
) -> Pictures:
    """Pictures with captions, a page at a time. `q` is looked for in names and captions."""
    listing = dataset.listing()
    keys = list(listing.pictures)
    if q or only == "uncaptioned":
        captions = captions_edit.read_all(dataset, listing, most=READ)
        if len(captions) < len(keys):
            return Pictures(total=0, offset=offset, pictures=[], complete=False)
        wanted = q.casefold()
        keys = [
            key for key in keys
            if (only == "all" or not (captions[key].text or "").strip())
            and (wanted in key.casefold() or wanted in (captions[key].text or "").casefold())
        ]  # fmt: skip
    shown = keys[offset : offset + limit]
    captions = captions_edit.read_all(dataset, listing, shown)
    found = []
    for key in shown:
        caption = captions[key]
        with contextlib.suppress(MissingError):  # gone since the listing
            v = identity(dataset.folder / key)
            found.append(PictureInfo(key=key, v=v, text=caption.text, version=caption.version, problem=caption.problem))
    return Pictures(total=len(keys), offset=offset, pictures=found)


@router.get("/api/datasets/{name}/captions/{key:path}")
def read_caption(dataset: FoundDataset, key: str) -> CaptionInfo:
    """The caption of a picture, as it is on the disk now."""
    return _info(captions_edit.read(dataset, key))


@router.put("/api/datasets/{name}/captions/{key:path}")
def save_caption(dataset: FoundDataset, key: str, given: Saved) -> CaptionInfo:
    """Save the caption of a picture. 409 if the file is not of that version any more; nothing is overwritten then."""
    return _info(captions_edit.save(dataset, key, given.text, given.version))


def _info(caption: captions_edit.Caption) -> CaptionInfo:
    return CaptionInfo(text=caption.text, version=caption.version, problem=caption.problem)


@router.get("/api/datasets/{name}/figures")
def caption_figures(dataset: FoundDataset) -> Figures:
    """Figures about all captions; about none as long as there are many to be read for the first time."""
    listing = dataset.listing()
    captions = captions_edit.read_all(dataset, listing, most=READ)
    complete = len(captions) == len(listing.pictures)
    return Figures(**asdict(captions_edit.figures(captions if complete else {})), complete=complete)


@router.post("/api/datasets/{name}/bulk/preview")
def preview_bulk(dataset: FoundDataset, given: Bulk) -> Preview:
    """What an edit would do. Changes nothing."""
    plan = captions_edit.plan(dataset, given.edit, given.keys)
    return Preview(
        changed=len(plan.changes),
        shown=[
            PlannedChange(key=change.key, before=change.before, after=change.after) for change in plan.changes[:SHOWN]
        ],
        unreadable=list(plan.unreadable),
        token=plan.token,
    )


@router.post("/api/datasets/{name}/bulk/apply")
def apply_bulk(dataset: FoundDataset, given: Confirmed) -> Done:
    """Do what the preview showed. 409 if that is not what would happen any more."""
    changed = captions_edit.apply(dataset, given.edit, given.token, given.keys)
    return Done(changed=changed, change=_latest(dataset) if changed else None)


@router.post("/api/datasets/{name}/remove")
def remove_pictures(dataset: FoundDataset, given: Keys) -> Done:
    """Remove pictures with their captions. They are kept in the history, and can be brought back."""
    with dataset.locked():
        dataset.history.recover()
        listing = dataset.listing()
        keys = sorted({key for key in given.keys if key in listing.stems})
        title = f"Removed {keys[0]}" if len(keys) == 1 else f"Removed {len(keys)} pictures"
        going = set(keys)
        with dataset.history.change("remove", title) as draft:
            for key in keys:
                draft.drop(key)
            for stem in sorted({listing.stems[key] for key in keys}):
                sharing = set(listing.shared.get(stem, ()))
                if stem in listing.texts and sharing <= going:
                    draft.drop_text(listing.texts[stem])
        return Done(changed=len(keys), change=_latest(dataset) if keys else None)


# --------------------------------------------------------------------------------------------------------- history


@router.get("/api/datasets/{name}/history")
def read_history(dataset: FoundDataset, limit: Annotated[int, Query(ge=1, le=500)] = 50) -> HistoryInfo:
    """The latest changes."""
    changes = [
        ChangeInfo(
            id=one.change.id, kind=one.change.kind, title=one.change.title, at=one.change.at, count=one.change.count,
            undone=one.undone,
        )
        for one in dataset.history.changes(limit)
    ]  # fmt: skip
    return HistoryInfo(changes=changes, kept_bytes=dataset.history.kept_bytes())


@router.post("/api/datasets/{name}/history/{number}/undo")
def undo_change(dataset: FoundDataset, number: int) -> Done:
    """Take a change back. 409 if files have been changed since; nothing is touched then."""
    with dataset.locked():
        change = dataset.history.undo(number)
    return Done(changed=change.count, change=change.id)


@router.delete("/api/datasets/{name}/history", status_code=204)
def forget_history(dataset: FoundDataset) -> None:
    """Remove the history with all removed pictures that it keeps, for good."""
    with dataset.locked():
        dataset.history.forget()


def _latest(dataset: Dataset) -> int:
    return dataset.history.changes(1)[0].change.id
