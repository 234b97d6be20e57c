"""`detour ui` as a process: its beginning, its end, what stands in its way, and what must not be seen of it."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import webbrowser
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

import web_client
from command import detour
from detour import UserError
from detour.jobs import queue
from detour.jobs.store import Store
from detour.web import server
from detour.web.server import Keeper, Options
from queueing import SETTLED, Farm, farm, job_text, kill, until

has_display = server._has_display
COMMAND = [sys.executable, "-P", "-m", "detour", "ui", "--no-browser", "--port", "0"]


@pytest.fixture(autouse=True)
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, socket.socket]]:
    """What would be served in this process, instead of serving it: a guard that is gone must not leave a server."""
    found: list[tuple[Any, socket.socket]] = []
    monkeypatch.setattr(server, "_run", lambda app, listener: found.append((app, listener)))
    monkeypatch.setattr(server, "_has_display", lambda: False)
    return found


class Running:
    """A `detour ui` of its own."""

    def __init__(self, folder: Path, *options: str, cwd: Path | None = None, **environment: str) -> None:
        self.folder = folder
        own = {name: value for name, value in os.environ.items() if name != "DETOUR_TOKEN"} | environment
        self.errors = folder.parent / f"{folder.name}.stderr"
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [*COMMAND, "--folder", str(folder), *options],
                stdout=subprocess.PIPE, stderr=errors, text=True, env=own, cwd=cwd,
            )  # fmt: skip
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()
        found = re.search(r"http://(\S+?):(\d+)/login\?code=(\S+)", self.line)
        assert found, (self.line, self.errors.read_text())
        self.host, self.port, self.code = found[1], int(found[2]), found[3]
        self.cookie = ""

    @property
    def origin(self) -> str:
        return f"http://{self.host}:{self.port}"

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, dict[str, str]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        sent = {"Host": f"{self.host}:{self.port}", "Origin": self.origin, "Cookie": self.cookie}
        if body is not None:
            sent["Content-Type"] = "application/json"
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, None if body is None else json.dumps(body), sent)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        with contextlib.suppress(ValueError):
            content = json.loads(content)
        return answer.status, content, {name.lower(): value for name, value in answer.getheaders()}

    def log_in(self, code: str | None = None) -> None:
        status, _, headers = self.ask("POST", "/api/login", {"code": code or self.code})
        assert status == 200
        self.cookie = headers["set-cookie"].partition(";")[0]

    def end(self, number: signal.Signals = signal.SIGINT) -> tuple[int, str, str]:
        """Exit code and what was said."""
        self.process.send_signal(number)
        out, _ = self.process.communicate(timeout=60)
        return self.process.returncode, out, self.errors.read_text()


@contextlib.contextmanager
def running(folder: Path, *options: str, **environment: str) -> Iterator[Running]:
    here = Running(folder, *options, **environment)
    try:
        yield here
    finally:
        if here.process.poll() is None:
            here.process.kill()
            here.process.wait()


def everything_said(folder: Path) -> str:
    """All that processes of this folder have written for people."""
    texts = [path.read_text(errors="replace") for path in folder.rglob("*.log")]
    texts += [path.read_text(errors="replace") for path in folder.rglob("log-*.txt")]
    return "\n".join(texts)


# --- from beginning to end ------------------------------------------------------------------------------------------


def test_a_server_from_its_beginning_to_its_end(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    with running(folder) as here:
        assert here.host == "127.0.0.1"
        assert here.line.count("\n") == 1
        assert here.ask("GET", "/settings")[0] == 401
        assert here.ask("GET", f"/login?code={here.code}")[0] == 200
        here.log_in()
        assert here.ask("GET", "/settings")[0] == 200
        assert "server" not in here.ask("GET", "/settings")[2]

        check_modes(folder)  # group 20
        token = (folder / "ui.token").read_text().strip()
        listed = subprocess.run(["ps", "-axww", "-o", "args"], capture_output=True, text=True, check=True).stdout
        for secret in (token, here.code, here.cookie.partition("=")[2]):
            assert secret not in listed
        assert here.ask("GET", "/settings", Authorization=f"Bearer {token}")[0] == 200
        assert here.ask("GET", "/settings", Authorization=f"Basic {token}", Cookie="")[0] == 401

        # A second one for the same folder: refused, with the address of the first and a new link to it.
        second = detour("ui", "--folder", folder, "--no-browser", "--port", 0)
        assert second.code == 2
        assert f"(process {here.process.pid})" in second.err
        link = re.search(rf"{here.origin}/login\?code=(\S+)", second.err)
        assert link
        here.log_in(link[1])
        assert here.ask("GET", "/settings")[0] == 200

        # Who guesses is known by where the connection comes from, whatever headers say.
        guesses = [
            here.ask("POST", "/api/login", {"token": "guess"}, X_Forwarded_For=f"10.0.0.{number}")[0]
            for number in range(6)
        ]
        assert guesses == [401] * 5 + [429]

        code, out, errors = here.end()
        assert (code, out) == (0, "the UI is closed\n")
        assert errors == ""
    assert sorted(path.name for path in folder.iterdir() if not path.name.startswith("queue.db")) == [
        "create.lock", "ui.lock", "ui.token",
    ]  # fmt: skip
    for secret in (token, here.code):
        assert secret not in everything_said(tmp_path)


def check_modes(folder: Path) -> None:
    """Secrets and the jobs' texts are their owner's alone."""
    found = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    private = {name for name in found if name.startswith(("queue.db", "ui.token", "ui.json", "hub.token", "open-ui"))}
    assert {"queue.db", "queue.db-wal", "queue.db-shm", "ui.token", "ui.json"} <= private
    assert {found[name] for name in private} == {0o600}


def test_it_ends_in_good_order_while_pages_are_open(tmp_path: Path) -> None:
    """A page keeps a stream of events open for as long as it is shown."""
    with running(tmp_path / "folder") as here:
        here.log_in()
        store = Store(here.folder)
        store.add(job_text(here.folder, "zig"), cwd=here.folder, queued=False)
        stream = socket.create_connection(("127.0.0.1", here.port))
        asked = ["GET /api/jobs/1/events HTTP/1.1", f"Host: {here.host}:{here.port}", f"Cookie: {here.cookie}", "", ""]
        stream.sendall("\r\n".join(asked).encode())
        assert b"200 OK" in stream.recv(1000)
        began = time.monotonic()
        code, out, errors = here.end(signal.SIGTERM)
        assert time.monotonic() - began < 10
        assert (code, out) == (0, "the UI is closed\n")
        assert errors == ""
        stream.close()


def test_a_server_that_was_killed_is_no_hindrance(tmp_path: Path) -> None:
    with running(tmp_path / "folder") as here:
        here.log_in()
        cookie = here.cookie
        here.process.kill()
        here.process.wait()
        assert (here.folder / "ui.json").is_file()
    with running(tmp_path / "folder", "--port", str(here.port)) as again:
        again.cookie = cookie
        assert again.ask("GET", "/settings")[0] == 200, "sessions go on"
        assert again.ask("POST", "/api/login", {"code": here.code})[0] == 401, "old links do not"


@pytest.mark.slow
def test_jobs_go_on_when_the_ui_ends_and_their_states_are_right_when_it_begins(tmp_path: Path) -> None:
    with farm(tmp_path) as here:
        job = here.add(steps=500, pause=0.05, hold=3)
        here.worker()
        with running(here.folder) as ui:
            here.wait_step(job, 3)
            code, out, _ = ui.end()
        assert code == 0
        assert "the UI is closed; 1 job goes on" in out
        assert here.job(job).state == "running"
        with running(here.folder) as ui:
            ui.process.kill()
            ui.process.wait()
        now = here.job(job)
        assert now.state == "running"
        worker = here.store.worker()
        kill(worker)
        kill(now.supervisor)
        kill(now.process)
        began = time.monotonic()
        with running(here.folder) as ui:
            ui.log_in()
            assert ui.ask("GET", f"/api/jobs/{job.id}")[1]["state"] == "failed"
            assert time.monotonic() - began < SETTLED + 5  # of which the interpreter's start is most


# --- in the way -----------------------------------------------------------------------------------------------------


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        ran = detour("ui", "--folder", tmp_path / "folder", "--port", port)
    assert ran.code == 2
    assert f"port {port} of 127.0.0.1 is taken by another program" in ran.err
    assert f"detour ui --port {port + 1}" in ran.err
    assert not (tmp_path / "folder" / "ui.json").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--port", "65536"], "65536"),
        (["--port", "x"], "'x'"),
        (["--host", "192.0.2.1", "--token-file", "token"], "cannot listen there"),
        (["--host", "no-such-host.invalid", "--token-file", "token"], "cannot listen there"),
        (["--allow-host", "*"], "--allow-host *"),
        (["--allow-host", "http://a.test"], "no name of a host"),
        (["--comfyui", "."], "models/loras"),
    ],
)
def test_wrong_options(tmp_path: Path, options: list[str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ran = detour("ui", "--folder", tmp_path / "folder", "--no-browser", *options)
    assert ran.code == 2
    assert said in ran.err


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "gpu-box", "[::]", "localhost.evil.test"])
def test_other_machines_are_let_in_with_a_token_only(tmp_path: Path, host: str) -> None:
    """Group 18. Nothing is made, nothing is listened to."""
    ran = detour("ui", "--folder", tmp_path / "folder", "--host", host)
    assert ran.code == 2
    assert "DETOUR_TOKEN" in ran.err
    assert "--token-file" in ran.err
    assert not (tmp_path / "folder").exists()


def test_other_machines_are_not_let_in_with_a_weak_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for weak in ("", "password"):
        monkeypatch.setenv("DETOUR_TOKEN", weak)
        ran = detour("ui", "--folder", tmp_path / "folder", "--host", "0.0.0.0")
        assert ran.code == 2
        assert "at least 16" in ran.err


def test_with_a_token_other_machines_are_let_in(
    tmp_path: Path, started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DETOUR_TOKEN", "a" * 20)
    said: list[str] = []
    options = Options(host="0.0.0.0", port=0, folder=tmp_path / "f", allow_hosts=["GPU-box", "proxy.test:443"])
    assert server.serve(options, said.append) == 0
    site = started[0][0].state.site
    assert site.any_address
    assert site.names == {"gpu-box", f"gpu-box:{site.port}", "proxy.test:443"}
    assert not site.knows(f"0.0.0.0:{site.port}", ("192.168.1.7", site.port))
    assert site.knows(f"192.168.1.7:{site.port}", ("192.168.1.7", site.port))
    assert f"http://127.0.0.1:{site.port}/login?code=" in said[0]
    assert "DETOUR_TOKEN" not in os.environ
    assert not (tmp_path / "f" / "ui.token").exists()
    file = tmp_path / "token"
    server.serve(Options(host="0.0.0.0", port=0, folder=tmp_path / "f", token_file=file), said.append)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_loopback_by_default(tmp_path: Path, started: list[Any]) -> None:
    for host in ("127.0.0.1", "localhost"):
        server.serve(Options(host=host, port=0, folder=tmp_path / "f"), lambda _: None)
    assert Options().host == "127.0.0.1"
    assert not any(app.state.site.any_address for app, _ in started)


def test_the_socket_is_loopbacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    monkeypatch.setattr(server, "_run", lambda _, listener: names.append(listener.getsockname()[0]))
    server.serve(Options(port=0, folder=tmp_path / "f", browser=False), lambda _: None)
    assert names == ["127.0.0.1"]


def test_the_browser_gets_the_link_from_a_file_that_others_cannot_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its command line is everyone's to see."""
    opened, there = threading.Event(), []

    def open_(address: str) -> bool:
        file = Path(address.removeprefix("file://"))
        there.append((address, stat.S_IMODE(file.stat().st_mode), file.read_text()))
        opened.set()
        return True

    monkeypatch.setattr(webbrowser, "open", open_)
    monkeypatch.setattr(server, "_has_display", lambda: True)
    monkeypatch.setattr(server, "_run", lambda *_: opened.wait(10))
    server.serve(Options(port=0, folder=tmp_path / "f"), lambda _: None)
    ((address, mode, content),) = there
    assert "code" not in address
    assert mode == 0o600
    assert re.search(r'content="0; url=http://127\.0\.0\.1:\d+/login\?code=[\w-]+"', content)
    assert not (tmp_path / "f" / "open-ui.html").exists()
    server.serve(Options(port=0, folder=tmp_path / "f", browser=False), lambda _: None)
    assert len(there) == 1


