"""Logging in and out. A login link leads to a page that hands in its code: opening an address changes nothing here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Depends, HTTPException, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from detour.web.access import SESSION, Access
from detour.web.guard import Site, address_of
from detour.web.pages import page

if TYPE_CHECKING:
    from starlette.responses import Response as Page

router = APIRouter()


def access(request: Request) -> Access:
    """Of the app that a request came to; for `Depends`."""
    found: Access = request.app.state.access
    return found


def site(request: Request) -> Site:
    """Of the app that a request came to; for `Depends`."""
    found: Site = request.app.state.site
    return found


class Credentials(BaseModel):
    """One of the two."""

    model_config = ConfigDict(extra="forbid")
    code: Annotated[str, Field(max_length=1000, description="of a login link; good once")] = ""
    token: Annotated[str, Field(max_length=1000, description="the server's token")] = ""


class Done(BaseModel):
    """It is done."""

    ok: bool = True


@router.get("/api/health")
def health() -> Done:
    """Whether the server answers."""
    return Done()


@router.get("/login", include_in_schema=False)
def login_page(request: Request) -> Page:
    """Where login links lead."""
    return page(request, "login.html")


@router.post("/api/login")
def log_in(
    request: Request,
    response: Response,
    given: Credentials,
    access: Annotated[Access, Depends(access)],
    site: Annotated[Site, Depends(site)],
) -> Done:
    """Begin a session: the answer sets its cookie."""
    if not access.log_in(address_of(request), token=given.token, code=given.code):
        why = "this link was used already or is too old" if given.code else "this is not the token"
        raise HTTPException(401, f"{why}; `detour ui` started once more shows a new link")
    _set_cookie(response, access, site)
    return Done()


@router.delete("/api/session")
def log_out(response: Response, site: Annotated[Site, Depends(site)]) -> Done:
    """End the session in this browser."""
    response.delete_cookie(site.cookie, httponly=True, samesite="strict")
    return Done()


@router.post("/api/session/renew")
def log_out_everywhere(
    response: Response, access: Annotated[Access, Depends(access)], site: Annotated[Site, Depends(site)]
) -> Done:
    """Take a new token: all sessions and links end, and only this browser gets a new session."""
    access.rotate()
    _set_cookie(response, access, site)
    return Done()


def _set_cookie(response: Response, access: Access, site: Site) -> None:
    response.set_cookie(site.cookie, access.session(), max_age=int(SESSION), httponly=True, samesite="strict")
