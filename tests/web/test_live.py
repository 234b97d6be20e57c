"""Server-sent events: every event once and in order, wherever a client lost its connection, whatever the files do."""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
from fastapi.sse import ServerSentEvent
from hypothesis import given, settings
from hypothesis import strategies as st

import web_client
from detour.jobs.store import Store
from detour.web import event_files, live
from detour.web.event_files import Mark
from detour.web.live import Follower, Position
from web_jobs import add, begun, end, ended, start, step, store_of, write


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "folder", create=True)


def read_all(folders: list[Path], position: Position | None = None, most: int = 3) -> list[tuple[str, Position]]:
    """Everything behind a place, a few at a time."""
    found: list[tuple[str, Position]] = []
    position = position or Position.start(folders)
    while True:
        taken = live.take(folders, position, most)
        assert not taken.replaced
        if not taken.events:
            return found
        found += taken.events
        position = found[-1][1]


def steps(events: list[tuple[str, Position]]) -> list[int]:
    return [json.loads(text)["step"] for text, _ in events]


# --- places -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.sampled_from(["", "0123456789ab"]), st.integers(0, 10**12)), min_size=1, max_size=4))
def test_a_place_is_written_and_read(marks: list[tuple[str, int]]) -> None:
    position = Position(tuple(Mark(*mark) for mark in marks))
    assert Position.parse(str(position)) == position


@pytest.mark.parametrize("text", ["", "x", "0-", "0--1", "0-1_", "../..-1", "0123456789ab-1;", "0-1 ", "0-" + "9" * 16])
def test_what_is_no_place(text: str) -> None:
    assert Position.parse(text) is None


# --- the same sequence from every place -------------------------------------------------------------------------------

RUNS = st.lists(
    st.lists(st.text(st.characters(codec="utf-8"), max_size=12), max_size=7), min_size=1, max_size=3
)  # the notes of the events of each process of a job


@settings(max_examples=60, deadline=None)
@given(RUNS, st.randoms(use_true_random=False))
def test_from_every_place_the_same_events_follow(runs: list[list[str]], random: Any) -> None:
    """Of several processes whose events alternate, with a line that is not finished at the end of each file."""
    with tempfile.TemporaryDirectory() as root:
        _check_every_place([Path(root) / str(index) for index in range(len(runs))], runs, random)


def _check_every_place(folders: list[Path], runs: list[list[str]], random: Any) -> None:
    order = [index for index, notes in enumerate(runs) for _ in notes]
    random.shuffle(order)
    left = [list(notes) for notes in runs]
    written = []
    for time, index in enumerate(order):
        note = left[index].pop(0)
        write(folders[index], {"type": "stage", "time": float(time), "name": note, "done": time, "total": 9})
        written.append(time)
    for folder in folders:
        write(folder, torn='{"type": "step", "time": 0.0, "st')
    whole = read_all(folders)
    assert [json.loads(text)["done"] for text, _ in whole] == written
    for at, (_, position) in enumerate(whole):
        again = Position.parse(str(position))
        assert read_all(folders, again, most=1 + at % 4) == whole[at + 1 :]
    assert Position.end(folders) == (whole[-1][1] if whole else Position.start(folders))
    assert read_all(folders, Position.end(folders)) == []


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60), max_size=40), st.integers(1, 12))
def test_a_file_that_grows_byte_by_byte(sizes: list[int], count: int) -> None:
    """Whatever is there of a line when somebody looks: each event comes once, when it is whole."""
    with tempfile.TemporaryDirectory() as folder:
        _check_growth(Path(folder), sizes, count)


def _check_growth(folder: Path, sizes: list[int], count: int) -> None:
    lines = [json.dumps({"type": "warning", "time": n, "step": n, "message": "ä<b>"}) + "\n" for n in range(count)]
    data = "".join(lines).encode()
    path = write(folder)
    seen: list[tuple[str, Position]] = []
    position, at = Position.start([folder]), 0
    for size in [*sizes, len(data)]:
        with path.open("ab") as file:
            file.write(data[at : at + size])
        at += size
        taken = live.take([folder], position)
        assert not taken.replaced
        assert len(seen) + len(taken.events) == data[:at].count(b"\n")
        seen += taken.events
        position = seen[-1][1] if seen else position
    assert steps(seen) == list(range(count))


def test_a_damaged_line_is_named_and_the_rest_follows(tmp_path: Path) -> None:
    path = write(tmp_path, start())
    with path.open("ab") as file:
        file.write(b"\xff<img src=x onerror=alert(1)>\n[1]\n")
    write(tmp_path, step(1))
    events = [json.loads(text) for text, _ in read_all([tmp_path])]
    assert [event["type"] for event in events] == ["start", "warning", "warning", "step"]
    assert "is not an event" in events[1]["message"]
    assert "<img src=x" in events[1]["details"][0]


