"""Two jobs side by side: in which options their job files differ. Their curves and samples come from each one's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Query
from pydantic import BaseModel

from detour.config.load import differences
from detour.web.found import Here
from detour.web.job_files import ran, texts
from detour.web.jobs_api import JobSummary, summary

if TYPE_CHECKING:
    from detour.jobs.store import Job, Store

router = APIRouter()

JobId = Annotated[int, Query(ge=1, lt=2**53)]


class Difference(BaseModel):
    """An option in which two job files differ."""

    option: str
    """As people write it: `train.lr`."""
    a: str | None
    """As in a job file; None where it is not set."""
    b: str | None


class Comparison(BaseModel):
    """Two jobs."""

    a: JobSummary
    b: JobSummary
    differences: list[Difference]
    """With every default visible, as the last runs had them (else as runs would begin now)."""
    trouble: str
    """Why the job files cannot be compared; empty if they can."""


@router.get("/api/compare")
def compare(here: Here, a: JobId, b: JobId) -> Comparison:
    """Compare two jobs by their numbers."""
    jobs = [here.store.job(number) for number in (a, b)]
    found = [_text(here.store, job) for job in jobs]
    trouble = "; ".join(f"job {job.id}: {why}" for job, (_, why) in zip(jobs, found, strict=True) if why)
    differing = [] if trouble else differences(found[0][0], found[1][0])
    return Comparison(
        a=summary(jobs[0]),
        b=summary(jobs[1]),
        differences=[Difference(option=option, a=one, b=other) for option, one, other in differing],
        trouble=trouble,
    )


def _text(store: Store, job: Job) -> tuple[str, str]:
    """The job file with every default visible, or why there is none."""
    last = ran(job)
    if last is not None:
        return last, ""
    found = texts(store.text(job.id), job)
    return found.resolved, found.trouble
