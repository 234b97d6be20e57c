"""Curves and timeline: what the events say, thinned honestly, read bit by bit, dropped where a run went back."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

import web_client
from detour.web import curves, event_files, history
from detour.web.history import Histories, Reader
from web_jobs import T0, add, begun, end, ended, start, step, stop_event, store_of, write


@pytest.fixture
def client(tmp_path: Path) -> TestClient:
    return web_client.signed_in(tmp_path / "folder")


@pytest.fixture
def folder(client: TestClient) -> Path:
    """The run folder of job 1."""
    return add(store_of(client)).run_folders[0]


def ask(client: TestClient, **params: Any) -> dict[str, Any]:
    answer = client.get("/api/jobs/1/curves", params=params)
    assert answer.status_code == 200, answer.text
    return answer.json()


# --- figures ----------------------------------------------------------------------------------------------------------


def test_a_job_without_events_has_empty_curves(client: TestClient, folder: Path) -> None:
    found = ask(client)
    assert (found["steps"]["step"], found["bands"], found["complete"], found["process"]) == ([], None, True, 1)


def test_every_figure_of_every_step(client: TestClient, folder: Path) -> None:
    write(folder, start(total=7), step(1, 0.5), step(2, None, lr=2e-4, grad_norm=None), step(3, 0.25))
    found = ask(client)
    assert (found["arch"], found["total_steps"], found["reset"]) == ("zimage", 7, True)
    assert found["steps"] == {
        "step": [1, 2, 3], "time": [T0 + 1, T0 + 2, T0 + 3], "loss": [0.5, None, 0.25], "loss_mean": [0.5, None, 0.25],
        "lr": [1e-4, 2e-4, 1e-4], "grad_norm": [0.25, None, 0.25], "seconds": [0.75] * 3, "seconds_outside": [0.25] * 3,
        "memory_bytes": [2.0**30] * 3,
    }  # fmt: skip


def validation(number: int, loss: float, **by_time: float) -> dict[str, Any]:
    return {"type": "validation", "time": T0 + number, "step": number, "loss": loss,
            "by_time": {name.removeprefix("t"): value for name, value in by_time.items()}}  # fmt: skip


def drift(number: int, value: float, gap: float | None = None) -> dict[str, Any]:
    return {
        "type": "drift", "time": T0 + number, "step": number, "drift": value, "by_prompt": {"a": value}, "pixels": 0.1,
        "gap": gap, "gap_untouched": gap, "curvature": 0.2, "curvature_untouched": 0.1, "spread": 0.9,
        "alarm": value > 1,
    }  # fmt: skip


def test_validation_and_drift(client: TestClient, folder: Path) -> None:
    write(
        folder,
        start(),
        validation(0, 0.5, t025=0.4),
        validation(10, 0.3, t025=0.2, t1=0.4),
        drift(0, 0.0, 0.3),
        drift(10, 2),
    )
    found = ask(client)
    assert found["validation"] == {
        "step": [0, 10],
        "loss": [0.5, 0.3],
        "by_time": {"025": [0.4, 0.2], "1": [None, 0.4]},
    }
    assert found["drift"]["drift"] == [0.0, 2.0]
    assert found["drift"]["gap"] == [0.3, None]
    assert found["drift"]["alarm"] == [False, True]


def test_loss_by_band_of_times(client: TestClient, folder: Path) -> None:
    pictures = [
        (1, [[0.0, 1.0], [0.2499, 3.0]]),
        (2, [[0.25, 5.0], [1.0, 7.0]]),
        (3, [[0.75, 1.0], [0.5, None]]),
        (4, None),
    ]
    write(folder, start(), *(step(n, picture_losses=pairs) for n, pairs in pictures))
    bands = ask(client)["bands"]
    assert bands["edges"] == [0, 0.25, 0.5, 0.75, 1]
    assert bands["step"] == [1, 2, 3, 4]
    assert bands["loss"] == [[2, None, None, None], [None, 5, None, None], [None] * 4, [None, 7, 1, None]]
    assert bands["pictures"] == [[2, 0, 0, 0], [0, 1, 0, 0], [0] * 4, [0, 1, 1, 0]]


@given(st.lists(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 10)), max_size=4), min_size=1, max_size=300))
def test_bands_lose_no_picture(steps: list[list[tuple[float, float]]]) -> None:
    """Whatever the chunks: sums and numbers over a run are those of its pictures."""
    held = history.History()
    for number, pairs in enumerate(steps, 1):
        held.take(step(number, picture_losses=[list(pair) for pair in pairs]))
    found = curves._bands(held)
    every = [pair for pairs in steps for pair in pairs]
    if found is None:
        assert not every
        return
    assert len(found.step) <= curves.CHUNKS
    assert found.step[-1] == len(steps)
    assert sum(map(sum, found.pictures)) == len(every)
    cells = zip(itertools.chain(*found.loss), itertools.chain(*found.pictures), strict=True)
    total = sum((loss or 0) * count for loss, count in cells)
    assert total == pytest.approx(sum(loss for _, loss in every), abs=1e-9)


# --- thinned ----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 100), st.integers(0, 5000), st.integers(2, 2000))
def test_thinning_keeps_the_first_and_the_last(begin: int, count: int, points: int) -> None:
    chosen = curves.thinned(begin, begin + count, points)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == min(count, points)
    if count:
        assert (chosen[0], chosen[-1]) == (begin, begin + count - 1)
        gaps = [after - before for before, after in itertools.pairwise(chosen)]
        assert not gaps or max(gaps) - min(gaps) <= 1


def test_a_long_run_is_thinned_and_its_means_are_of_all_steps(
    client: TestClient, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history, "WORK", 60.0)
    losses = [math.sin(n) + 2 for n in range(1, 5001)]
    write(folder, start(total=5000), *(step(n, loss) for n, loss in enumerate(losses, 1)))
    found = ask(client)["steps"]
    assert len(found["step"]) == 2000
    assert (found["step"][0], found["step"][-1]) == (1, 5000)
    assert (found["loss"][0], found["loss"][-1]) == (losses[0], losses[-1])
    before = 0
    for number, mean in zip(found["step"], found["loss_mean"], strict=True):
        assert mean == pytest.approx(sum(losses[before:number]) / (number - before))
        before = number
    few = ask(client, points=10)["steps"]
    assert len(few["step"]) == 10


def test_a_very_long_run_fills_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "MOST_STEPS", 100)
    held = history.History()
    for number in range(1, 1001):
        held.take(step(number, float(number), picture_losses=[[0.1, 1.0]]))
        assert len(held.steps) <= 100
    assert held.steps.dropped > 0
    assert (held.steps.step[0], held.steps.step[-1]) == (1, 1000)
    assert held.steps.figures["loss"].tolist() == [float(number) for number in held.steps.step]
    assert sum(held.steps.counts[0]) == 1000


# --- a piece at a time ------------------------------------------------------------------------------------------------


def appended(one: Any, more: Any) -> Any:
    """What a page makes of two answers."""
    if isinstance(one, dict):
        return {name: appended(one[name], more[name]) for name in one}
    return one + more


def test_only_what_is_new_is_sent(client: TestClient, folder: Path) -> None:
    write(folder, start(), step(1), validation(1, 0.5, t1=0.5))
    first = ask(client)
    same = ask(client, since=first["cursor"])
    assert (same["reset"], same["steps"]["step"], same["validation"]["step"], same["cursor"]) == (
        False,
        [],
        [],
        first["cursor"],
    )
    write(folder, step(2), drift(2, 0.1), step(3), torn='{"type": "step", "st')
    more = ask(client, since=first["cursor"])
    assert more["reset"] is False
    assert more["steps"]["step"] == [2, 3]
    whole = ask(client)
    for part in ("steps", "drift"):
        assert appended(first[part], more[part]) == whole[part]
    assert appended(first["validation"]["step"], more["validation"]["step"]) == whole["validation"]["step"]


@pytest.mark.parametrize("nonsense", ["x", "0-0-0.1.1.1", "abc-1-0.999999999.0.0", "../etc", "0" * 100])
def test_a_cursor_of_something_else_gives_everything(client: TestClient, folder: Path, nonsense: str) -> None:
    write(folder, start(), step(1))
    found = ask(client, since=nonsense)
    assert (found["reset"], found["steps"]["step"]) == (True, [1])


def test_what_was_read_is_not_read_again(client: TestClient, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder, start(), *(step(n) for n in range(1, 500)))
    ask(client)
    taken: list[bytes] = []
    original = event_files.event
    monkeypatch.setattr(event_files, "event", lambda line: taken.append(line) or original(line))
    ask(client)
    assert taken == []
    write(folder, step(500))
    assert ask(client)["steps"]["step"][-1] == 500
    assert len(taken) == 1


def test_a_long_file_is_read_over_several_requests(
    client: TestClient, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(folder, start(), *(step(n) for n in range(1, 180)))
    monkeypatch.setattr(history, "WORK", 0.0)
    found = ask(client)
    assert (found["complete"], len(found["steps"]["step"])) == (False, 49)
    rounds, steps = 1, found["steps"]["step"]
    while not found["complete"]:
        found = ask(client, since=found["cursor"])
        steps += found["steps"]["step"]
        rounds += 1
    assert steps == list(range(1, 180))
    assert rounds == 4


def test_timeline_and_previews_of_a_long_file_say_that_more_is_to_come(
    client: TestClient, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {"type": "sample", "time": T0, "step": 90, "index": 0, "path": "p.png", "prompt": "a cat", "seed": 1}
    write(folder, start(), *(step(n) for n in range(1, 91)), told, end(90))
    monkeypatch.setattr(history, "WORK", 0.0)
    first = client.get("/api/jobs/1/timeline").json()
    assert (first["complete"], first["moments"][-1]["kind"]) == (False, "start")
    assert client.get("/api/jobs/1/samples").json()["complete"] is True
    last = client.get("/api/jobs/1/timeline").json()
    assert (last["complete"], last["moments"][-1]["kind"]) == (True, "end")


def test_a_piece_is_measured_in_work_and_not_in_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is busy with something else reads as much at once."""
    write(folder, start(), *(step(n) for n in range(1, 500)))
    reader = Reader(folder / "events.jsonl")
    waited = iter(range(10**6))
    monkeypatch.setattr(history.time, "monotonic", lambda: next(waited))
    monkeypatch.setattr(history.time, "thread_time", lambda: 0.0)
    reader.update()
    assert reader.complete