def test_a_line_without_end_fills_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_files, "LONGEST", 1000)
    path = write(tmp_path, start())
    with path.open("ab") as file:
        file.write(b"x" * 5000)
    assert len(read_all([tmp_path])) == 1  # it may still be written
    write(tmp_path, {}, step(1))
    whole = read_all([tmp_path])
    assert [json.loads(text)["type"] for text, _ in whole] == ["start", "warning", "step"]
    assert read_all([tmp_path], whole[1][1]) == whole[2:]


# --- files that are replaced ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["moved aside", "cut", "another, longer", "edited", "another, as long"])
def test_another_file_in_its_place_begins_anew(tmp_path: Path, how: str) -> None:
    path = write(tmp_path, start(), *map(step, range(1, 5)))
    behind = read_all([tmp_path])[-1][1]
    if how == "cut":
        path.write_bytes(path.read_bytes()[:300])
    elif how == "edited":
        path.write_bytes(path.read_bytes().replace(b"0.75", b"0.7"))
    elif how == "another, as long":
        path.write_bytes(path.read_bytes().replace(b'"total_steps": 100', b'"total_steps": 200'))
    else:
        path.rename(tmp_path / "old")
        assert live.take([tmp_path], behind).events == []
        assert not live.take([tmp_path], behind).replaced  # it may come back: a disk that is not there for a while
        write(tmp_path, start(total=7), *(map(step, range(1, 9)) if how == "another, longer" else ()))
    assert live.take([tmp_path], behind).replaced


def test_a_folder_that_was_away_or_moved_goes_on(tmp_path: Path) -> None:
    write(tmp_path / "run", start(), step(1))
    behind = read_all([tmp_path / "run"])[-1][1]
    (tmp_path / "run").rename(tmp_path / "other")
    write(tmp_path / "other", step(2))
    assert steps(read_all([tmp_path / "other"], behind)) == [2]


def test_a_place_within_a_line_is_none(tmp_path: Path) -> None:
    write(tmp_path, start(), step(1))
    whole = read_all([tmp_path])[0][1].marks[0]
    assert live.take([tmp_path], Position((Mark(whole.beginning, whole.offset + 5),))).replaced
    assert live.take([tmp_path], Position((Mark(whole.beginning, 10**9),))).replaced


def test_another_number_of_processes_begins_anew(tmp_path: Path) -> None:
    write(tmp_path / "a", start())
    behind = read_all([tmp_path / "a"])[-1][1]
    assert live.take([tmp_path / "a", tmp_path / "b"], behind).replaced


# --- a job ------------------------------------------------------------------------------------------------------------


def collected(store: Store, job_id: int, position: Position, *, meanwhile: Any = None) -> list[ServerSentEvent]:
    """What a client gets until the end; `meanwhile` runs in a thread of its own from the first message on."""
    thread = threading.Thread(target=meanwhile or (lambda: None))

    async def everything() -> list[ServerSentEvent]:
        found = []
        async for message in live.follow(Follower(store, job_id, position), poll=0.005):
            if not found:
                thread.start()
            found.append(message)
        return found

    found = asyncio.run(asyncio.wait_for(everything(), 30))
    thread.join()
    return found


def kinds(messages: list[ServerSentEvent]) -> list[str]:
    return [message.event or json.loads(str(message.raw_data))["type"] for message in messages]


def test_a_job_is_followed_through_a_stop_and_a_new_start_to_its_end(store: Store) -> None:
    job = add(store)
    folder = job.run_folders[0]
    running = begun(store, job)
    write(folder, start(), step(1))

    def go_on() -> None:
        write(folder, step(2), torn='{"type": "st')
        path = folder / "events.jsonl"
        os.truncate(path, path.stat().st_size - len('{"type": "st'))  # as the next process mends it
        store.ask_stop(job.id)
        write(folder, start(1), step(2), end(2))
        store.conclude(running, outcome("stopped", "stopped and saved at step 2"))

    messages = collected(store, job.id, Position.start([folder]), meanwhile=go_on)
    found = kinds(messages)
    assert [kind for kind in found if kind != "state"] == ["start", "step", "step", "start", "step", "end", "done"]
    states = [message.data["state"] for message in messages if message.event == "state"]
    assert states[0] == "running"
    assert states[-1] == "stopped"
    assert messages[-1].data["reason"] == "stopped and saved at step 2"
    events = [message for message in messages if message.id]
    for at, message in enumerate(events):
        rest = collected(store, job.id, Position.parse(str(message.id)))
        assert [(m.id, m.raw_data) for m in rest if m.id] == [(m.id, m.raw_data) for m in events[at + 1 :]]


