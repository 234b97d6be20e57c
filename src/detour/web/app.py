"""The server: routes from the modules of each subject, behind one guard."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import FastAPI
from fastapi.responses import FileResponse, RedirectResponse
from fastapi.staticfiles import StaticFiles

from detour import __version__
from detour.web import (
    compare,
    curves,
    dataset_views_api,
    datasets_api,
    errors,
    export_api,
    export_pages,
    form_api,
    job_files,
    job_pages,
    jobs_api,
    live,
    login,
    samples,
    settings,
)
from detour.web.dataset_health import Health
from detour.web.datasets import library
from detour.web.exporting import Tasks
from detour.web.guard import Guard
from detour.web.pages import HERE

if TYPE_CHECKING:
    from starlette.responses import Response
    from starlette.types import Scope

    from detour.web.access import Access
    from detour.web.context import Context
    from detour.web.guard import Site

UPLOADS: tuple[str, ...] = (dataset_views_api.UPLOAD,)
"""Paths, as their routes write them, whose PUT takes a file as its body; all other changes take JSON."""
_LONG = 7 * 86400  # seconds that a browser may keep the charts' library before it asks whether there is another


def create_app(context: Context, access: Access, site: Site) -> FastAPI:
    """The app over a folder, for those who have access, at the addresses of the site."""
    app = FastAPI(
        title="Detour",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        openapi_url="/api/openapi.json",
        redirect_slashes=False,
    )
    app.state.context = context
    app.state.access = access
    app.state.site = site
    app.state.exports = Tasks()
    app.state.library = library(context.folder)
    app.state.library.recover()
    app.state.health = Health(app.state.library)
    app.add_middleware(Guard, access=access, site=site, uploads=UPLOADS)
    errors.install(app)

    app.include_router(login.router)
    app.include_router(compare.router)
    app.include_router(curves.router)
    app.include_router(dataset_views_api.router)
    app.include_router(datasets_api.router)
    app.include_router(export_api.router)
    app.include_router(export_pages.router)
    app.include_router(form_api.router)
    app.include_router(job_files.router)
    app.include_router(job_pages.router)
    app.include_router(jobs_api.router)
    app.include_router(live.router)
    app.include_router(samples.router)
    app.include_router(settings.router)

    app.add_api_route("/", _start, include_in_schema=False)
    app.add_api_route("/static/plotly.min.js", _charts, include_in_schema=False)
    app.mount("/static", _Static(directory=HERE / "static"), name="static")
    return app


def _start() -> RedirectResponse:
    return RedirectResponse("/jobs")


def _charts() -> FileResponse:
    """The charts' library, from its own package: 5 MB that every page with curves loads."""
    headers = {"Cache-Control": f"private, max-age={_LONG}"}
    return FileResponse(_plotly(), media_type="text/javascript", headers=headers)


def _plotly() -> Path:
    """Found without importing the package, which takes a second."""
    package = importlib.util.find_spec("plotly")
    assert package is not None
    assert package.origin is not None
    return Path(package.origin).parent / "package_data" / "plotly.min.js"


class _Static(StaticFiles):
    """Our own files, asked for again each time (and mostly answered with 304): a new version shows at once."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers["Cache-Control"] = "no-cache"
        return response
