"""Over a real server: events arrive as they come, idle connections are kept alive, nothing is left of those that go."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fastapi.routing
import httpx
import pytest
import uvicorn

import web_client
from detour.jobs.states import Verdict
from detour.jobs.store import Store
from detour.web import live
from detour.web.access import Access
from detour.web.app import create_app
from detour.web.context import Context
from detour.web.guard import Site
from queueing import until
from web_jobs import add, begun, start, step, write


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[httpx.Client, Store]]:
    monkeypatch.setattr(fastapi.routing, "_PING_INTERVAL", 0.2)
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    store = Store(tmp_path, create=True)
    app = create_app(Context(store=store), Access(web_client.TOKEN), Site(port=port))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    headers = {"Authorization": f"Bearer {web_client.TOKEN}"}
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=20) as client:
        until(lambda: server.started, "the server")
        yield client, store
    server.should_exit = True
    thread.join(20)
    assert not thread.is_alive()  # open connections do not hold it
    store.close()


def test_events_arrive_as_they_come_and_silence_is_kept_alive(served: tuple[httpx.Client, Store]) -> None:
    client, store = served
    job = add(store)
    running = begun(store, job)
    write(job.run_folders[0], start())
    with client.stream("GET", f"/api/jobs/{job.id}/events") as answer:
        lines = answer.iter_lines()
        assert next(line for line in lines if line.startswith('data: {"type": "start"'))
        assert next(line for line in lines if line.startswith(":"))  # a comment, long before any event
        write(job.run_folders[0], step(1))
        wrote = time.monotonic()
        assert next(line for line in lines if line.startswith('data: {"type": "step"'))
        assert time.monotonic() - wrote < 10 * live.POLL
        store.conclude(running, Verdict("finished", "finished at step 1"))
        rest = list(lines)
    assert "event: done" in rest


def test_whoever_goes_is_forgotten(served: tuple[httpx.Client, Store], monkeypatch: pytest.MonkeyPatch) -> None:
    client, store = served
    job = begun(store, add(store))
    looked: list[float] = []
    original = live.Follower.look
    monkeypatch.setattr(live.Follower, "look", lambda self: looked.append(time.monotonic()) or original(self))
    monkeypatch.setattr(live.follow, "__defaults__", (0.02,))
    with client.stream("GET", f"/api/jobs/{job.id}/events") as answer:
        lines = answer.iter_lines()  # held: when it goes, so does the connection
        next(lines)
        until(lambda: len(looked) > 3, "looks")
    until(lambda: time.monotonic() - looked[-1] > 0.5, "the end of looking")
