"""A full disk, and a folder that goes away under a server: clear answers, nothing broken."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest

import web_client
from command import detour
from detour import files
from detour.jobs.store import Store
from detour.web import server
from faults import Trap, disk_full, leftovers, trapped
from queueing import job_text


def test_a_full_disk_is_said_and_breaks_nothing(tmp_path: Path) -> None:
    client = web_client.signed_in(tmp_path)
    assert client.put("/api/settings/hub-token", json={"token": "hf_first_token"}).status_code == 200
    token = client.app.state.context.store.hub_token
    with trapped(Trap()) as dry:
        client.put("/api/settings/hub-token", json={"token": "hf_first_token"})
    for at in range(len(dry.calls)):
        with trapped(Trap(at, "before", disk_full())):
            answer = client.put("/api/settings/hub-token", json={"token": "hf_second_token"})
        assert answer.status_code == 507, dry.calls[at]
        assert "no space" in answer.json()["error"]
        assert leftovers(tmp_path) == []
        assert token.read_text() in ("hf_first_token\n", "hf_second_token\n")
    assert len(dry.calls) >= 5
    assert client.get("/api/settings").status_code == 200


def test_an_error_of_the_disk_in_a_route_has_a_sentence(tmp_path: Path) -> None:
    client = web_client.signed_in(tmp_path)

    def fail(number: int) -> None:
        raise OSError(number, os.strerror(number), str(tmp_path / "x"))

    client.app.add_api_route("/api/fail/{number}", fail)
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        answer = client.get(f"/api/fail/{number}")
        assert answer.status_code == 507
        assert "no space" in answer.json()["error"]
    assert client.get(f"/api/fail/{errno.EACCES}").status_code == 400
    with pytest.raises(OSError, match="Bad file descriptor"):
        client.get(f"/api/fail/{errno.EBADF}")


@pytest.mark.slow
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("only root may mount")
    try:
        client = web_client.signed_in(disk)
        store: Store = client.app.state.context.store
        client.put("/api/settings/hub-token", json={"token": "hf_first_token"})
        text = job_text(disk, "zig")
        store.add(text, cwd=disk, queued=False)
        with (disk / "filler").open("ab", buffering=0) as filler, pytest.raises(OSError, match="No space"):
            while True:
                filler.write(b"x" * 512)
        assert client.put("/api/settings/hub-token", json={"token": "hf_second_token"}).status_code == 507
        client.app.add_api_route("/api/add", lambda: store.add(text + " " * 100_000, cwd=disk).id, methods=["POST"])
        answer = client.post("/api/add", json={})
        assert answer.status_code == 507
        assert "no space" in answer.json()["error"]
        for path in ("/api/jobs", "/api/settings", "/settings", "/jobs"):
            assert client.get(path).status_code == 200, path
        assert store.hub_token.read_text() == "hf_first_token\n"
        (disk / "filler").unlink()
        assert client.post("/api/add", json={}).json() == 2
        store.close()
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_a_server_that_finds_no_space_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        with files.explained(tmp_path):
            disk_full()()

    monkeypatch.setattr(files, "write_bytes", full)
    monkeypatch.setattr(server, "_run", lambda *_: None)
    ran = detour("ui", "--folder", tmp_path / "folder", "--port", 0, "--no-browser")
    assert ran.code == 2
    assert "no space" in ran.err
    assert "Traceback" not in ran.err


def test_a_folder_that_goes_and_comes_back(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    client = web_client.signed_in(folder)
    client.app.add_api_route("/api/look", lambda: [path.name for path in (folder / "datasets").iterdir()])
    client.app.state.context.store.add(job_text(folder, "zig"), cwd=folder, queued=False)
    folder.rename(tmp_path / "elsewhere")
    for method, path, body in (
        ("GET", "/api/jobs", None), ("GET", "/api/jobs/1", None), ("GET", "/jobs/1", None), ("GET", "/api/look", None),
        ("PUT", "/api/settings/hub-token", {"token": "hf_some_token"}), ("DELETE", "/api/settings/hub-token", {}),
        ("POST", "/api/jobs/1/start", {}),
    ):  # fmt: skip
        answer = client.request(method, path, json=body)
        assert answer.status_code == 503, path
        assert "was moved, removed or replaced" in (answer.json()["error"] if "/api/" in path else answer.text), path
    assert not folder.exists(), "no new one is made in its place"
    (tmp_path / "elsewhere").rename(folder)
    assert client.get("/api/jobs/1").status_code == 200
    answer = client.get("/jobs")
    assert answer.status_code == 200


def test_a_job_that_is_not_there(tmp_path: Path) -> None:
    client = web_client.signed_in(tmp_path)
    for number in (1, 10**30):
        answer = client.get(f"/api/jobs/{number}")
        assert answer.status_code == 404
        assert set(answer.json()) == {"error"}
    assert client.get("/api/nothing").json() == {"error": "there is nothing at this address"}
    assert client.delete("/api/settings").json() == {"error": "this address does not do that"}
    page = client.get("/jobs/1")
    assert page.status_code == 404
    assert page.headers["content-type"].startswith("text/html")
