"""The pages of jobs. What they show comes from the API, so that nothing that a user wrote stands in the HTML."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from detour.web.found import FoundJob
from detour.web.pages import page

router = APIRouter(include_in_schema=False)


@router.get("/jobs")
def jobs_page(request: Request) -> Response:
    """All jobs."""
    return page(request, "jobs.html")


@router.get("/jobs/{job_id:number}")
def job_page(request: Request, job: FoundJob) -> Response:
    """One job."""
    return page(request, "job.html", job=job)


@router.get("/compare")
def compare_page(request: Request) -> Response:
    """Two jobs side by side; the address says which (`?a=1&b=2`)."""
    return page(request, "compare.html")
