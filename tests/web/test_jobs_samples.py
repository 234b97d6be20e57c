"""The matrix of previews, their pictures and small ones."""

from __future__ import annotations

import os
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

import runs_made
import web_client
from detour import files
from web_jobs import T0, add, ended, start, store_of, write

RED, GREEN = (200, 30, 30), (30, 200, 30)


@pytest.fixture
def client(tmp_path: Path) -> TestClient:
    return web_client.signed_in(tmp_path / "folder")


@pytest.fixture
def folder(client: TestClient) -> Path:
    store = store_of(client)
    return ended(store, add(store)).run_folders[0]


def draw(folder: Path, step: int, index: int, colour: Any = RED, *, size: int = 64, prompt: str | None = None) -> Path:
    path = folder / "samples" / f"{step:09d}-{index:02d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size // 2), colour).save(path)
    if prompt is not None:
        record = {
            "type": "sample",
            "time": T0,
            "step": step,
            "index": index,
            "path": str(path),
            "prompt": prompt,
            "seed": 42,
        }
        write(folder, record)
    return path


def matrix(client: TestClient, **params: Any) -> dict[str, Any]:
    answer = client.get("/api/jobs/1/samples", params=params)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/json"
    return answer.json()


def columns(found: dict[str, Any]) -> dict[int, list[int]]:
    return {column["step"]: column["pictures"] for column in found["steps"]}


# --- the teacher gate -------------------------------------------------------------------------------------------------


def test_the_teacher_gate_is_shown_with_its_drawings(client: TestClient, folder: Path, tmp_path: Path) -> None:
    assert matrix(client)["gate"] is None
    run = runs_made.Made(folder)
    folder.mkdir(parents=True)
    run.start()
    run.gate(["its drawings are more red"])
    found = matrix(client)["gate"]
    assert (found["passed"], found["reasons"], len(found["figures"])) == (False, ["its drawings are more red"], 4)
    assert found["version"] is not None
    picture = client.get("/api/jobs/1/samples/1/teacher-gate")
    assert (picture.status_code, picture.headers["content-type"]) == (200, "image/png")
    assert Image.open(BytesIO(picture.content)).size == (584, 212)
    assert matrix(client)["steps"] == [], "it is no preview"
    drawn = folder / "samples" / "teacher-gate.png"
    drawn.rename(tmp_path / "elsewhere.png")
    drawn.symlink_to(tmp_path / "elsewhere.png")
    for address in ("/api/jobs/1/samples/1/teacher-gate", "/api/jobs/1/samples/2/teacher-gate"):
        assert client.get(address).status_code == 404
    drawn.unlink()
    assert matrix(client)["gate"]["version"] is None
    write(folder, {"type": "gate", "time": T0, "step": 0})
    assert matrix(client)["gate"] is None


# --- the matrix -------------------------------------------------------------------------------------------------------


def test_without_previews_the_matrix_is_empty(client: TestClient, folder: Path) -> None:
    found = matrix(client)
    assert (found["prompts"], found["steps"], found["untouched"]) == ([], [], [])


def test_prompts_by_steps(client: TestClient, folder: Path) -> None:
    hostile = "<img src=x onerror=alert(1)>"
    write(folder, start())
    for step in (0, 100, 50):
        draw(folder, step, 0, prompt="a cat")
        if step != 50:
            draw(folder, step, 1, prompt=hostile)
    (folder / "samples" / "notes.txt").touch()
    (folder / "samples" / "1-1.png").touch()
    found = matrix(client)
    assert found["prompts"] == [
        {"index": 0, "prompt": "a cat", "seed": 42},
        {"index": 1, "prompt": hostile, "seed": 42},
    ]
    assert columns(found) == {0: [0, 1], 50: [0], 100: [0, 1]}
    assert found["untouched"] == [0, 1]


def test_prompts_that_were_edited_are_told(client: TestClient, folder: Path) -> None:
    """And what is compared with the untouched model was drawn from the same prompt and seed."""
    draw(folder, 0, 0, prompt="a cat")
    draw(folder, 0, 1, prompt="a dog")
    draw(folder, 100, 0, prompt="a lynx")
    draw(folder, 100, 1, prompt="a dog")
    draw(folder, 100, 2)  # no event tells of it: the disk was full
    found = matrix(client)
    assert [row["prompt"] for row in found["prompts"]] == ["a lynx", "a dog", None]
    assert [column["others"] for column in found["steps"]] == [{"0": "a cat"}, {}]
    assert found["untouched"] == [1]


