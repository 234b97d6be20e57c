"""The guard: hosts, methods, origins, content types, sizes, headers, streams. Numbers of groups: docs/security.md."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from fastapi import WebSocket
from fastapi.responses import StreamingResponse
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

import web_client
from detour.jobs.store import Store
from detour.web.access import Access
from detour.web.app import create_app
from detour.web.context import Context
from detour.web.guard import LARGEST_JSON, Guard, Site
from detour.web.headers import CONTENT_SECURITY_POLICY
from web_client import HOST, ORIGIN, PORT, TOKEN, ask, cookie

JSON = {"Content-Type": "application/json"}
CHANGING = ("POST", "PUT", "PATCH", "DELETE")


@pytest.fixture(scope="module")
def one_app(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return made(tmp_path_factory.mktemp("guarded"))


def made(folder: Path) -> Any:
    app = web_client.anonymous(folder).app
    app.state.changes = changes = []
    for method in CHANGING:
        app.add_api_route(f"/api/try/{method}", lambda method=method: changes.append(method), methods=[method])
    return app


@pytest.fixture
def app(one_app: Any) -> Any:
    """An app, the same for all tests, with a route for each method that changes something."""
    one_app.state.changes.clear()
    return one_app


@pytest.fixture
def own_app(tmp_path: Path) -> Any:
    """One to which routes can be added."""
    return made(tmp_path)


def change(app: Any, method: str = "POST", body: bytes = b"{}", **headers: str | None) -> web_client.Answer:
    """A change as one of our own pages asks for it, but for these headers (`None`: without)."""
    sent = cookie(app) | {"Origin": ORIGIN, "Content-Length": str(len(body))} | JSON
    sent |= {name.replace("_", "-"): value for name, value in headers.items()}
    return ask(app, method, f"/api/try/{method}", {k: v for k, v in sent.items() if v is not None}, body)


# --- 2: only our own pages change anything ---

FOREIGN = {
    "none": None,
    "foreign": "http://evil.test",
    "null": "null",
    "another port": f"http://127.0.0.1:{PORT + 1}",
    "no port": "http://127.0.0.1",
    "another of our names": f"http://localhost:{PORT}",
    "beginning": f"http://{HOST}.evil.test",
    "user": f"http://{HOST}@evil.test",
    "another scheme": f"file://{HOST}",
    "path": f"{ORIGIN}/",
}


@pytest.mark.parametrize("method", CHANGING)
@pytest.mark.parametrize("origin", FOREIGN)
def test_what_changes_something_must_come_from_our_own_page(app: Any, method: str, origin: str) -> None:
    assert change(app, method, Origin=FOREIGN[origin]).status == 403
    assert app.state.changes == []
    assert change(app, method).status == 200
    assert app.state.changes == [method]


@pytest.mark.parametrize("method", CHANGING)
@pytest.mark.parametrize("site", ["cross-site", "same-site", "none"])
def test_what_the_browser_says_of_the_page_counts_too(app: Any, method: str, site: str) -> None:
    assert change(app, method, Sec_Fetch_Site=site).status == 403
    assert app.state.changes == []
    assert change(app, method, Sec_Fetch_Site="same-origin").status == 200


def test_two_origins_are_none(app: Any) -> None:
    headers = [*cookie(app).items(), *JSON.items(), ("Origin", ORIGIN), ("Origin", "http://evil.test")]
    assert ask(app, "POST", "/api/try/POST", headers, b"{}").status == 403


def test_a_login_from_another_page_is_refused(app: Any) -> None:
    """Else a page could log a browser in to somebody else's session."""
    headers = {"Host": HOST, "Origin": "http://evil.test"} | JSON
    assert ask(app, "POST", "/api/login", headers, b'{"token": "%s"}' % TOKEN.encode()).status == 403


def test_a_script_with_the_token_needs_no_origin(app: Any) -> None:
    """No browser sends a token by itself; where there is a browser, its origin counts."""
    script = {"Cookie": None, "Authorization": f"Bearer {TOKEN}"}
    assert change(app, Origin=None, **script).status == 200
    assert change(app, Origin="http://evil.test", **script).status == 403
    assert change(app, Origin=None, Sec_Fetch_Site="cross-site", **script).status == 403
    assert change(app, Origin=None, Cookie=None, Authorization="Bearer wrong").status == 401
    assert app.state.changes == ["POST"]