def test_a_display_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SSH_CONNECTION", "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    assert not has_display()
    monkeypatch.setenv("WAYLAND_DISPLAY", "wayland-0")
    assert has_display()
    monkeypatch.setenv("SSH_CONNECTION", "10.0.0.1 1 10.0.0.2 22")
    assert not has_display()


# --- the keeper -----------------------------------------------------------------------------------------------------


def test_queued_jobs_get_a_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    brought: list[bool] = []
    monkeypatch.setattr(queue, "ensure_worker", lambda _store, *, wait: brought.append(wait))
    here = Farm(tmp_path)
    keeper = Keeper(here.store)
    keeper.tick()
    assert brought == [], "nothing waits"
    here.add()
    for _ in range(3):
        keeper.tick()
    assert brought == [False], "one attempt in a while"
    here.store.close()


def test_the_keeper_keeps_states_true_and_survives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server, "LOOK", 0.01)
    looks: list[int] = []

    def settle(_store: Store) -> None:
        looks.append(1)
        if len(looks) in (2, 3, 5):
            raise UserError("the disk is full")
        if len(looks) == 6:
            raise FileNotFoundError("gone")

    monkeypatch.setattr(queue, "settle", settle)
    here = Farm(tmp_path)
    with server._keeping(here.store):
        assert looks, "before the first page is shown"
        until(lambda: len(looks) > 10)
    assert [record.message for record in caplog.records] == ["the disk is full", "the disk is full", "gone"]
    count = len(looks)
    time.sleep(0.1)
    assert len(looks) == count
    here.store.close()


