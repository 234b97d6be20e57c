"""What goes in and out of a dataset besides its captions: uploads, thumbnails, crops, buckets, the health report."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Annotated, Literal
from urllib.parse import quote

import anyio
from anyio import from_thread
from fastapi import APIRouter, Depends, HTTPException, Query, Request
from fastapi.responses import FileResponse, Response
from pydantic import BaseModel, ConfigDict
from starlette.requests import ClientDisconnect

from detour import UserError, archs
from detour.web import dataset_health, thumbnails, uploads
from detour.web.dataset_health import Filled, Work
from detour.web.datasets_api import FoundDataset, Reports
from detour.web.errors import MissingError
from detour.web.thumbnails import Cut

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

router = APIRouter(tags=["datasets"])
UPLOAD = "/api/datasets/{name}/files/{filename}"
AT_ONCE = 8  # uploads; each holds one of the server's forty threads
SILENCE = 60.0  # seconds without a byte after which an upload counts as cut off
LISTED = 200  # instances of a finding in one answer
CROPS = 60  # pictures of a bucket
_UPLOADS = threading.BoundedSemaphore(AT_ONCE)
_KEEP = {"Cache-Control": "private, max-age=31536000, immutable"}

Version = Annotated[str, Query(max_length=64)]
"""What the list of pictures said of the file's state: an address that holds it may be kept for ever."""


class Received(BaseModel):
    """What became of an upload. Of an archive: how many of its files."""

    model_config = ConfigDict(from_attributes=True)
    outcome: Literal["added", "same", "replaced"]
    added: int
    same: int
    replaced: int
    left_out: list[str]


class ItemInfo(BaseModel):
    """One instance of a finding: a file, or files that belong together."""

    keys: list[str]
    note: str


class FindingInfo(BaseModel):
    """What was found, why it matters, what to do."""

    kind: str
    severity: Literal["stop", "warning", "note"]
    title: str
    why: str
    advice: str
    count: int
    items: list[ItemInfo]
    """At most 200."""


class Report(BaseModel):
    """The health report, or how far it is."""

    state: Literal["none", "running", "done", "failed"]
    done: int
    total: int
    problem: str
    pictures: int
    at: float
    findings: list[FindingInfo]


class PictureVersion(BaseModel):
    """A picture, and what its addresses hold so that they may be kept."""

    key: str
    v: str


class BucketInfo(BaseModel):
    """A size at which pictures are trained."""

    width: int
    height: int
    count: int
    kept: float
    """Share of the pictures' area that is seen, on average."""
    pictures: list[PictureVersion]
    """At most 60."""


class Buckets(BaseModel):
    """Which sizes the pictures are trained at."""

    divisibility: int
    resolution: int
    upscale: bool
    buckets: list[BucketInfo]
    unknown: int
    """Pictures that have not been looked at yet, or cannot be used."""


# --------------------------------------------------------------------------------------------------------- uploads


@router.put(
    UPLOAD,
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
        }
    },
)
def upload(dataset: FoundDataset, filename: str, request: Request, replace: bool = False) -> Received:
    """Take a picture, a caption or a ZIP of them in; the body is the file.

    409 where another file has that name, unless `replace` says that it may go (into the history).
    """
    length = request.headers.get("content-length", "")
    if not _UPLOADS.acquire(blocking=False):
        raise HTTPException(429, f"{AT_ONCE} uploads are under way; send the next when one is done")
    try:
        size = int(length) if length.isdecimal() else None
        return Received.model_validate(uploads.receive(dataset, filename, _body(request), size, replace))
    finally:
        _UPLOADS.release()


def _body(request: Request) -> Iterator[bytes]:
    """The body as it comes, for a route that runs in a thread; UserError if it is cut off."""
    stream = request.stream()
    try:
        while (chunk := from_thread.run(_next, stream)) is not None:
            yield chunk
    except (ClientDisconnect, TimeoutError):
        raise UserError("the upload was cut off; nothing of it was kept") from None


async def _next(stream: AsyncIterator[bytes]) -> bytes | None:
    with anyio.fail_after(SILENCE):
        return await anext(stream, None)


# -------------------------------------------------------------------------------------------------------- pictures


@router.get("/api/datasets/{name}/thumbnails/{key:path}", response_class=Response)
def thumbnail(dataset: FoundDataset, key: str, v: Version = "") -> Response:
    """A small WebP."""
    return _webp(thumbnails.thumbnail(dataset.picture(key), dataset.library.cache), v)


