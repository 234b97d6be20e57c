"""Pages from templates: Jinja with escaping always on."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi.templating import Jinja2Templates

from detour import __version__

if TYPE_CHECKING:
    from fastapi import Request
    from starlette.responses import Response

HERE = Path(__file__).parent


@cache
def _templates() -> Jinja2Templates:
    templates = Jinja2Templates(directory=HERE / "templates")
    templates.env.globals["version"] = __version__
    return templates


def page(request: Request, name: str, /, *, status: int = 200, **values: object) -> Response:
    """The page of a template, which extends `base.html`. `values` are escaped where the template shows them."""
    return _templates().TemplateResponse(request, name, values, status_code=status)
