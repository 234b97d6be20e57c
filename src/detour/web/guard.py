"""What every request passes before any route sees it, and every answer on its way out. Deny by default.

A pure ASGI middleware: answers that are streamed pass through as they come, and nothing is exempt by its kind. In this
order: the host that was asked for (against DNS rebinding), the method, who asks, from which page (against forged
requests), and the kind and size of the body. Reasons: docs/ui.md.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection, Request
from starlette.routing import compile_path
from starlette.websockets import WebSocketClose

from detour.web.access import ThrottledError
from detour.web.errors import answer
from detour.web.headers import secure

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.responses import Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from detour.web.access import Access

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
SAFE = ("GET", "HEAD")
CHANGES = tuple(method for method in METHODS if method not in SAFE)
PUBLIC = frozenset(
    {
        ("GET", "/login"),
        ("POST", "/api/login"),
        ("GET", "/api/health"),
        # What the login page shows itself with: text of this program, the same for everybody.
        ("GET", "/static/app.css"),
        ("GET", "/static/app.js"),
        ("GET", "/static/icon.svg"),
        ("GET", "/static/theme.js"),
        ("GET", "/static/login.js"),
    }
)
"""What is answered without a login: methods and whole paths, never the beginning of a path."""
LARGEST_JSON = 1 << 24  # bytes of a request that is not an upload: ten times the captions of 10 000 pictures
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """Where the server can be reached."""

    port: int
    names: frozenset[str] = frozenset()
    """Further values of the `Host` header that are right, such as `gpu-box:8675`."""
    any_address: bool = False
    """Whether it listens on all addresses of the machine (`0.0.0.0`)."""

    @property
    def cookie(self) -> str:
        """The session cookie's name. Browsers keep the cookies of all ports of a host together."""
        return f"detour-{self.port}"

    def knows(self, host: str, server: tuple[str, int | None] | None) -> bool:
        """Whether a `Host` header names this server. A page elsewhere whose name leads here has its own name there."""
        host = host.lower()
        ours = [f"{name}:{self.port}" for name in LOOPBACK] + (list(LOOPBACK) if self.port == 80 else [])
        if host in ours or host in self.names:
            return True
        # The address, as digits, at which this connection came in: no other name can stand for that.
        return self.any_address and server is not None and host == _authority(server[0], self.port)


class _SessionEndedError(Exception):
    """All sessions were ended while an answer was being streamed."""


class Guard:
    """The middleware."""

    def __init__(self, app: ASGIApp, *, access: Access, site: Site, uploads: Sequence[str] = ()) -> None:
        """`uploads` are the paths, as routes write them, whose PUT takes a file (`application/octet-stream`)."""
        self.app = app
        self._access = access
        self._site = site
        self._uploads: list[re.Pattern[str]] = [compile_path(path)[0] for path in uploads]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request pass, or refuse it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] != "http":  # there are no WebSockets here
            await WebSocketClose(code=1008)(scope, receive, send)
        else:
            refusal = self._refusal(Request(scope))
            with contextlib.suppress(_SessionEndedError):
                await (self.app if refusal is None else refusal)(scope, receive, self._watched(send))

    def _watched(self, send: Send) -> Send:
        """`send` with the headers of all answers; it ends a stream of events when all sessions are ended."""
        generation, endless = self._access.generation, False

        async def watched(message: Message) -> None:
            nonlocal endless
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                secure(headers)
                endless = "content-length" not in headers
            elif endless and message.get("more_body") and self._access.generation != generation:
                await send({"type": "http.response.body", "body": b"", "more_body": False})
                raise _SessionEndedError
            await send(message)

        return watched

    def _refusal(self, request: Request) -> Response | None:
        hosts = request.headers.getlist("host")
        if len(hosts) != 1 or not self._site.knows(hosts[0], request.scope.get("server")):
            return answer(
                request, 421,
                "this address is not one of the server's; `detour ui --allow-host NAME` adds one",
            )  # fmt: skip
        if request.method not in METHODS:
            return answer(request, 405, f"{request.method} is not used here", headers={"Allow": ", ".join(METHODS)})
        bearer = _bearer(request.headers)
        try:
            known = self._known(request, bearer)
        except ThrottledError as error:
            return answer(request, 429, str(error), headers={"Retry-After": f"{error.seconds:.0f}"})
        # The path that the router will see; `request.url` is put together anew, and loses tabs: `/log%09in`.
        if not known and (request.method, request.scope["path"]) not in PUBLIC:
            return answer(request, 401, "log in first: open the link that `detour ui` shows")
        if not _same_origin(request, hosts[0], optional=known and bearer is not None):
            return answer(request, 403, "this request comes from another site's page; nothing was done")
        return None if request.method in SAFE else self._refused_body(request)

    def _known(self, request: Request, bearer: str | None) -> bool:
        if bearer is not None:
            return self._access.log_in(address_of(request), token=bearer)
        return self._access.is_session(request.cookies.get(self._site.cookie, ""))

    def _refused_body(self, request: Request) -> Response | None:
        upload = request.method == "PUT" and any(path.match(request.scope["path"]) for path in self._uploads)
        wanted = "application/octet-stream" if upload else "application/json"
        given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if given != wanted:
            return answer(request, 415, f"the body has to be {wanted} (Content-Type), not {given or 'nothing'}")
        if upload:
            return None  # the route counts what comes
        if "transfer-encoding" in request.headers:
            return answer(request, 411, "say how long the body is (Content-Length)")
        length = request.headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > LARGEST_JSON:
            return answer(request, 413, f"the body is too large: {LARGEST_JSON >> 20} MiB are allowed")
        return None


def address_of(connection: HTTPConnection) -> str:
    """Where a connection comes from. No header is believed, such as `X-Forwarded-For`."""
    return connection.client.host if connection.client is not None else ""


def _bearer(headers: Headers) -> str | None:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else None


def _same_origin(request: Request, host: str, *, optional: bool) -> bool:
    """Whether a request comes from one of our own pages, as far as the browser says.

    What changes something has to say so, unless it brings a token (`optional`): a browser sends none by itself.
    """
    site = request.headers.get("sec-fetch-site")
    if request.method in SAFE:
        opened = (request.headers.get("sec-fetch-mode"), request.headers.get("sec-fetch-dest"))
        return site in (None, "same-origin", "none") or opened == ("navigate", "document")  # a link may lead here
    origins = request.headers.getlist("origin")
    if not origins and optional:
        return site is None
    ours = (f"http://{host}", f"https://{host}")  # https: behind a proxy that adds it
    return len(origins) == 1 and origins[0].lower() in [one.lower() for one in ours] and site in (None, "same-origin")


def _authority(address: str, port: int) -> str | None:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return None
    return f"[{parsed}]:{port}" if parsed.version == 6 else f"{parsed}:{port}"