@settings(deadline=None)  # it writes files, on machines that are busy
@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(1, 6)), min_size=1, max_size=6), st.lists(st.integers(1, 400))
)
def test_a_page_that_asks_now_and_then_has_what_one_has_that_asks_at_the_end(
    sessions: list[tuple[int, int]], asks: list[int]
) -> None:
    """Runs that are killed, go back and go on; the page asks after any number of bytes."""
    import tempfile

    lines, at = [], 0
    for back, count in sessions:
        at = max(0, at - back)
        lines.append(json.dumps(start(at)))
        for _ in range(count):
            at += 1
            lines.append(json.dumps(step(at, at + len(lines))))
    data = ("\n".join(lines) + "\n").encode()
    with tempfile.TemporaryDirectory() as root:
        path = Path(root) / "events.jsonl"
        path.touch()
        reader, page, version, count = Reader(path), list[tuple[int, float]](), "", 0
        for size in [*asks, len(data)]:
            with path.open("ab") as file:
                file.write(data[path.stat().st_size :][:size])
            reader.update()
            held = reader.history
            if held.version != version:
                page, count = [], 0
            page += list(zip(held.steps.step, held.steps.figures["loss"], strict=True))[count:]
            version, count = held.version, len(held.steps)
        fresh = Reader(path)
        fresh.update()
        assert page == list(zip(fresh.history.steps.step, fresh.history.steps.figures["loss"], strict=True))
        assert [number for number, _ in page] == list(range(1, at + 1))