@router.get("/api/datasets/{name}/enlarged/{key:path}", response_class=Response)
def enlarged(dataset: FoundDataset, key: str, v: Version = "") -> Response:
    """A WebP with at most 1600 pixels a side."""
    return _webp(thumbnails.enlarged(dataset.picture(key)), v)


@router.get("/api/datasets/{name}/download/{key:path}", response_class=FileResponse)
def download(dataset: FoundDataset, key: str) -> Response:
    """The picture's file as it is, to be saved and never shown."""
    path = dataset.picture(key)
    headers = {"Content-Disposition": f"attachment; filename*=UTF-8''{quote(path.name, safe='')}"}
    return FileResponse(path, media_type="application/octet-stream", headers=headers)


def _webp(data: bytes, v: str) -> Response:
    return Response(data, media_type="image/webp", headers=_KEEP if v else None)


# --------------------------------------------------------------------------------------------------------- buckets


def _cut(
    dataset: FoundDataset,
    resolution: Annotated[int | None, Query(ge=64, le=4096)] = None,
    arch: Annotated[str, Query(max_length=40)] = "",
    upscale: bool = False,
) -> Cut:
    """What decides the crops: by default what the dataset's page was set to last."""
    settings = dataset.settings
    spec = archs.spec(archs.name_of(arch)) if arch else dataset_health.spec_of(settings)
    return Cut(resolution=resolution or settings.resolution, divisibility=spec.bucket_divisibility, upscale=upscale)


FoundCut = Annotated[Cut, Depends(_cut)]


@router.get("/api/datasets/{name}/crops/{key:path}", response_class=Response)
def crop(dataset: FoundDataset, key: str, cut: FoundCut, small: bool = False, v: Version = "") -> Response:
    """The part of a picture that training sees: a PNG, pixel for pixel, or a `small` WebP of it."""
    path = dataset.picture(key)
    if small:
        return _webp(thumbnails.crop_thumbnail(path, cut, dataset.library.cache), v)
    return Response(thumbnails.crop_png(path, cut), media_type="image/png", headers=_KEEP if v else None)


@router.get("/api/datasets/{name}/buckets")
def buckets(dataset: FoundDataset, cut: FoundCut, reports: Reports) -> Buckets:
    """The sizes at which the pictures would be trained. Counts those that the health report has looked at."""
    listing = dataset.listing()
    found = dataset_health.filled(reports.seen(dataset, listing), cut)
    placed = sum(len(bucket.keys) for bucket in found)
    return Buckets(
        divisibility=cut.divisibility,
        resolution=cut.resolution,
        upscale=cut.upscale,
        buckets=[_bucket(dataset, bucket) for bucket in found],
        unknown=len(listing.pictures) - placed,
    )


def _bucket(dataset: FoundDataset, bucket: Filled) -> BucketInfo:
    shown = []
    for key in bucket.keys[:CROPS]:
        with contextlib.suppress(MissingError):  # gone since the listing
            shown.append(PictureVersion(key=key, v=thumbnails.identity(dataset.folder / key)))
    return BucketInfo(
        width=bucket.width, height=bucket.height, count=len(bucket.keys), kept=bucket.kept, pictures=shown
    )


# ---------------------------------------------------------------------------------------------------------- health


@router.get("/api/datasets/{name}/health")
def read_report(dataset: FoundDataset, reports: Reports) -> Report:
    """The health report as far as it is made."""
    return _report(reports.look(dataset.name))


@router.post("/api/datasets/{name}/health")
def make_report(dataset: FoundDataset, reports: Reports) -> Report:
    """Make it, in the background, for the architecture, resolution and trigger word in the settings."""
    return _report(reports.start(dataset, dataset_health.aim_of(dataset.settings)))


def _report(work: Work | None) -> Report:
    if work is None:
        return Report(state="none", done=0, total=0, problem="", pictures=0, at=0, findings=[])
    findings = [
        FindingInfo(
            kind=finding.kind, severity=finding.rule.severity, title=finding.rule.title, why=finding.rule.why,
            advice=finding.rule.advice, count=len(finding.items),
            items=[ItemInfo(keys=list(item.keys[:LISTED]), note=item.note) for item in finding.items[:LISTED]],
        )
        for finding in work.findings
    ]  # fmt: skip
    return Report(
        state=work.state, done=work.done, total=work.total, problem=work.problem, pictures=work.pictures, at=work.at,
        findings=findings,
    )  # fmt: skip
