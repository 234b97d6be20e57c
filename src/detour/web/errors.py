"""What goes wrong, as an answer: JSON for the API, a page for the rest. Never a traceback, never what was sent.

{"error": "a sentence", "errors": [{"where": "config.process[0].train.lr", "place": "job.yaml:12", "message": "..."}]}
"""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from detour import UserError, files
from detour.config.document import JobError, dotted
from detour.files import DiskFullError
from detour.jobs.database import FolderGoneError
from detour.jobs.states import StateError, UnknownJobError
from detour.web.access import ThrottledError
from detour.web.headers import secure
from detour.web.pages import page

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fastapi import FastAPI
    from starlette.responses import Response


class MissingError(UserError):
    """What an address names is not there."""


STATUS: Mapping[type[UserError], int] = {
    MissingError: 404,
    UnknownJobError: 404,
    StateError: 409,
    ThrottledError: 429,
    FolderGoneError: 503,
    DiskFullError: 507,
}
"""Of the errors that are not simply wrong input (400)."""

OF_THE_ROUTER = {404: "there is nothing at this address", 405: "this address does not do that"}


def install(app: FastAPI) -> None:
    """Have these answer for all routes."""
    for kind, handler in (
        (UserError, _user_error),
        (RequestValidationError, _invalid),
        (HTTPException, _http),
        (OSError, _disk),
        (Exception, _unexpected),
    ):
        app.add_exception_handler(kind, handler)  # type: ignore[arg-type]  # starlette types them all as (.., Exception)


def answer(
    request: Request,
    status: int,
    message: str,
    errors: Sequence[Mapping[str, str]] = (),
    headers: Mapping[str, str] | None = None,
) -> Response:
    """An error in the form that fits the address."""
    if request.scope["path"].startswith("/api/"):
        content: dict[str, Any] = {"error": message}
        if errors:
            content["errors"] = list(errors)
        return JSONResponse(content, status, headers)
    if status == HTTPStatus.UNAUTHORIZED and not request.scope["path"].startswith("/static/"):
        return page(request, "login.html", status=status)
    shown = page(request, "error.html", status=status, code=status, title=HTTPStatus(status).phrase, message=message)
    shown.headers.update(headers or {})
    return shown


async def _user_error(request: Request, error: UserError) -> Response:
    status = next((STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), 400)
    errors = []
    if isinstance(error, JobError):
        errors = [{"where": dotted(found.key), "place": found.place, "message": found.what} for found in error.mistakes]
    headers = {"Retry-After": f"{error.seconds:.0f}"} if isinstance(error, ThrottledError) else None
    return answer(request, status, str(error), errors, headers)


async def _invalid(request: Request, error: RequestValidationError) -> Response:
    """A body or parameter of another shape than the API says. What was sent may be a secret, and is not repeated."""
    errors = [
        {"where": ".".join(str(part) for part in found["loc"] if part != "body"), "message": str(found["msg"])}
        for found in error.errors()
    ]
    first = f"{errors[0]['where']}: {errors[0]['message']}".removeprefix(": ") if errors else "not understood"
    return answer(request, 422, first, errors)


async def _http(request: Request, error: HTTPException) -> Response:
    message = str(error.detail)
    if message == HTTPStatus(error.status_code).phrase:  # from the router, which has no sentences
        message = OF_THE_ROUTER.get(error.status_code, message)
    return answer(request, error.status_code, message, headers=error.headers)


async def _disk(request: Request, error: OSError) -> Response:
    """A disk that is full or a folder that has gone, in a route that has no sentence of its own for it."""
    store = request.app.state.context.store
    try:
        store.check_there()
        with files.explained(store.folder):
            raise error
    except UserError as known:
        return await _user_error(request, known)
    except OSError:
        raise error from None


async def _unexpected(request: Request, error: Exception) -> Response:
    """A mistake of this program. The server's log gets the traceback, after this."""
    message = f"this failed unexpectedly ({type(error).__name__}); the terminal in which `detour ui` runs shows where"
    shown = answer(request, 500, message)
    secure(shown.headers)  # answers to these pass the guard by
    return shown