# --- runs that went back, and files that are replaced -----------------------------------------------------------------


def test_steps_that_are_done_again_replace_those_before(client: TestClient, folder: Path) -> None:
    write(folder, start(), validation(0, 1.0), *(step(n, 0.5) for n in range(1, 8)), validation(5, 0.9), drift(6, 0.2))
    before = ask(client)
    write(folder, start(5), step(6, 0.1))
    found = ask(client, since=before["cursor"])
    write(folder, *(step(n) for n in range(7, 12)), validation(10, 0.8), drift(10, 0.1))
    later = ask(client, since=before["cursor"])  # more points than before, and others
    assert (later["reset"], later["steps"]["step"]) == (True, list(range(1, 12)))
    assert found["reset"] is True
    assert found["steps"]["step"] == [1, 2, 3, 4, 5, 6]
    assert found["steps"]["loss"] == [0.5] * 5 + [0.1]
    assert found["validation"]["step"] == [0, 5]
    assert found["drift"]["step"] == []


def test_a_run_that_was_started_afresh_forgets_the_old_one(client: TestClient, folder: Path) -> None:
    path = write(folder, start(), step(1), step(2))
    before = ask(client)
    path.rename(folder / "old")
    assert ask(client, since=before["cursor"])["steps"]["step"] == []  # gone for a while
    write(folder, start(total=9, at=T0 + 99), step(1))
    found = ask(client, since=before["cursor"])
    assert (found["reset"], found["steps"]["step"], found["total_steps"]) == (True, [1], 9)


