"""The server: routes from the modules of each subject, behind one guard."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import FastAPI
from fastapi.staticfiles import StaticFiles

from detour import __version__
from detour.web.pages import HERE

if TYPE_CHECKING:
    from detour.web.context import Context


def create_app(context: Context) -> FastAPI:
    """The app over a folder."""
    app = FastAPI(title="Detour", version=__version__, docs_url=None, redoc_url=None, openapi_url="/api/openapi.json")
    app.state.context = context
    app.mount("/static", StaticFiles(directory=HERE / "static"), name="static")
    return app