@pytest.mark.parametrize("which", ["as written", "as it ran"])
def test_a_run_that_begins_with_a_lora_has_no_untouched_pictures(client: TestClient, folder: Path, which: str) -> None:
    store = store_of(client)
    draw(folder, 0, 0, prompt="a cat")
    assert matrix(client)["untouched"] == [0]
    text = store.text(1).replace('"model":', '"network": {"pretrained_lora_path": "x.safetensors"}, "model":')
    if which == "as written":
        store.edit(1, text)
    else:
        (folder / "job.yaml").write_text(text)
    assert matrix(client)["untouched"] == []


def test_the_version_changes_with_the_picture(client: TestClient, folder: Path) -> None:
    path = draw(folder, 0, 0)
    before = matrix(client)["steps"][0]["version"]
    assert before < 2**53
    os.utime(path, (1, 1))
    assert matrix(client)["steps"][0]["version"] != before


def test_links_are_no_previews(client: TestClient, folder: Path) -> None:
    secret = draw(folder.parent / "elsewhere", 1, 1)
    draw(folder, 0, 0)
    (folder / "samples" / "000000005-00.png").symlink_to(secret)
    assert columns(matrix(client)) == {0: [0]}
    assert client.get("/api/jobs/1/samples/1/5/0").status_code == 404
    assert client.get("/api/jobs/1/samples/1/5/0/thumbnail").status_code == 404


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_a_picture_comes_as_it_was_drawn(client: TestClient, folder: Path) -> None:
    path = draw(folder, 250, 3)
    answer = client.get("/api/jobs/1/samples/1/250/3")
    assert answer.content == path.read_bytes()
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "immutable" in answer.headers["cache-control"]
    for address in ("1/250/2", "1/251/3", "2/250/3", "0/250/3", "1/999999999999999/3", "1/250/999999999999999"):
        assert client.get(f"/api/jobs/1/samples/{address}").status_code == 404, address


def small(client: TestClient, address: str = "1/250/3", **params: Any) -> Image.Image:
    answer = client.get(f"/api/jobs/1/samples/{address}/thumbnail", params=params)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/webp")
    return Image.open(BytesIO(answer.content))


def test_a_small_picture_is_made_once(client: TestClient, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = draw(folder, 250, 3, size=800)
    assert small(client).size == (320, 160)
    assert small(client, size="160").size == (160, 80)
    assert np.allclose(np.asarray(small(client)).mean((0, 1)), RED, atol=6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "open", lambda *args, **more: pytest.fail("opened again"))
        assert client.get("/api/jobs/1/samples/1/250/3/thumbnail").status_code == 200
    draw(folder, 250, 3, GREEN, size=800)
    os.utime(path, (1, 1))
    assert np.allclose(np.asarray(small(client)).mean((0, 1)), GREEN, atol=6)
    assert client.get("/api/jobs/1/samples/1/250/3/thumbnail", params={"size": "5000"}).status_code == 422


def test_a_clip_has_its_first_frame(client: TestClient, folder: Path) -> None:
    path = draw(folder, 0, 0)
    frames = [Image.new("RGB", (64, 64), colour) for colour in (GREEN, RED)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100)
    assert np.allclose(np.asarray(small(client, "1/0/0")).mean((0, 1)), GREEN, atol=6)


def test_a_full_disk_keeps_no_small_pictures_and_shows_them(
    client: TestClient, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise files.DiskFullError("no space")

    draw(folder, 250, 3)
    monkeypatch.setattr(files, "write_bytes", full)
    assert small(client).size == (64, 32)


@pytest.mark.parametrize("content", [b"", b"<svg onload=alert(1)>", b"\x89PNG\r\n\x1a\nrest", b"GIF89a"])
def test_a_damaged_picture(client: TestClient, folder: Path, content: bytes) -> None:
    draw(folder, 0, 0).write_bytes(content)
    answer = client.get("/api/jobs/1/samples/1/0/0/thumbnail")
    assert (answer.status_code, "damaged" in answer.json()["error"]) == (422, True)
    whole = client.get("/api/jobs/1/samples/1/0/0")
    assert (whole.headers["content-type"], whole.headers["x-content-type-options"]) == ("image/png", "nosniff")


@pytest.mark.parametrize("side", [15_000, 100_000])
def test_a_picture_of_too_many_pixels_is_not_decoded(client: TestClient, folder: Path, side: int) -> None:
    path = draw(folder, 0, 0)
    data = bytearray(path.read_bytes())
    data[16:24] = side.to_bytes(4, "big") * 2  # width and height in the header, its checksum put right
    import zlib

    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    path.write_bytes(bytes(data))
    answer = client.get("/api/jobs/1/samples/1/0/0/thumbnail")
    assert (answer.status_code, "pixels" in answer.json()["error"]) == (422, True), answer.text