def test_a_wrong_token_is_not_made_good_by_a_cookie(app: Any) -> None:
    assert change(app, Authorization="Bearer wrong").status == 401


@pytest.mark.parametrize(
    ("site", "mode", "dest", "status"),
    [
        ("same-origin", "cors", "empty", 200),
        ("none", "navigate", "document", 200),
        ("cross-site", "navigate", "document", 200),  # a link in a mail; a Strict cookie does not even come with it
        ("cross-site", "no-cors", "image", 403),
        ("same-site", "no-cors", "script", 403),  # another port of this machine
        ("same-site", "navigate", "iframe", 403),
    ],
)
def test_other_pages_can_lead_here_but_not_use_what_is_here(
    app: Any, site: str, mode: str, dest: str, status: int
) -> None:
    said = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": mode, "Sec-Fetch-Dest": dest}
    assert ask(app, "GET", "/api/settings", cookie(app) | said).status == status


def test_web_sockets_are_refused(own_app: Any) -> None:
    @own_app.websocket("/api/socket")
    async def socket(websocket: WebSocket) -> None:
        await websocket.accept()

    client = TestClient(own_app, base_url=ORIGIN, headers={"Origin": ORIGIN})
    client.cookies.set(own_app.state.site.cookie, own_app.state.access.session())
    with pytest.raises(WebSocketDisconnect), client.websocket_connect("/api/socket"):
        pass


# --- 4: the host, against names that come to mean this machine ---

WRONG_HOSTS = [
    "evil.test",
    f"evil.test:{PORT}",
    f"127.0.0.1.evil.test:{PORT}",
    f"127.0.0.1.:{PORT}",
    f"localhost.:{PORT}",
    "127.0.0.1",
    f"{HOST}0",
    f"{HOST}.evil.test",
    "localhost",
    f"127.0.0.1:{PORT + 1}",
    f"127.0.0.1:0{PORT}",
    f"127.1:{PORT}",
    f"2130706433:{PORT}",
    f"0.0.0.0:{PORT}",
    f"[::]:{PORT}",
    f"[::ffff:127.0.0.1]:{PORT}",
    f"::1:{PORT}",
    f"192.168.1.7:{PORT}",
    f"user@{HOST}",
    "",
]


@pytest.mark.parametrize("host", WRONG_HOSTS)
@pytest.mark.parametrize("path", ["/settings", "/api/settings", "/login", "/api/health", "/static/app.css"])
def test_another_host_is_refused_everywhere(app: Any, host: str, path: str) -> None:
    assert ask(app, "GET", path, cookie(app) | {"Host": host}).status == 421


def test_hosts_that_are_ours(app: Any) -> None:
    for host in (HOST, f"localhost:{PORT}", f"LOCALHOST:{PORT}", f"[::1]:{PORT}"):
        assert ask(app, "GET", "/settings", cookie(app) | {"Host": host}).status == 200
    assert ask(app, "GET", "/settings", [("Host", HOST), ("Host", "evil.test")]).status == 421
    assert ask(app, "GET", "/settings").status == 421


def test_a_site_knows_the_names_it_was_given() -> None:
    lan = ("192.168.1.7", PORT)
    site = Site(port=PORT, names=frozenset({f"gpu-box:{PORT}", "gpu-box"}))
    assert site.knows(f"GPU-box:{PORT}", lan)
    assert site.knows("gpu-box", lan)
    assert not site.knows(f"gpu-box.evil.test:{PORT}", lan)
    assert not site.knows(f"192.168.1.7:{PORT}", lan)
    everywhere = Site(port=PORT, any_address=True)
    assert everywhere.knows(f"192.168.1.7:{PORT}", lan)
    assert not everywhere.knows(f"192.168.1.8:{PORT}", lan)
    assert not everywhere.knows(f"gpu-box:{PORT}", ("gpu-box", PORT))
    assert everywhere.knows(f"[fd00::2]:{PORT}", ("fd00::2", PORT))
    assert not everywhere.knows(f"192.168.1.7:{PORT}", None)
    assert Site(port=80).knows("localhost", None)


