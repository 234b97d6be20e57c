"""The settings page: tokens go in and never come out, and reach the jobs."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import web_client
from detour.jobs import supervisor
from queueing import farm

HUB = "hf_aTokenThatNobodyShouldSee"


def test_a_token_goes_in_and_never_comes_out(tmp_path: Path) -> None:
    client = web_client.signed_in(tmp_path)
    assert client.get("/api/settings").json()["hub_token"] is False
    answer = client.put("/api/settings/hub-token", json={"token": f"  {HUB}\n"})
    assert answer.status_code == 200
    assert HUB not in answer.text
    file = client.app.state.context.store.hub_token
    assert file.read_text() == f"{HUB}\n"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert client.get("/api/settings").json()["hub_token"] is True
    for path in ("/settings", "/api/settings", "/api/openapi.json"):
        assert HUB not in client.get(path).text
    assert client.request("DELETE", "/api/settings/hub-token", json={}).status_code == 200
    assert client.request("DELETE", "/api/settings/hub-token", json={}).status_code == 200
    assert not file.exists()
    assert client.get("/api/settings").json()["hub_token"] is False


@pytest.mark.parametrize(
    "token", ["", "short", "two words of it", "hf_\u00e4bcdefgh", "hf_abcdefg\nHOST=evil", "hf_\x00abcdefgh"]
)
def test_what_is_no_token_is_not_repeated(tmp_path: Path, token: str) -> None:
    client = web_client.signed_in(tmp_path)
    answer = client.put("/api/settings/hub-token", json={"token": token})
    assert answer.status_code == 400
    assert not token or token not in answer.text
    assert not client.app.state.context.store.hub_token.exists()


def test_wrong_bodies_are_not_repeated(tmp_path: Path) -> None:
    client = web_client.signed_in(tmp_path)
    for body in ({"token": [HUB]}, {"token": HUB, "more": HUB}, {"tokens": HUB}, {"token": HUB * 50}, [HUB]):
        answer = client.put("/api/settings/hub-token", json=body)
        assert answer.status_code == 422
        assert HUB not in answer.text
        assert answer.json()["errors"]


def test_folders_cannot_be_set_from_a_page(tmp_path: Path) -> None:
    """They are shown, and no route takes one."""
    comfyui = tmp_path / "ComfyUI"
    client = web_client.signed_in(tmp_path / "folder", comfyui=comfyui)
    assert client.get("/api/settings").json()["comfyui"] == str(comfyui)
    assert str(comfyui) in client.get("/settings").text
    schema = client.get("/api/openapi.json").json()["paths"]
    changing = {path for path, methods in schema.items() if "settings" in path and set(methods) - {"get"}}
    assert changing == {"/api/settings/hub-token"}


def test_the_page_says_what_can_be_done(tmp_path: Path) -> None:
    client = web_client.signed_in(tmp_path)
    page = client.get("/settings").text
    assert "There is none." in page
    assert "DETOUR_TOKEN" in page, "the token of this server comes from elsewhere"
    client.put("/api/settings/hub-token", json={"token": HUB})
    assert "There is a token." in client.get("/settings").text


# --- to the jobs ----------------------------------------------------------------------------------------------------


def test_the_hubs_library_finds_the_token(tmp_path: Path) -> None:
    """It is told where the token lies, and that counts more than what the environment says."""
    client = web_client.signed_in(tmp_path)
    store = client.app.state.context.store
    before = dict(os.environ)
    try:
        os.environ["HF_TOKEN"] = "hf_of_the_environment"
        supervisor._hand_over_token(store)
        assert os.environ["HF_TOKEN"] == "hf_of_the_environment", "without one of ours, that of the environment"
        client.put("/api/settings/hub-token", json={"token": HUB})
        supervisor._hand_over_token(store)
        assert HUB not in os.environ.values(), "environments are printed into logs"
        code = "from huggingface_hub import get_token; print(get_token())"
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert found.stdout.strip() == HUB
    finally:
        os.environ.clear()
        os.environ.update(before)


def test_jobs_are_told_where_the_token_is(tmp_path: Path) -> None:
    """By a real worker, which began before there was a token."""
    with farm(tmp_path) as here:
        here.worker()
        client = web_client.signed_in(here.folder)
        client.put("/api/settings/hub-token", json={"token": HUB})
        job = here.add(hold=1)
        here.wait_step(job, 1)
        process = here.job(job).process
        assert process is not None
        told = Path(f"/proc/{process.pid}/environ").read_bytes()
        assert f"HF_TOKEN_PATH={here.store.hub_token}".encode() in told.split(b"\0")
        assert HUB.encode() not in told
        here.go()
        here.wait(job, "finished")
        assert HUB not in here.log(job)
