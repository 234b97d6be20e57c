"""Every route that the app has, whoever added it: what it answers to strangers, what it changes, what it lets out.

A new route with a parameter that has no value in `VALUES` fails here: give it one that leads to something.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sqlite3
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from fastapi.routing import iter_route_contexts
from PIL import Image

import runs_made
import web_client
import web_jobs
from detour.jobs.store import Store
from detour.web.app import UPLOADS
from detour.web.guard import CHANGES, PUBLIC
from web_client import HOST, ORIGIN, TOKEN, Answer, ask, cookie

PACKAGE = Path(__file__).parents[2] / "src" / "detour"
WEB = PACKAGE / "web"
VALUES = {
    "job_id": "1", "process": "1", "step": "5", "index": "0", "export_id": "1-final-comfy.comfy",
    "/api/jobs/{job_id:number}/files": {"name": "zig.safetensors"},
    "name": "drawn", "file": "one.png", "key": "one.png",
}  # fmt: skip
"""Of parameters: for all routes, or for those whose path begins so."""
UNKNOWN = "unknown"
QUERIES = {"/compare": "a=1&b=2", "/api/compare": "a=1&b=2", "/jobs/new": "from=1"}
EVIL = "<img src=x onerror=alert(1)>"
HUB = "hf_aTokenThatNobodyShouldSee"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one of everything, and the worst in every text."""
    folder = tmp_path_factory.mktemp("census") / "folder"
    store = Store(folder, create=True)
    job = web_jobs.ended(store, web_jobs.add(store, note=EVIL), "failed", f"it says {EVIL}")
    web_jobs.add(store, "zag", note=EVIL)
    run = runs_made.whole(folder, [EVIL, "a zig"])
    run.warn(EVIL, 10, [EVIL])
    run.gate([EVIL])
    store.log_file(job).parent.mkdir(parents=True, exist_ok=True)
    store.log_file(job).write_text(f"{EVIL}\n" * 3)
    (folder / "jobs" / "1" / "job.yaml").write_text(store.text(1))
    for name in ("one", EVIL.replace("/", "")):
        (folder / "datasets" / "drawn").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 48), (200, 30, 30)).save(folder / "datasets" / "drawn" / f"{name}.png")
        (folder / "datasets" / "drawn" / f"{name}.txt").write_text(EVIL)
    (folder / "secret.txt").write_text("SECRET")
    (folder / "datasets" / "secret.txt").write_text("SECRET")
    (folder / "datasets" / "drawn-evil").mkdir()
    (folder / "datasets" / "drawn-evil" / "secret.txt").write_text("SECRET")
    store.hub_token.write_text(HUB)
    (folder / "ui.token").write_text(TOKEN)
    store.close()
    return folder


@pytest.fixture(scope="module")
def app(folder: Path) -> Any:
    return web_client.anonymous(folder).app


def filled(path: str, **instead: str) -> str:
    """A path with values for its parameters."""

    def value(match: re.Match[str]) -> str:
        name = match[1]
        own = next((VALUES[at] for at in VALUES if at.startswith("/") and path.startswith(at)), {})
        found = instead.get(name) or own.get(name) or VALUES.get(name)
        return quote(found or UNKNOWN)

    return re.sub(r"\{(\w+)(?::\w+)?\}", value, path)


def get(app: Any, path: str, **headers: str) -> Answer:
    query = QUERIES.get(path)
    address = filled(path) + (f"?{query}" if query else "")
    return ask(app, "GET", address, cookie(app) | headers, stream=0.2, patience=20)


def gets(app: Any) -> list[str]:
    return [path for method, path in web_client.routes(app) if method == "GET"]


# --- 1: strangers ---


def test_there_are_routes(app: Any) -> None:
    found = web_client.routes(app)
    assert len(found) > 30
    assert len({path.split("/")[1] for _, path in found}) >= 5
    assert all(context.methods or context.path == "/static" for context in iter_route_contexts(app.routes))


