"""How far jobs are, from the ends of their event files, and how much work a list of many jobs is."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

import web_client
from detour.web import progress
from web_jobs import T0, add, begun, end, ended, start, step, stop_event, store_of, write


@pytest.fixture
def client(tmp_path: Path) -> TestClient:
    return web_client.signed_in(tmp_path / "folder")


def listed(client: TestClient, **params: Any) -> dict[str, Any]:
    answer = client.get("/api/jobs", params=params)
    assert answer.status_code == 200, answer.text
    return answer.json()


# --- how far ----------------------------------------------------------------------------------------------------------


def far(client: TestClient, job: Any) -> dict[str, Any]:
    return client.get(f"/api/jobs/{job.id}").json()["progress"]


def test_how_far_a_job_is(client: TestClient) -> None:
    store = store_of(client)
    job = add(store, queued=True)
    assert far(client, job) is None
    begun(store, job)
    write(job.run_folders[0], start(total=100), *(step(n) for n in range(1, 11)))
    found = far(client, job)
    assert (found["step"], found["total_steps"], found["seconds_per_step"]) == (10, 100, 0.75)
    assert found["seconds_left"] == pytest.approx(90.0)  # the events are a second apart
    assert found["stage"] is None
    write(job.run_folders[0], start(5, total=30), step(6, seconds=2.0), torn='{"type": "step", "step": 9')
    found = far(client, job)
    assert (found["step"], found["total_steps"], found["seconds_per_step"]) == (6, 30, 2.0)


def test_the_beginning_is_found_far_back_and_not_sought_again(client: TestClient, monkeypatch: Any) -> None:
    monkeypatch.setattr(progress, "_BLOCK", 1000)
    store = store_of(client)
    job = add(store, queued=True)
    begun(store, job)
    many = [step(n) for n in range(1, 400)]
    write(job.run_folders[0], start(total=1000), *many)
    assert far(client, job)["total_steps"] == 1000
    sought: list[int] = []
    original = progress._last_start
    monkeypatch.setattr(
        progress, "_last_start", lambda file, size, far: sought.append(far) or original(file, size, far)
    )
    write(job.run_folders[0], step(400))
    found = far(client, job)
    assert (found["step"], found["total_steps"]) == (400, 1000)
    assert sought[0] < 2 * progress.TAIL[True]  # not through the whole file
    write(job.run_folders[0], start(300, total=2000), *(step(n) for n in range(301, 700)))
    assert far(client, job)["total_steps"] == 2000  # a new beginning that is further back than the tail


@pytest.mark.parametrize("block", [17, 50, 1000, 1 << 20])
@pytest.mark.parametrize("before", range(0, 60, 7))
def test_a_beginning_across_two_blocks(tmp_path: Path, monkeypatch: Any, before: int, block: int) -> None:
    monkeypatch.setattr(progress, "_BLOCK", block)
    path = write(tmp_path, {"type": "x" * before}, start(total=77), *(step(n) for n in range(1, 4)))
    with path.open("rb") as file:
        assert progress._last_start(file, path.stat().st_size, 1 << 20) == 77
        assert progress._last_start(file, path.stat().st_size, 100) is None


def test_long_warnings_do_not_hide_the_step(client: TestClient) -> None:
    store = store_of(client)
    job = add(store, queued=True)
    begun(store, job)
    warning = {"type": "warning", "time": T0, "step": 2, "message": "m", "details": ["x" * 40_000]}
    write(job.run_folders[0], start(), step(1), step(2), warning)
    assert far(client, job)["step"] == 2


def test_a_job_that_has_ended_has_no_time_left(client: TestClient) -> None:
    store = store_of(client)
    job = add(store, queued=True)
    write(job.run_folders[0], start(), step(1), step(2), stop_event(2), end(2, "stop requested"))
    ended(store, job, "stopped", "stopped and saved at step 2")
    found = far(client, job)
    assert (found["step"], found["total_steps"], found["seconds_left"]) == (2, 100, None)
    again = add(store, "other")
    write(again.run_folders[0], step(99), end(100))
    assert far(client, again)["total_steps"] == 100  # finished: all of them


# --- a thousand -------------------------------------------------------------------------------------------------------

_opened: list[list[str]] = []
"""Those who want to know: an audit hook cannot be taken away again."""


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _opened and event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
        _opened[-1].append(os.fsdecode(arguments[0]))


sys.addaudithook(_audit)


@contextlib.contextmanager
def files_opened() -> Iterator[list[str]]:
    """Every file that is opened meanwhile."""
    _opened.append([])
    try:
        yield _opened[-1]
    finally:
        _opened.pop()


def test_a_list_opens_the_files_of_what_it_shows_and_those_once(client: TestClient) -> None:
    store = store_of(client)
    line = json.dumps(start()) + "\n" + json.dumps(step(1)) + "\n"
    with store._database.transaction() as db:
        for number in range(1, 1001):
            folder = store.folder / "output" / str(number)
            folder.mkdir(parents=True)
            (folder / "events.jsonl").write_text(line)
            db.execute(
                "INSERT INTO job (name, device, state, reason, source, cwd, run_folders, attempts, stops, created) "
                "VALUES (?, 'cpu', 'stopped', 'x', 'null', '\"/\"', ?, 0, 0, ?)",
                (f"job {number}", json.dumps([str(folder)]), float(number)),
            )
    with files_opened() as opened:
        found = listed(client)
        assert (found["total"], len(found["jobs"])) == (1000, 50)
        assert len(opened) <= 50, opened[:60]
        opened.clear()
        listed(client)
        assert opened == []
        write(store.folder / "output" / "990", step(2))
        opened.clear()
        listed(client)
        assert [Path(path).parts[-2:] for path in opened] == [("990", "events.jsonl")]
