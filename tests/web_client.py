"""A browser in the middle of a session, for the tests of pages and API.

    client = web_client.signed_in(tmp_path)
    client.get("/jobs"); client.post("/api/...", json={...}); client.app.state.context.store

What changes something is sent as JSON unless said otherwise; uploads say
`client.put(address, content=data, headers=web_client.UPLOAD)`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from fastapi.routing import iter_route_contexts
from starlette.testclient import TestClient

from detour.jobs.store import Store
from detour.web.access import Access
from detour.web.app import create_app
from detour.web.context import Context
from detour.web.guard import Site

TOKEN = "a-token-that-the-tests-know"
PORT = 8675
HOST = f"127.0.0.1:{PORT}"
ORIGIN = f"http://{HOST}"
UPLOAD = {"Content-Type": "application/octet-stream"}


def anonymous(folder: Path, **values: Any) -> TestClient:
    """A browser that has not logged in. `values` are further ones of the context."""
    context = Context(store=Store(folder, create=True), **values)
    app = create_app(context, Access(TOKEN), Site(port=PORT))
    return TestClient(app, base_url=ORIGIN, headers={"Origin": ORIGIN, "Content-Type": "application/json"})


def signed_in(folder: Path, **values: Any) -> TestClient:
    """A browser with a session."""
    client = anonymous(folder, **values)
    client.cookies.set(client.app.state.site.cookie, client.app.state.access.session())
    return client


@dataclass
class Answer:
    """What came back of a request that was given to the app itself."""

    status: int = 0
    headers: list[tuple[str, str]] = field(default_factory=list)
    body: bytes = b""
    ended: bool = False
    """False: it was still being streamed when the patience was over."""

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key == name), None)


def ask(
    app: Any,
    method: str,
    path: str,
    headers: Mapping[str, str] | Sequence[tuple[str, str]] = (),
    body: bytes = b"",
    *,
    client: str = "127.0.0.1",
    server: tuple[str, int] = ("127.0.0.1", PORT),
    patience: float = 5.0,
    stream: float = 0.3,
) -> Answer:
    """Ask without a client library in between: any header, twice if need be, and `path` as it comes over the wire.

    Whoever streams for longer than `stream` seconds after its first bytes is left.
    """
    pairs = list(headers.items() if isinstance(headers, Mapping) else headers)
    raw, _, query = path.partition("?")
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": unquote(raw),
        "raw_path": raw.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [(key.lower().encode(), value.encode("latin-1")) for key, value in pairs],
        "client": (client, 50000),
        "server": server,
    }
    answer = Answer()
    left = asyncio.Event()
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Any:
        if messages:
            return messages.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            answer.status = message["status"]
            answer.headers = [(key.decode().lower(), value.decode("latin-1")) for key, value in message["headers"]]
        else:
            answer.body += message.get("body", b"")
            answer.ended = not message.get("more_body", False)
            if not answer.ended:
                asyncio.get_running_loop().call_later(stream, left.set)

    async def run() -> None:
        task = asyncio.create_task(app(scope, receive, send))
        await asyncio.wait([task], timeout=patience)
        if not task.done():
            task.cancel()
        failed = (await asyncio.gather(task, return_exceptions=True))[0]
        if isinstance(failed, Exception) and answer.status != 500:  # those are raised once more, for the log
            raise failed

    asyncio.run(run())
    return answer


def cookie(app: Any) -> dict[str, str]:
    """The headers of a browser with a session, on a page of ours."""
    return {"Host": HOST, "Cookie": f"{app.state.site.cookie}={app.state.access.session()}"}


def routes(app: Any) -> list[tuple[str, str]]:
    """(method, path with its parameters' names) of everything that the app answers, mounts included."""
    found = []
    for context in iter_route_contexts(app.routes):
        methods = context.methods or {"GET"}  # a mount: of static files
        path = context.path if context.methods else f"{context.path}/app.css"
        found += [(method, path) for method in sorted(methods)]
    return found
