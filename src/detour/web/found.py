"""What routes are given: the context, and the job that an address names (`/api/jobs/{job_id:number}`)."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends
from starlette.convertors import Convertor, register_url_convertor

from detour.jobs.store import Job
from detour.web.context import Context, context


class _Number(Convertor[int]):
    """A whole number of at most 15 digits: all that a browser counts exactly. Longer ones are no address."""

    regex = "[0-9]{1,15}"

    def convert(self, value: str) -> int:
        return int(value)

    def to_string(self, value: int) -> str:
        return str(value)


register_url_convertor("number", _Number())

Here = Annotated[Context, Depends(context)]


def _job(job_id: int, here: Here) -> Job:
    """UnknownJobError (404) where there is none."""
    return here.store.job(job_id)


FoundJob = Annotated[Job, Depends(_job)]
