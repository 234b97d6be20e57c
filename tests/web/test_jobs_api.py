"""The API of the queue: what it shows, what it does, what it refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

import web_client
from detour import UserError
from detour.config.document import MAX_BYTES
from detour.config.load import load_text
from detour.jobs import queue
from detour.jobs import store as jobs_store
from detour.jobs.states import Verdict
from queueing import job_text
from web_jobs import T0, add, begun, ended, start, step, store_of, write


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    """No worker comes up: what is queued stays queued."""
    monkeypatch.setattr(queue, "ensure_worker", lambda store, **options: None)
    client = web_client.signed_in(tmp_path / "folder")
    yield client
    store_of(client).close()


def listed(client: TestClient, **params: Any) -> dict[str, Any]:
    answer = client.get("/api/jobs", params=params)
    assert answer.status_code == 200, answer.text
    return answer.json()


def ids(client: TestClient, **params: Any) -> list[int]:
    return [job["id"] for job in listed(client, **params)["jobs"]]


def post(client: TestClient, address: str, body: Any = None, status: int = 200) -> dict[str, Any]:
    answer = client.post(address, json={} if body is None else body)
    assert answer.status_code == status, answer.text
    return answer.json()


def written(folder: Path, **train: Any) -> str:
    """A job file as people write it."""
    options = "".join(f"        {name}: {value}  # mine\n" for name, value in train.items())
    return f"""\
# what I want
config:
  output_name: zig
  output_folder: {folder}/output   # here
  process:
    - type: train
      device: cpu
      model: {{arch: zimage}}
      train:
        lr: 0.0002   # not too much
{options}      datasets:
        - folder_path: {folder}/pictures
