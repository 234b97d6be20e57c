"""The export page of a job."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from detour.web.found import FoundJob
from detour.web.pages import page

router = APIRouter(include_in_schema=False)


@router.get("/jobs/{job_id:number}/export")
def export_page(request: Request, job: FoundJob) -> Response:
    """Take the LoRA home."""
    return page(request, "export.html", job=job)