def test_cookies_of_two_servers_of_a_machine_differ() -> None:
    """A browser sends the cookies of a host to all its ports."""
    assert Site(port=1).cookie != Site(port=2).cookie


# --- methods ---


@pytest.mark.parametrize("method", ["OPTIONS", "TRACE", "CONNECT", "PROPFIND", "post", "X"])
def test_other_methods_are_refused(app: Any, method: str) -> None:
    answer = ask(app, method, "/api/settings", cookie(app) | {"Origin": ORIGIN} | JSON)
    assert answer.status == 405
    assert answer.header("allow") == "GET, HEAD, POST, PUT, PATCH, DELETE"


def test_other_origins_are_told_nothing(app: Any) -> None:
    """No CORS at all: neither asked before (OPTIONS) nor after."""
    asked = {"Origin": "http://evil.test", "Access-Control-Request-Method": "POST"}
    for method, path in (("OPTIONS", "/api/settings"), ("GET", "/api/settings"), ("GET", "/api/health")):
        names = [name for name, _ in ask(app, method, path, cookie(app) | asked).headers]
        assert not [name for name in names if name.startswith("access-control")]


# --- 5: what forms of other pages can send ---

SIMPLE = (
    None,
    "",
    "text/plain",
    "text/plain; application/json",
    "application/x-www-form-urlencoded",
    "multipart/form-data; boundary=x",
    "application/octet-stream",
    "application/jsonx",
    "application/json, text/plain",
)


@pytest.mark.parametrize("method", CHANGING)
@pytest.mark.parametrize("kind", SIMPLE)
def test_changes_take_only_json(app: Any, method: str, kind: str | None) -> None:
    assert change(app, method, Content_Type=kind).status == 415
    assert app.state.changes == []
    assert change(app, method, Content_Type="Application/JSON; charset=utf-8").status == 200


def test_uploads_take_only_files() -> None:
    reached: list[str] = []

    async def route(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope["path"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    access, site = Access(TOKEN), Site(port=PORT)
    guard = Guard(route, access=access, site=site, uploads=["/api/things/{name}/files/{file}"])
    page = {"Host": HOST, "Origin": ORIGIN, "Cookie": f"{site.cookie}={access.session()}"}
    upload, place = {"Content-Type": "application/octet-stream"}, "/api/things/a%20b/files/c.png"
    assert ask(guard, "PUT", place, page | upload | {"Transfer-Encoding": "chunked"}).status == 200
    assert ask(guard, "PUT", place, page | upload | {"Content-Length": str(1 << 40)}).status == 200
    for kind in (None, "application/json", "text/plain", "multipart/form-data; boundary=x"):
        assert ask(guard, "PUT", place, page | ({} if kind is None else {"Content-Type": kind})).status == 415
    for method, elsewhere in (("POST", place), ("PUT", "/api/things/a/files"), ("PUT", f"{place}/more")):
        assert ask(guard, method, elsewhere, page | upload).status == 415
    assert reached == ["/api/things/a b/files/c.png"] * 2


def test_a_body_that_is_not_an_upload_is_small_and_says_so(app: Any) -> None:
    assert change(app, Content_Length=str(LARGEST_JSON)).status == 200
    assert change(app, Content_Length=str(LARGEST_JSON + 1)).status == 413
    assert change(app, Content_Length="-1").status == 413
    assert change(app, Content_Length=None, Transfer_Encoding="chunked").status == 411
    assert app.state.changes == ["POST"]


# --- 15: headers ---


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/settings", 200), ("/login", 200), ("/api/settings", 200), ("/static/app.js", 200), ("/", 307),
        ("/nothing", 404), ("/api/nothing", 404), ("/static/nothing.js", 404), ("/api/try/POST", 405),
    ],
)  # fmt: skip
def test_every_answer_has_the_headers(app: Any, path: str, status: int) -> None:
    check_headers(ask(app, "GET", path, cookie(app)), status)


