"""Log, job file and files of a job: followed bit by bit, and never anything outside the run's folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

import web_client
from detour.config.load import load_text
from detour.web import job_files
from web_jobs import add, begun, ended, start, store_of, write

HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture
def client(tmp_path: Path) -> TestClient:
    return web_client.signed_in(tmp_path / "folder")


@pytest.fixture
def folder(client: TestClient) -> Path:
    """The run folder of job 1, which has run."""
    store = store_of(client)
    job = ended(store, add(store))
    job.run_folders[0].mkdir(parents=True)
    return job.run_folders[0]


def log_of(client: TestClient, **params: Any) -> dict[str, Any]:
    answer = client.get("/api/jobs/1/log", params=params)
    assert answer.headers["content-type"] == "application/json"
    assert answer.status_code == 200, answer.text
    return answer.json()


# --- the log ----------------------------------------------------------------------------------------------------------


def test_a_log_that_is_not_there_yet(client: TestClient) -> None:
    add(store_of(client))
    found = log_of(client)
    assert (found["text"], found["offset"], found["attempt"], found["reset"]) == ("", 0, 0, False)


def test_a_log_is_followed(client: TestClient, folder: Path) -> None:
    store = store_of(client)
    path = store.log_file(store.job(1))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"one {HOSTILE}\n")
    first = log_of(client)
    assert (first["text"], first["begin"], first["attempt"]) == (f"one {HOSTILE}\n", 0, 1)
    with path.open("ab") as file:
        file.write("tw\u00f6".encode()[:-1])
    more = log_of(client, offset=first["offset"], attempt=1)
    assert more["text"] == "tw"  # half a character waits
    with path.open("ab") as file:
        file.write("\u00f6".encode()[1:] + b"\xff\n")
    rest = log_of(client, offset=more["offset"], attempt=1)
    assert (rest["text"], rest["reset"]) == ("\u00f6\ufffd\n", False)
    assert log_of(client, offset=rest["offset"])["text"] == ""
    path.write_text("shorter\n")
    cut = log_of(client, offset=rest["offset"])
    assert (cut["text"], cut["reset"]) == ("shorter\n", True)
    begun(store, store.job(1))
    store.log_file(store.job(1)).write_text("second attempt\n")
    other = log_of(client, offset=3, attempt=1)
    assert (other["text"], other["attempt"], other["reset"]) == ("second attempt\n", 2, True)


def test_of_a_long_log_the_end_comes_first(client: TestClient, folder: Path) -> None:
    store = store_of(client)
    path = store.log_file(store.job(1))
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"line {number} " + "x" * 80 + "\n" for number in range(3000)]
    path.write_text("".join(lines))
    found = log_of(client)
    assert found["text"].splitlines(keepends=True) == lines[-len(found["text"].splitlines()) :]
    assert found["begin"] > 0
    assert found["offset"] == found["size"]
    text, offset = "", 0
    while piece := log_of(client, offset=offset):
        if not piece["text"]:
            break
        assert len(piece["text"]) <= job_files.PIECE
        text, offset = text + piece["text"], piece["offset"]
    assert text == "".join(lines)


@given(st.text(max_size=30), st.lists(st.integers(1, 5), min_size=1))
def test_characters_in_pieces(text: str, sizes: list[int]) -> None:
    data, found, at, end = text.encode("utf-8", "replace"), "", 0, 0
    for size in [*sizes, len(data)]:
        end = min(len(data), end + size)
        part, taken = job_files._decoded(data[at:end])
        found, at = found + part, at + taken
    assert (found, at) == (data.decode(), len(data))


# --- the job file -----------------------------------------------------------------------------------------------------


def test_the_job_file_as_written_and_with_every_default(client: TestClient, folder: Path) -> None:
    store = store_of(client)
    found = client.get("/api/jobs/1/text").json()
    assert (found["written"], found["ran"], found["trouble"]) == (store.text(1), None, "")
    process = load_text(found["resolved"]).job.config.process[0]
    assert (process.train.steps, process.train.noise_scheduler) == (3000, "flowmatch")
    (folder / "job.yaml").write_text("config: {}\n")
    assert client.get("/api/jobs/1/text").json()["ran"] == "config: {}\n"


def test_a_job_file_of_another_time_is_shown_with_its_trouble(client: TestClient, folder: Path) -> None:
    store = store_of(client)
    with store._database.transaction() as db:
        db.execute("UPDATE document SET text = 'config: {<b>: 1}' WHERE id = 1")
    found = client.get("/api/jobs/1/text").json()
    assert (found["written"], found["resolved"]) == ("config: {<b>: 1}", "")
    assert found["trouble"]


# --- files ------------------------------------------------------------------------------------------------------------


def fill(folder: Path) -> None:
    write(folder, start())
    for name in ("zig.safetensors", "zig-000000100.safetensors", "report.html", "job.yaml", ".lock", "other.txt",
                 f"{HOSTILE.replace('/', '')}.safetensors", "zig.safetensors.tmp-h-1-ab"):  # fmt: skip
        (folder / name).write_bytes(b"12345")
    for step, whole in ((100, True), (200, False)):
        place = folder / "checkpoints" / f"step-{step:09d}"
        place.mkdir(parents=True)
        (place / "weights.safetensors").write_bytes(b"1234567")
        if whole:
            (place / "manifest.json").write_text("{}")


def listed(client: TestClient) -> dict[str, dict[str, Any]]:
    return {file["name"]: file for file in client.get("/api/jobs/1/files").json()["files"]}


def test_what_a_run_has_made(client: TestClient, folder: Path) -> None:
    assert listed(client) == {}
    fill(folder)
    found = listed(client)
    assert {name: file["kind"] for name, file in found.items()} == {
        "zig.safetensors": "lora", "zig-000000100.safetensors": "lora", f"{HOSTILE}.safetensors": "lora",
        "report.html": "report", "job.yaml": "job", "events.jsonl": "events", "step-000000100": "checkpoint",
    }  # fmt: skip
    assert (found["zig-000000100.safetensors"]["step"], found["zig.safetensors"]["step"]) == (100, None)
    assert (found["step-000000100"]["bytes"], found["step-000000100"]["download"]) == (9, False)


def test_files_come_as_downloads(client: TestClient, folder: Path) -> None:
    fill(folder)
    for name in [file["name"] for file in listed(client).values() if file["download"]]:
        answer = client.get(f"/api/jobs/1/files/1/{name}")
        assert answer.status_code == 200, name
        assert answer.headers["content-type"] == "application/octet-stream"
        assert answer.headers["content-disposition"].startswith("attachment; filename")
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.content == (folder / name).read_bytes()
    part = client.get("/api/jobs/1/files/1/zig.safetensors", headers={"Range": "bytes=1-2"})
    assert (part.status_code, part.content) == (206, b"23")


OUTSIDE = [
    "..", ".", "../secret.safetensors", "..%2fsecret.safetensors", "%2e%2e%2fsecret.safetensors",
    "..\\secret.safetensors", "%252e%252e%252fsecret.safetensors", "/etc/passwd", "%2fetc%2fpasswd",
    "C:%5csecret.safetensors", "secret.safetensors",
    "zig.safetensors%00", "zig.safetensors;a", "zig.safetensors.", "zig.safetensors%20", "ZIG.safetensors",
    ".lock", "other.txt", "link.safetensors", "checkpoints", "step-000000100", "checkpoints%2fstep-000000100",
    "zig\u2024safetensors", "x" * 5000, "zig.safetensors.tmp-h-1-ab", "",
]  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
def test_nothing_else_is_handed_out(client: TestClient, folder: Path, name: str) -> None:
    fill(folder)
    (folder.parent / "secret.safetensors").write_text("secret")
    (folder / "link.safetensors").symlink_to(folder.parent / "secret.safetensors")
    answer = client.get(f"/api/jobs/1/files/1/{name}")
    assert answer.status_code in (404, 405) or (name in ("..", ".", "") and answer.status_code == 200)
    assert b"secret" not in answer.content.replace(b"secret.safetensors", b"")
    for process in ("0", "2", "9" * 15):
        assert client.get(f"/api/jobs/1/files/{process}/zig.safetensors").status_code == 404
    assert "link.safetensors" not in listed(client)


def test_a_folder_in_place_of_a_file(client: TestClient, folder: Path) -> None:
    (folder / "a.safetensors").mkdir()
    (folder / folder.name).mkdir()
    (folder / folder.name / "model.safetensors").write_bytes(b"123")
    os.mkfifo(folder / "pipe.safetensors")
    found = listed(client)
    assert {name: (file["kind"], file["bytes"]) for name, file in found.items()} == {"zig": ("model", 3)}
    for name in ("zig", "a.safetensors", "pipe.safetensors"):
        assert client.get(f"/api/jobs/1/files/1/{name}").status_code == 404


def test_many_files_are_listed_in_part(client: TestClient, folder: Path) -> None:
    for number in range(job_files.MOST + 20):
        (folder / f"a-{number:09d}.safetensors").touch()
    answer = client.get("/api/jobs/1/files").json()
    assert (len(answer["files"]), answer["left_out"]) == (job_files.MOST, 20)