"""


# --- the list ---------------------------------------------------------------------------------------------------------


def test_an_empty_queue(client: TestClient) -> None:
    found = listed(client)
    assert (found["jobs"], found["total"], found["devices"], found["worker"]) == ([], 0, [], False)
    assert set(found["counts"].values()) == {0}


def test_jobs_come_by_device_and_place_and_then_the_newest_end(client: TestClient) -> None:
    store = store_of(client)
    first, second = (ended(store, add(store, name)) for name in ("a", "b"))
    waiting = [
        add(store, name, queued=True, device=device) for name, device in (("c", "mps"), ("d", "cpu"), ("e", "cpu"))
    ]
    running = begun(store, waiting[1])
    draft = add(store, "draft")
    store.move(add(store, "f", queued=True).id, 1)
    assert ids(client) == [running.id, 7, waiting[2].id, waiting[0].id, draft.id, second.id, first.id]
    found = listed(client)
    assert found["devices"] == [
        {"name": "cpu", "at_work": running.id, "queued": 2},
        {"name": "mps", "at_work": None, "queued": 1},
    ]
    assert found["counts"] == {
        "queued": 3, "starting": 0, "running": 1, "stopping": 0, "finished": 2, "stopped": 1, "failed": 0,
    }  # fmt: skip
    assert [job["position"] for job in found["jobs"]][:4] == [None, 1, 2, 1]


def test_a_page_a_filter_and_a_search(client: TestClient) -> None:
    store = store_of(client)
    for number in range(7):
        add(store, f"Zig {number}")
    failed = ended(store, add(store, "other"), "failed", "failed (exit code 1): <img src=x onerror=alert(1)>")
    assert len(ids(client, limit=3)) == 3
    assert ids(client, limit=3) + ids(client, limit=3, offset=3) + ids(client, limit=3, offset=6) == ids(client)
    assert ids(client, state="failed") == [failed.id]
    assert ids(client, state=["failed", "stopped"]) == ids(client)
    assert listed(client, search="zig", limit=2)["total"] == 7
    assert ids(client, search="#8") == [8]
    assert ids(client, search="zig 3") == [4]
    assert client.get("/api/jobs", params={"state": "odd"}).status_code == 422
    assert client.get("/api/jobs", params={"limit": 100_000}).status_code == 422


def test_what_is_as_it_was_is_not_sent_again(client: TestClient) -> None:
    store = store_of(client)
    job = add(store)
    first = client.get("/api/jobs")
    tag = first.headers["etag"]
    again = client.get("/api/jobs", headers={"If-None-Match": tag})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    write(job.run_folders[0], start(), step(1))
    changed = client.get("/api/jobs", headers={"If-None-Match": tag})
    assert changed.status_code == 200
    assert changed.headers["etag"] != tag


def test_what_a_job_says(client: TestClient) -> None:
    store = store_of(client)
    job = add(store, queued=True)
    folder = job.run_folders[0]

    def says() -> tuple[str, str]:
        found = client.get(f"/api/jobs/{job.id}").json()
        return found["state"], found["says"]

    assert says() == ("queued", "waits for its turn on cpu")
    running = begun(store, job)
    assert says() == ("running", "is being started")
    write(folder, {"type": "stage", "time": T0, "name": "latents", "done": 3, "total": 10, "note": ""})
    assert says() == ("running", "prepares: latents 3 of 10")
    write(folder, start(), step(1), step(2))
    assert says() == ("running", "trains on cpu")
    for words in ("ends its step, saves and stops", "stops at once"):
        store.ask_stop(job.id)
        assert says() == ("stopping", words)
    store.ask_stop(job.id, kill=True)
    assert says() == ("stopping", "is being killed")
    store.conclude(running, Verdict("out_of_memory", "the card's memory ran out: ...", 1))
    assert says() == ("failed", "the card's memory ran out: ...")


# --- doing ------------------------------------------------------------------------------------------------------------


def test_a_job_is_added_and_kept_as_a_draft(client: TestClient) -> None:
    folder = store_of(client).folder
    text = written(folder, steps=100)
    added = post(client, "/api/jobs", {"text": text}, 201)
    assert added["note"] == "job 1 is queued on cpu, place 1"
    assert (added["job"]["state"], added["job"]["position"]) == ("queued", 1)
    draft = post(client, "/api/jobs", {"text": text.replace("zig", "zag"), "queued": False}, 201)
    assert (draft["job"]["state"], draft["note"]) == ("stopped", "job 2 is kept as a draft")
    assert client.get("/api/jobs/1").json()["cwd"] == str(folder)


def test_a_draft_is_kept_with_its_mistakes_and_does_not_start(client: TestClient) -> None:
    store = store_of(client)
    text = written(store.folder, stepz=1, batch_size=0)
    draft = post(client, "/api/jobs", {"text": text, "queued": False}, 201)
    assert (draft["job"]["state"], draft["job"]["name"]) == ("stopped", "zig")
    assert "mistakes" in draft["job"]["says"]
    assert "mistakes" in draft["note"]
    for job_id in (1, post(client, "/api/jobs/1/clone", {}, 201)["job"]["id"]):
        refused = client.post(f"/api/jobs/{job_id}/start", json={})
        assert (refused.status_code, len(refused.json()["errors"])) == (400, 2)
        with pytest.raises(UserError, match="draft with mistakes"), store._database.transaction() as db:
            jobs_store._enqueue(db, store.job(job_id))  # whatever way leads there
    page = client.get("/api/form/start?edit=1").json()
    assert (page["edit"]["draft"], len(page["form"]["errors"]), page["form"]["text"]) == (True, 2, text)
    for path in ("", "/text", "/files", "/log", "/samples", "/curves", "/timeline", "/exports"):
        assert client.get(f"/api/jobs/1{path}").status_code == 200, path

    assert client.put("/api/jobs/1", json={"text": "config: ["}).status_code == 400
    assert client.put("/api/jobs/1", json={"text": "config: [", "draft": True}).json()["job"]["name"] == "draft"
    right = written(store.folder)
    put = client.put("/api/jobs/1", json={"text": right, "draft": True}).json()["job"]
    assert (put["says"], put["cause"], put["name"]) == ("not started yet", "not_started", "zig")
    assert store.job(1).run_folders == (store.folder / "output" / "zig",)
    assert post(client, "/api/jobs/1/start", {})["job"]["state"] == "queued"
    assert client.put("/api/jobs/1", json={"text": text, "draft": True}).status_code == 400, "it is a draft no more"
    assert store.text(1) == right


@pytest.mark.parametrize("text", ["x: \ud800", "x" * (MAX_BYTES + 1)])
def test_what_no_file_could_hold_is_no_draft_either(client: TestClient, text: str) -> None:
    body = json.dumps({"text": text, "queued": False})
    assert client.post("/api/jobs", content=body).status_code == 400
    assert ids(client) == []


def test_a_draft_leads_to_no_folder_by_its_name(client: TestClient) -> None:
    text = 'config: {output_name: "../../../etc", output_folder: /}'
    post(client, "/api/jobs", {"text": text, "queued": False}, 201)
    store = store_of(client)
    assert store.job(1).run_folders == (store.folder / "jobs" / "draft",)


def test_every_mistake_of_a_job_file_is_answered(client: TestClient) -> None:
    text = written(store_of(client).folder, stepz=1, batch_size=0)
    answer = client.post("/api/jobs", json={"text": text})
    assert answer.status_code == 400
    errors = answer.json()["errors"]
    places = [f"config.process[0].train.{name}" for name in ("stepz", "batch_size")]
    assert [error["where"] for error in errors] == places, "as a form names its fields"
    found = client.post("/api/form/read", json={"text": text}).json()["errors"]
    assert [error["where"] for error in found] == places
    assert ids(client) == []
    assert client.post("/api/jobs", json={"text": text, "cwd": "/"}).status_code == 422


def test_a_worker_that_does_not_come_up_is_told_and_the_job_waits(client: TestClient, monkeypatch: Any) -> None:
    from detour import UserError

    def fails(store: Any, **options: Any) -> None:
        raise UserError("the queue's worker did not come up")

    monkeypatch.setattr(queue, "ensure_worker", fails)
    added = post(client, "/api/jobs", {"text": written(store_of(client).folder)}, 201)
    assert "did not come up" in added["note"]
    assert added["job"]["state"] == "queued"
    assert client.post("/api/queue/serve", json={}).status_code == 400


def test_a_job_file_is_edited(client: TestClient) -> None:
    store = store_of(client)
    job = add(store)
    new = written(store.folder, steps=7)
    answer = client.put(f"/api/jobs/{job.id}", json={"text": new})
    assert answer.status_code == 200
    assert store.text(job.id) == new
    begun(store, job)
    answer = client.put(f"/api/jobs/{job.id}", json={"text": new})
    assert (answer.status_code, "can be changed once it has ended" in answer.json()["error"]) == (409, True)


def test_starting_stopping_and_killing(client: TestClient) -> None:
    store = store_of(client)
    job = add(store)
    address = f"/api/jobs/{job.id}"
    assert client.post(f"{address}/stop", json={}).status_code == 409
    assert post(client, f"{address}/start")["note"] == "job 1 is queued on cpu, place 1"
    assert client.post(f"{address}/start", json={}).status_code == 409
    assert post(client, f"{address}/stop")["note"] == "job 1 is stopped: it had not begun"
    post(client, f"{address}/start")
    claimed = begun(store, store.job(job.id))
    stopped: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:  # the run of this job is this very process
        patch.setattr(queue.processes, "send", lambda process, number: stopped.append(number) or True)
        notes = [post(client, f"{address}/stop", body)["note"] for body in ({}, {}, {"kill": True})]
    assert [int(number) for number in stopped] == [2, 2, 9]
    assert notes == [
        "job 1 ends its step, saves and stops; asked once more it stops at once",
        "job 1 stops at once; what was saved before is intact",
        "job 1 is being killed; what was saved before is intact",
    ]
    store.conclude(claimed, Verdict("stopped", "stopped", 130))


def test_saving_and_sampling_now(client: TestClient) -> None:
    store = store_of(client)
    job = add(store)
    folder = job.run_folders[0]
    for what in ("save", "sample"):
        assert client.post(f"/api/jobs/{job.id}/{what}", json={}).status_code == 409
    running = begun(store, job)
    assert "still being prepared" in client.post(f"/api/jobs/{job.id}/save", json={}).json()["error"]
    write(folder, start(at=(running.started or 0) + 1))
    assert post(client, f"/api/jobs/{job.id}/save")["note"] == "job 1 saves after the step that it is in"
    assert post(client, f"/api/jobs/{job.id}/sample")["note"] == "job 1 draws its previews after the step that it is in"
    assert sorted(path.name for path in (folder / "requests").iterdir()) == ["sample", "save"]


def test_a_clone_is_a_draft_of_its_own(client: TestClient) -> None:
    store = store_of(client)
    job = add(store)
    copy = post(client, f"/api/jobs/{job.id}/clone", status=201)["job"]
    assert (copy["id"], copy["state"], store.text(2)) == (2, "stopped", store.text(1))


def test_moving_in_the_queue(client: TestClient) -> None:
    store = store_of(client)
    for name in "abc":
        add(store, name, queued=True)
    assert post(client, "/api/jobs/3/move", {"place": 1})["note"] == "job 3 has place 1 on cpu"
    assert ids(client) == [3, 1, 2]
    post(client, "/api/jobs/3/move", {"place": 99})
    assert ids(client) == [1, 2, 3]
    assert client.post("/api/jobs/3/move", json={"place": 0}).status_code == 422
    draft = add(store, "draft")
    assert client.post(f"/api/jobs/{draft.id}/move", json={"place": 1}).status_code == 409


def test_a_job_is_deleted_with_its_small_pictures_and_not_with_what_it_has_trained(client: TestClient) -> None:
    store = store_of(client)
    job = add(store)
    write(job.run_folders[0], start())
    cached = store.folder / "cache" / "samples" / "1" / "x.webp"
    cached.parent.mkdir(parents=True)
    cached.touch()
    begun(store, job)
    assert client.delete("/api/jobs/1").status_code == 409
    store.conclude(store.job(1), Verdict("finished", "finished"))
    assert "what it has trained stays" in client.delete("/api/jobs/1").json()["note"]
    assert (job.run_folders[0] / "events.jsonl").exists()
    assert not cached.parent.exists()
    assert client.delete("/api/jobs/1").status_code == 404
    assert client.get("/api/jobs/1").status_code == 404


# --- further ----------------------------------------------------------------------------------------------------------


def test_further_steps_change_one_number_and_nothing_else(client: TestClient) -> None:
    store = store_of(client)
    text = written(store.folder, steps=100)
    job = ended(store, add(store, text=text))
    answer = post(client, f"/api/jobs/{job.id}/extend", {"steps": 50})
    assert answer["note"] == "to 150 steps: job 1 is queued on cpu, place 1"
    assert store.text(job.id) == text.replace("steps: 100", "steps: 150")
    assert answer["job"]["state"] == "queued"
    post(client, f"/api/jobs/{job.id}/extend", {"steps": 1})  # queued: only the number
    assert store.text(job.id) == text.replace("steps: 100", "steps: 151")


def test_further_steps_where_none_were_named(client: TestClient) -> None:
    store = store_of(client)
    text = written(store.folder)
    job = add(store, text=text)
    post(client, f"/api/jobs/{job.id}/extend", {"steps": 10})
    new = store.text(job.id)
    assert load_text(new).job.config.process[0].train.steps == 3010
    assert [line for line in new.splitlines() if "steps:" not in line] == text.splitlines()
    standin = add(store, text=job_text(store.folder, "json"))
    post(client, f"/api/jobs/{standin.id}/extend", {"steps": 5})
    assert load_text(store.text(standin.id)).job.config.process[0].train.steps == 3005


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda text: text.replace("lr: 0.0002", "epochs: 3"), "counts epochs (train.epochs: 3)"),
        (lambda text: text + text[text.index("    - type") :], "has 2 processes"),
    ],
)
def test_further_steps_that_are_not_ours_to_decide(client: TestClient, change: Any, complaint: str) -> None:
    store = store_of(client)
    text = change(written(store.folder))
    job = add(store, text=text)
    answer = client.post(f"/api/jobs/{job.id}/extend", json={"steps": 10})
    assert (answer.status_code, complaint in answer.json()["error"]) == (400, True)
    assert store.text(job.id) == text


def test_a_job_at_work_gets_no_further_steps(client: TestClient) -> None:
    store = store_of(client)
    job = begun(store, add(store, text=written(store.folder, steps=100)))
    assert client.post(f"/api/jobs/{job.id}/extend", json={"steps": 10}).status_code == 409
    for wrong in ({"steps": 0}, {"steps": "x"}, {}, {"steps": 10**9}):
        assert client.post(f"/api/jobs/{job.id}/extend", json=wrong).status_code == 422


# --- on the command line ----------------------------------------------------------------------------------------------


def test_the_same_on_the_command_line(client: TestClient) -> None:
    """The commands parse, and mean this job of this queue."""
    import shlex

    from detour.cli import _parser

    store = store_of(client)
    add(store, "a b")
    commands = client.get("/api/jobs/1").json()["commands"]
    for name in ("start", "stop", "kill", "list"):
        words = shlex.split(commands[name])
        assert words[0] == "detour"
        parsed = _parser().parse_args(words[1:])
        assert parsed.folder == store.folder
        assert name == "list" or parsed.id == 1
    assert _parser().parse_args(shlex.split(commands["kill"])[1:]).kill
    assert shlex.split(commands["save"])[1] == str(store.job(1).run_folders[0] / "requests" / "save")


# --- addresses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", ["0", "99", "9" * 15, "9" * 16, "9" * 5000, "-1", "1e3", "x", "..", "%2e%2e", "1;2"])
def test_numbers_that_no_job_has(client: TestClient, number: str) -> None:
    add(store_of(client))
    for address in ("", "/curves", "/timeline", "/samples", "/log", "/files", "/text", "/events"):
        assert client.get(f"/api/jobs/{number}{address}").status_code in (404, 405), address


def test_looking_changes_nothing(client: TestClient) -> None:
    store = store_of(client)
    job = add(store, queued=True)
    begun(store, job)
    write(job.run_folders[0], start(), step(1))

    def everything() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in store.folder.rglob("*") if path.is_file()}

    before = everything()
    for address in ("", "/curves", "/timeline", "/samples", "/log", "/files", "/text"):
        assert client.get(f"/api/jobs/1{address}").status_code == 200
    assert client.get("/api/compare", params={"a": 1, "b": 1}).status_code == 200
    listed(client)
    after = everything()
    assert {name for name in before | after if before.get(name) != after.get(name)} <= {
        name for name in after if name.endswith(("-shm", "-wal"))
    }