def test_histories_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "MOST_RUNS", 3)
    monkeypatch.setattr(history, "MOST_IN_ALL", 100)
    kept = Histories()
    for number in range(9):
        write(tmp_path / str(number), start(), *(step(n) for n in range(1, 41)))
        kept.of(tmp_path / str(number) / "events.jsonl").update()
        assert len(kept._kept) <= 3
    kept.of(tmp_path / "8" / "events.jsonl")
    assert sum(reader.history.size for reader in kept._kept.values()) <= 100
    assert kept.of(tmp_path / "8" / "events.jsonl").history.steps.step[-1] == 40


def test_several_processes(client: TestClient) -> None:
    store = store_of(client)
    from queueing import job_text

    text = json.loads(job_text(store.folder))
    text["config"]["process"] *= 2
    job = add(store, text=json.dumps(text))
    write(job.run_folders[0], start(), step(1))
    write(job.run_folders[1], start(), step(1), step(2))
    import os

    os.utime(job.run_folders[0] / "events.jsonl", (1, 1))
    assert (ask(client)["process"], ask(client)["processes"]) == (2, 2)
    assert ask(client, process=1)["steps"]["step"] == [1]
    assert client.get("/api/jobs/1/curves", params={"process": 3}).status_code == 404


# --- the timeline -----------------------------------------------------------------------------------------------------


def moments(client: TestClient) -> list[dict[str, Any]]:
    answer = client.get("/api/jobs/1/timeline")
    assert answer.headers["content-type"] == "application/json"
    return answer.json()["moments"]