def test_strangers_get_nothing(app: Any) -> None:
    """Not even whether there is such a thing."""
    forged = {
        "none": {},
        "empty": {"Cookie": f"{app.state.site.cookie}="},
        "forged": {"Cookie": f"{app.state.site.cookie}=18eab8383f40889e-ebde9285803717d6-{'0' * 32}"},
        "a login code": {"Cookie": f"{app.state.site.cookie}={app.state.access.code()}"},
        "the token": {"Cookie": f"{app.state.site.cookie}={TOKEN}"},
        "an empty bearer": {"Authorization": "Bearer"},
        "basic": {"Authorization": f"Basic {TOKEN}"},
    }
    open_ones = set()
    for method, path in web_client.routes(app):
        for what, extra in forged.items():
            headers = {"Host": HOST, "Origin": ORIGIN, "Content-Type": "application/json"} | extra
            answer = ask(app, method, filled(path), headers, b"{}", client=f"{what} {method} {path}")
            if (method, path) in PUBLIC:
                open_ones.add((method, path))
            else:
                assert answer.status == 401, f"{method} {path} lets in a stranger with {what}"
                assert answer.header("set-cookie") is None
    assert open_ones == {one for one in PUBLIC if not one[1].startswith("/static/")} | {("GET", "/static/app.css")}


def test_what_is_open_is_this() -> None:
    assert {one for one in PUBLIC if not one[1].startswith("/static/")} == {
        ("GET", "/login"), ("POST", "/api/login"), ("GET", "/api/health"),
    }  # fmt: skip
    for _, path in PUBLIC:
        assert "{" not in path
        assert not path.startswith("/static/") or (WEB / path[1:]).is_file()


def test_every_page_names_an_icon_that_anybody_may_see(app: Any) -> None:
    """A browser that finds none named asks for /favicon.ico, and logs that there is none."""
    pages = [ask(app, "GET", "/login", {"Host": HOST}), get(app, "/jobs"), get(app, "/nowhere")]
    for page in pages:
        assert b'<link rel="icon" href="/static/icon.svg" type="image/svg+xml">' in page.body
    icon = ask(app, "GET", "/static/icon.svg", {"Host": HOST})
    assert (icon.status, icon.header("content-type")) == (200, "image/svg+xml")
    assert b"script" not in icon.body


@pytest.mark.parametrize(
    "path",
    [
        "/login%3F/../settings", "/static/app.css%3F/../settings.js", "/static/app.css/../settings.js",
        "/static/app.css%2F..%2Fsettings.js", "/static/../settings", "//login", "/login/", "/LOGIN", "/login%00",
        "/api/health/../settings", "/static/settings.js", "/static/plotly.min.js", "/login;/../settings", "/login%23",
        "/log%09in", "/static/%0Aapp.css",
    ],
)  # fmt: skip
def test_no_path_passes_for_an_open_one(app: Any, path: str) -> None:
    assert ask(app, "GET", path, {"Host": HOST}).status == 401


def test_every_change_by_cookie_needs_its_origin(app: Any, folder: Path) -> None:
    before = snapshot(folder)
    count = 0
    for method, path in web_client.routes(app):
        if method in CHANGES:
            count += 1
            for origin in ({}, {"Origin": "http://evil.test"}, {"Origin": "null"}):
                headers = cookie(app) | origin | {"Content-Type": "application/json", "Content-Length": "2"}
                assert ask(app, method, filled(path), headers, b"{}").status == 403, f"{method} {path}"
            headers = cookie(app) | {"Origin": ORIGIN, "Content-Type": "text/plain", "Content-Length": "2"}
            assert ask(app, method, filled(path), headers, b"{}").status == 415, f"{method} {path}"
    assert count > 10
    assert snapshot(folder) == before


def test_uploads_are_marked_and_take_no_json(app: Any) -> None:
    """A PUT without a JSON body takes a file, and stands in UPLOADS; nothing else does."""
    files = set()
    for context in iter_route_contexts(app.routes):
        if context.methods and "PUT" in context.methods and not context.original_route.dependant.body_params:
            files.add(context.path)
    assert files == set(UPLOADS)


# --- 3: looking changes nothing ---