def outcome(cause: Any, reason: str) -> Any:
    from detour.jobs.states import Verdict

    return Verdict(cause, reason, 0)


def test_a_run_started_afresh_is_told_from_its_beginning(store: Store) -> None:
    job = add(store)
    folder = job.run_folders[0]
    running = begun(store, job)
    write(folder, start(), step(1), step(2))

    def afresh() -> None:
        (folder / "events.jsonl").rename(folder / "old")
        write(folder, start(total=9), step(1))
        store.conclude(running, outcome("finished", "finished at step 1"))

    messages = collected(store, job.id, Position.end([folder]), meanwhile=afresh)
    assert [kind for kind in kinds(messages) if kind != "state"] == ["reset", "start", "step", "done"]
    reset = next(message for message in messages if message.event == "reset")
    assert reset.id == "0-0"  # who is cut off right behind it misses nothing


def test_a_job_that_is_deleted(store: Store) -> None:
    job = add(store)
    running = begun(store, job)

    def delete() -> None:
        store.conclude(running, outcome("stopped", "stopped"))
        store.delete(job.id)

    messages = collected(store, job.id, Position.start(job.run_folders), meanwhile=delete)
    assert kinds(messages)[-1] in ("gone", "done")
    follower = Follower(store, job.id, None)

    async def first() -> ServerSentEvent:
        return await anext(live.follow(follower))

    assert asyncio.run(first()).event == "gone"


def test_an_idle_follower_opens_no_file(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    job = add(store)
    write(job.run_folders[0], start(), step(1))
    follower = Follower(store, job.id, Position.start(job.run_folders))
    assert len(follower.look().taken.events) == 2
    assert follower.look().taken.events == []
    opened: list[Path] = []
    original = event_files.opened
    monkeypatch.setattr(event_files, "opened", lambda path: opened.append(path) or original(path))
    for _ in range(5):
        assert follower.look().taken.events == []
    assert opened == []
    write(job.run_folders[0], step(2))
    assert len(follower.look().taken.events) == 1
    assert len(opened) == 1


def test_what_is_read_at_once_is_bounded(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    job = add(store)
    write(job.run_folders[0], start(), *(step(n) for n in range(1, 1200)))
    follower = Follower(store, job.id, Position.start(job.run_folders))
    sizes = []
    while events := follower.look().taken.events:
        sizes.append(len(events))
    assert (sizes, sum(sizes)) == ([500, 500, 200], 1200)
    monkeypatch.setattr(live, "PIECE_BYTES", 1000)
    again = Follower(store, job.id, Position.start(job.run_folders))
    assert len(again.look().taken.events) < 10


# --- over HTTP --------------------------------------------------------------------------------------------------------


def parsed(body: str) -> list[dict[str, str]]:
    """The messages of a stream, comments left out."""
    found = []
    for block in body.split("\n\n"):
        lines = [line.partition(": ") for line in block.splitlines() if line and not line.startswith(":")]
        if lines:
            found.append({name: value for name, _, value in lines})
    return found


def test_over_http_a_client_goes_on_where_it_was(tmp_path: Path) -> None:
    client = web_client.signed_in(tmp_path)
    store = store_of(client)
    job = ended(store, add(store))
    hostile = "<img src=x onerror=alert(1)>\n\ndata: {}\n\nid: 7"
    write(job.run_folders[0], start(), {"type": "warning", "time": 1.0, "step": 0, "message": hostile}, step(1), end(1))
    address = f"/api/jobs/{job.id}/events"
    answer = client.get(address)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache"
    messages = parsed(answer.text)
    assert [message.get("event", "") for message in messages] == ["state", "", "", "", "", "done"]
    assert json.loads(messages[2]["data"])["message"] == hostile
    ids = [message["id"] for message in messages if "id" in message]
    for at, place in enumerate(ids):
        for again in (
            client.get(address, headers={"Last-Event-ID": place}),
            client.get(address, params={"since": place}),
            client.get(address, params={"since": "end"}, headers={"Last-Event-ID": place}),
        ):
            assert [message["id"] for message in parsed(again.text) if "id" in message] == ids[at + 1 :]
    assert "id" not in str([list(message) for message in parsed(client.get(address, params={"since": "end"}).text)])
    nonsense = parsed(client.get(address, headers={"Last-Event-ID": "../../etc/passwd"}).text)
    assert [message["event"] for message in nonsense if "event" in message] == ["state", "reset", "done"]
    assert len([message for message in nonsense if "id" in message]) == len(ids) + 1
    assert client.get("/api/jobs/99/events").status_code == 404