# --- 14: names that a shell would run -------------------------------------------------------------------------------


@pytest.mark.slow
def test_no_name_is_run(tmp_path: Path) -> None:
    """Through the server, a real worker and a real supervisor."""
    names = ["a; touch pwned1 #", "b $(touch pwned2)", "c `touch pwned3`", "d\ntouch pwned4", "e | tee pwned5 &", "-rf"]
    with farm(tmp_path) as here:
        client = web_client.signed_in(here.folder)
        jobs = [
            client.app.state.context.store.add(job_text(here.root, name, note=name), cwd=here.folder) for name in names
        ]
        here.worker()
        for job in jobs:
            assert here.wait(job, "finished", "failed").state == "finished", here.log(job)
        assert client.get("/api/jobs").status_code == 200
        assert not list(tmp_path.rglob("pwned?"))


def test_that_a_page_has_gone_is_not_worth_saying() -> None:
    def said(error: BaseException | None, text: str = "Exception in ASGI application") -> bool:
        found = (type(error), error, None) if error else None
        return server._is_worth_saying(logging.LogRecord("uvicorn.error", 40, "", 0, text, (), found))

    gone = BaseExceptionGroup("", [anyio.BrokenResourceError()])
    assert not said(gone)
    assert said(BaseExceptionGroup("", [anyio.BrokenResourceError(), ValueError()]))
    assert said(ValueError())
    assert said(None)
    assert not said(None, "Cancel 1 running task(s), timeout graceful shutdown exceeded")