def snapshot(folder: Path) -> dict[str, str]:
    """Everything on the disk, and what the store says; but for the cache and SQLite's working files."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name.split("/")[0] != "cache" and name not in ("queue.db-wal", "queue.db-shm"):
            content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
            found[name] = f"{content} {path.stat().st_mode:o} {path.stat().st_mtime_ns if path.is_file() else 0}"
    with sqlite3.connect(folder / "queue.db") as db:
        found["store"] = "\n".join(db.iterdump())
    db.close()
    return found


def test_looking_changes_nothing(app: Any, folder: Path) -> None:
    before = snapshot(folder)
    good = 0
    for path in gets(app):
        assert UNKNOWN not in filled(path), f"{path}: give its parameters a value in VALUES"
        answer = get(app, path)
        assert answer.status < 500, f"{path}: {answer.status} {answer.body[:300]!r}"
        assert answer.status in (200, 307) or path not in QUERIES, f"{path}: {answer.status} {answer.body[:300]!r}"
        good += answer.status in (200, 307)
        assert snapshot(folder) == before, path
    assert good > len(gets(app)) * 0.8, "most values in VALUES have to lead to something"


def test_no_address_fails_when_the_folder_has_gone(app: Any, folder: Path) -> None:
    """And none makes a new one."""
    elsewhere = folder.with_name("elsewhere")
    folder.rename(elsewhere)
    try:
        found = {path: get(app, path) for path in gets(app)}
        assert not folder.exists()
    finally:
        elsewhere.rename(folder)
    wrong = {path: (answer.status, answer.body[:200]) for path, answer in found.items() if answer.status == 500}
    assert wrong == {}
    assert sum(answer.status == 503 for answer in found.values()) > 10


def test_a_link_that_is_looked_at_stays_good(app: Any) -> None:
    """Mail programs and chats open links to show what is behind them."""
    code = app.state.access.code()
    for _ in range(3):
        answer = ask(app, "GET", f"/login?code={code}", {"Host": HOST})
        assert answer.status == 200
        assert answer.header("set-cookie") is None
        assert code.encode() not in answer.body
    assert app.state.access.log_in("1.2.3.4", code=code)


# --- 6: names that lead elsewhere ---

NAMES = [
    "..", "../secret.txt", "../../secret.txt", "..\\secret.txt", "%2e%2e%2fsecret.txt", "..%2fsecret.txt",
    "%252e%252e%252fsecret.txt", "....//secret.txt", "/etc/passwd", "//etc/passwd", "C:\\secret.txt", "C:secret.txt",
    "\\\\host\\secret.txt", "drawn/../../secret.txt", "drawn-evil/secret.txt", "secret.txt\x00.png", "drawn\x00", "con",
    "aux.png", "one.png.", "one.png ", "drawn.", " drawn", "a" * 300, "..;/secret.txt", "．．/secret.txt",
    "‥/secret.txt",
    "\n", ".", "-rf", "~", "$(id)", "queue.db", "ui.token", "\ud7ff\u202e",
]  # fmt: skip
NUMBERS = ["-1", "999", "9" * 30, "1e3", "0x1", "1.0", "１", "٣", " 1", "1;", "", "1/../2", "nan"]


def test_names_lead_nowhere_else(app: Any, folder: Path) -> None:
    before = snapshot(folder)
    count = 0
    for path in gets(app):
        for name, kind in re.findall(r"\{(\w+)(:\w+)?\}", path):
            for value in NUMBERS if kind == ":number" else NAMES:
                count += 1
                for address in (filled(path, **{name: value or " "}), path_as_it_is(path, name, value)):
                    answer = ask(app, "GET", address, cookie(app), stream=0.2)
                    assert answer.status in (404, 400, 422), f"{address}: {answer.status} {answer.body[:200]!r}"
                    for secret in (b"SECRET", b"root:", TOKEN.encode(), b"SQLite"):
                        assert secret not in answer.body, address
    assert count > 100
    assert snapshot(folder) == before


def path_as_it_is(path: str, name: str, value: str) -> str:
    """With a value that is not encoded, or was by whoever wrote it, as far as a request line can hold it."""
    place = re.sub(rf"\{{{name}(?::\w+)?\}}", lambda _: quote(value, safe="/%;:\\.$()~"), path)
    return filled(place).replace("?", "%3F")


# --- 15: what users wrote never becomes HTML ---

KINDS = (
    "application/json", "text/event-stream; charset=utf-8", "text/css; charset=utf-8", "text/javascript; charset=utf-8",
    "text/plain; charset=utf-8", "image/png", "image/jpeg", "image/webp", "application/octet-stream",
    "application/zip", "application/yaml", "text/markdown; charset=utf-8",
)  # fmt: skip


def test_what_users_wrote_never_becomes_html(app: Any) -> None:
    pages, shown = 0, 0
    for path in gets(app):
        answer = get(app, path)
        kind = answer.header("content-type") or ""
        shown += EVIL.encode() in answer.body
        if kind.startswith("text/html"):
            pages += 1
            assert EVIL.encode() not in answer.body, path
            assert b"<img src=x" not in answer.body, path
        else:
            assert kind in KINDS or not answer.body, f"{path}: {kind}"
    assert pages >= 3
    assert shown >= 2, "the folder has to hold what is tested for"


def test_errors_do_not_repeat_markup(app: Any) -> None:
    for path in (f"/{EVIL}", f"/jobs/{EVIL}", f"/datasets/{EVIL}"):
        answer = ask(app, "GET", quote(path), cookie(app))
        assert answer.status in (404, 400, 422)
        assert b"<img" not in answer.body


def test_templates_hold_no_script_and_switch_no_escaping_off() -> None:
    templates = sorted((WEB / "templates").glob("*"))
    assert len(templates) >= 4
    for template in templates:
        text = template.read_text(encoding="utf-8")
        for tag in re.findall(r"<script\b[^>]*>[^<]*", text, re.IGNORECASE):
            own = r'<script( (id="\w+"|defer|type="module"|src="/static/[\w.]+"))+>\s*'
            assert re.fullmatch(own, tag), f"{template.name}: {tag}"
            assert "src=" in tag, f"{template.name}: {tag}"
        for wrong in (
            r"\son\w+\s*=",
            r"javascript:",
            r"\|\s*safe\b",
            r"autoescape",
            r"Markup",
            r"srcdoc",
            r"\sstyle\s*=[^>]*{",
        ):
            assert not re.search(wrong, text, re.IGNORECASE), f"{template.name}: {wrong}"
        assert not re.search(r"""(src|href|action)\s*=\s*["']?(https?:)?//""", text), f"{template.name}: from elsewhere"