def test_refusals_and_failures_have_the_headers_too(own_app: Any) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    own_app.add_api_route("/api/fail", fail)
    check_headers(ask(own_app, "GET", "/settings", {"Host": "evil.test"}), 421)
    check_headers(ask(own_app, "GET", "/settings", {"Host": HOST}), 401)
    check_headers(ask(own_app, "BREW", "/settings", {"Host": HOST}), 405)
    check_headers(change(own_app, Origin=None), 403)
    check_headers(change(own_app, Content_Type="text/plain"), 415)
    client = TestClient(own_app, base_url=ORIGIN, headers=cookie(own_app), raise_server_exceptions=False)
    failed = client.get("/api/fail")
    check_headers(web_client.Answer(failed.status_code, list(failed.headers.items())), 500)


def check_headers(answer: web_client.Answer, status: int) -> None:
    assert answer.status == status
    assert answer.header("content-security-policy") == CONTENT_SECURITY_POLICY
    assert answer.header("x-content-type-options") == "nosniff"
    assert answer.header("x-frame-options") == "DENY"
    assert answer.header("referrer-policy") == "no-referrer"
    assert answer.header("cross-origin-opener-policy") == "same-origin"
    assert answer.header("cross-origin-resource-policy") == "same-origin"
    assert answer.header("cache-control")
    assert answer.header("server") is None


def test_the_policy_lets_no_script_in() -> None:
    rules = dict(rule.split(" ", 1) for rule in CONTENT_SECURITY_POLICY.split("; "))
    assert rules["default-src"] == rules["script-src"] == "'self'"
    assert rules["frame-ancestors"] == rules["object-src"] == rules["base-uri"] == "'none'"
    assert "http" not in CONTENT_SECURITY_POLICY
    assert "unsafe-eval" not in CONTENT_SECURITY_POLICY


def test_a_route_cannot_loosen_the_policy(own_app: Any) -> None:
    from fastapi import Response

    def loose() -> Response:
        return Response("", headers={"Content-Security-Policy": "default-src *", "Cache-Control": "max-age=60"})

    own_app.add_api_route("/api/loose", loose)
    answer = ask(own_app, "GET", "/api/loose", cookie(own_app))
    assert [value for name, value in answer.headers if name == "content-security-policy"] == [CONTENT_SECURITY_POLICY]
    assert answer.header("cache-control") == "max-age=60"


# --- streams ---


def streaming(app: Any) -> list[str]:
    seen: list[str] = []

    async def stream() -> Any:
        try:
            while True:
                yield b"data: 1\n\n"
                await asyncio.sleep(0.02)
        finally:
            seen.append("over")

    app.add_api_route("/api/stream", lambda: StreamingResponse(stream(), media_type="text/event-stream"))
    return seen


def test_streams_are_guarded_and_pass_as_they_come(own_app: Any) -> None:
    seen = streaming(own_app)
    assert ask(own_app, "GET", "/api/stream", {"Host": HOST}).status == 401
    assert ask(own_app, "GET", "/api/stream", cookie(own_app) | {"Host": "evil.test"}).status == 421
    assert seen == []
    answer = ask(own_app, "GET", "/api/stream", cookie(own_app))
    assert answer.body.count(b"data") > 3
    check_headers(answer, 200)
    assert seen == ["over"]


def test_streams_end_with_their_session(tmp_path: Path) -> None:
    access = Access(TOKEN, tmp_path / "token")
    app = create_app(Context(store=Store(tmp_path / "queue", create=True)), access, Site(port=PORT))
    seen = streaming(app)
    sent: list[bytes] = []

    async def watch() -> bool:
        async def receive() -> Any:
            await asyncio.sleep(60)

        async def send(message: Any) -> None:
            sent.append(message.get("body", b""))
            if len(sent) == 4:
                access.rotate()

        headers = [(name.lower().encode(), value.encode()) for name, value in cookie(app).items()]
        scope = {
            "type": "http", "method": "GET", "path": "/api/stream", "query_string": b"", "headers": headers,
            "asgi": {"spec_version": "2.3"}, "server": ("127.0.0.1", PORT), "client": ("127.0.0.1", 1),
        }  # fmt: skip
        await asyncio.wait_for(app(scope, receive, send), 10)
        return True

    assert asyncio.run(watch())
    assert seen == ["over"]
    assert sent[-1] == b""
    assert len(sent) == 5