def test_the_timeline_tells_what_happened(client: TestClient, folder: Path) -> None:
    store = store_of(client)
    hostile = "<img src=x onerror=alert(1)>"
    begun(store, store.job(1))
    write(
        folder,
        *({"type": "stage", "time": T0 + n / 10, "name": "latents", "done": n, "total": 30} for n in range(31)),
        start(at=T0 + 4),
        {"type": "save", "time": T0 + 5, "step": 0, "checkpoint": "/x/checkpoints/step-000000000", "lora": None},
        step(1),
        {"type": "warning", "time": T0 + 6, "step": 1, "message": hostile, "details": ["a"] * 80},
        step(2),
        start(1, at=T0 + 7),
        {"type": "save", "time": T0 + 8, "step": 2, "checkpoint": "c\\step-000000002",
         "lora": "/o/zig-000000002.safetensors", "proof": "48 layers"},
        stop_event(2),
        end(2, "stop requested"),
    )  # fmt: skip
    store.conclude(store.job(1), outcome())
    found = moments(client)
    assert [(moment["kind"], moment["text"]) for moment in found] == [
        ("created", "added to the queue"),
        ("stage", "latents: 30 of 30, in 3 s"),
        ("start", "starts: 100 steps in all"),
        ("save", "saved step-000000000"),
        ("warning", hostile),
        ("broke_off", "broke off without a word: it was killed, or failed (the log tells)"),
        ("start", "goes on at step 1: 100 steps in all"),
        ("save", "saved step-000000002 and zig-000000002.safetensors"),
        ("stop", "asked to stop, and saves first: stop requested"),
        ("end", "ended after 2 s: stop requested"),
        ("verdict", "stopped and saved at step 2"),
    ]
    warning = next(moment for moment in found if moment["kind"] == "warning")
    assert (len(warning["details"]), warning["details"][-1]) == (51, "and 30 more")
    assert next(moment for moment in found if moment["text"].startswith("saved step-000000002"))["details"] == [
        "48 layers"
    ]


def outcome() -> Any:
    from detour.jobs.states import Verdict

    return Verdict("stopped", "stopped and saved at step 2", 130)


def test_the_teacher_gate_and_a_plateau_are_told(client: TestClient, folder: Path) -> None:
    found = {
        "type": "gate", "time": T0, "step": 0, "passed": False, "gain": -0.01, "gain_error": 0.02, "gap": 0.5,
        "colour": [0.1, None, 0.0], "frame": "moved up", "reasons": ["it is no help"], "path": "C:\\gate.png",
    }  # fmt: skip
    plateau = {"type": "plateau", "time": T0 + 1, "step": 9, "reason": "it has stopped falling"}
    write(folder, start(), found, plateau, found | {"colour": 7})
    moments = client.get("/api/jobs/1/timeline").json()["moments"][2:]
    assert [moment["kind"] for moment in moments] == ["gate", "plateau", "gate"]
    assert "not passed" in moments[0]["text"]
    said = "\n".join(moments[0]["details"])
    for part in ("-1.0%", "2.0%", "red +0.10, green not finite, blue +0.00", "moved up", "it is no help"):
        assert part in said
    assert "it has stopped falling" in moments[1]["text"]
    assert ("damaged" in moments[2]["text"], moments[2]["details"]) == (True, [])


def test_a_long_timeline_says_what_it_leaves_out(client: TestClient, folder: Path) -> None:
    warnings = [{"type": "warning", "time": T0 + n, "step": n, "message": str(n), "details": []} for n in range(1300)]
    write(folder, *warnings)
    answer = client.get("/api/jobs/1/timeline").json()
    assert (answer["left_out"], len(answer["moments"])) == (300, 1001)


def test_odd_values_are_no_trouble(client: TestClient, folder: Path) -> None:
    """Whoever edits an event file gets no wrong page for it."""
    write(
        folder,
        {"type": "start"},
        {"type": "step", "step": 1, "loss": "<b>", "picture_losses": [[1], "x", [True, 2], 7]},
        {"type": "step"},
        {"type": "validation", "step": 1, "by_time": 3},
        {"type": "drift", "step": 1},
        {"type": "sample", "step": 1},
        {"type": "warning", "details": 3},
        {"type": "stage"},
        {"type": "save"},
        {"type": "end"},
        {"type": "stop"},
        {"type": "unheard of"},
    )
    found = ask(client)
    assert (found["steps"]["step"], found["steps"]["loss"]) == ([1], [None])
    assert len(moments(client)) == 8
    assert client.get("/api/jobs/1/samples").status_code == 200
    assert client.get("/api/jobs/1").status_code == 200
    ended(store_of(client), store_of(client).job(1))
    assert client.get("/api/jobs/1/events").status_code == 200