def test_scripts_make_no_html_and_load_nothing_from_elsewhere() -> None:
    scripts = sorted((WEB / "static").glob("*.js"))
    assert len(scripts) >= 4
    wrong = re.compile(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|createContextualFragment|DOMParser|setHTML|srcdoc"
        r"|\beval\b|\bFunction\s*\(|set(Timeout|Interval)\(\s*[\"'`]|javascript:|import\s*\(?\s*[\"'`]https?:|fetch\([\"'`]https?:"
    )
    for script in scripts:
        found = wrong.search(script.read_text(encoding="utf-8"))
        assert found is None, f"{script.name}: {found and found[0]}"
    for style in sorted((WEB / "static").glob("*.css")):
        assert not re.search(r"@import|url\(\s*[\"']?(https?:)?//", style.read_text(encoding="utf-8")), style.name


# --- 16: secrets ---


def test_no_answer_holds_a_secret(app: Any) -> None:
    session = cookie(app)["Cookie"].partition("=")[2]
    for path in gets(app):
        answer = get(app, path, Cookie=f"{app.state.site.cookie}={session}")
        said = answer.body + repr(answer.headers).encode()
        for secret in (TOKEN, HUB, session):
            assert secret.encode() not in said, path


# --- 14: nothing that runs what somebody wrote ---

CALLS = {
    "eval", "exec", "compile", "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput",
    "asyncio.create_subprocess_shell", "yaml.load", "yaml.unsafe_load", "torch.load",
}  # fmt: skip
MODULES = {"pickle", "cPickle", "dill", "marshal", "shelve", "joblib", "cloudpickle"}
SWITCHES = {
    ("shell", True), ("allow_pickle", True), ("trust_remote_code", True), ("weights_only", False),
    ("autoescape", False),
}  # fmt: skip


def test_nothing_in_the_package_runs_what_somebody_wrote() -> None:
    modules = sorted(PACKAGE.rglob("*.py"))
    assert len(modules) > 100
    wrong = []
    for module in modules:
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                switches = {(k.arg, k.value.value) for k in node.keywords if isinstance(k.value, ast.Constant)}
                banned = CALLS | {"Markup"} if WEB in module.parents else CALLS  # no HTML from text
                bad = ast.unparse(node.func) in banned or switches & SWITCHES
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None) or ""}
                bad = {name.split(".")[0] for name in names} & MODULES
            else:
                continue
            if bad:
                wrong.append(f"{module.relative_to(PACKAGE)}:{node.lineno}: {ast.unparse(node)[:90]}")
    assert wrong == []
