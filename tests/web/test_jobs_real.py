"""A real job through the API: the real worker, real training of the miniature, and everything that its page shows."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load
from starlette.testclient import TestClient

import web_client
from detour.jobs import processes
from miniature import SIZE, World, job_file, write_world
from queueing import until
from web_jobs import store_of

pytestmark = pytest.mark.slow
OF_THE_ENVIRONMENT, OF_THE_PAGE = "hf_ofTheEnvironmentSeenByNobody", "hf_ofThePageSeenByNobody"
PROMPTS = ["a red circle", "a blue square"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    client = web_client.signed_in(tmp_path / "folder")
    yield client
    store = store_of(client)
    for job in store.jobs(("queued", "starting")):
        store.ask_stop(job.id)
    for process in [store.worker(), *(job.process for job in store.jobs())]:
        if process is not None:
            processes.send(process, signal.SIGKILL)
    store.close()


def get(client: TestClient, address: str, **params: Any) -> Any:
    answer = client.get(address, params=params)
    assert answer.status_code == 200, answer.text
    return answer.json()


def wait(client: TestClient, *states: str) -> dict[str, Any]:
    def look() -> Any:
        now = get(client, "/api/jobs/1")
        assert now["state"] in states or now["state"] in ("queued", "starting", "running", "stopping"), now
        return now if now["state"] in states else None

    return until(look, str(states), within=300)


def events(client: TestClient) -> list[dict[str, Any]]:
    body = client.get("/api/jobs/1/events").text
    return [json.loads(line.removeprefix("data: ")) for line in body.splitlines() if line.startswith('data: {"type"')]


def files_with(secret: str, folder: Path) -> list[Path]:
    """Logs, events, checkpoints, LoRAs, pictures, the report, the queue: where it stands."""
    there = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    assert len(there) > 20
    return [path for path in there if secret.encode() in path.read_bytes()]


def test_a_job_from_its_text_to_its_lora_and_further(
    world: World, tmp_path: Path, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", OF_THE_ENVIRONMENT)  # before the worker is there, which hands its own on
    assert client.put("/api/settings/hub-token", json={"token": OF_THE_PAGE}).status_code == 200
    path = job_file(
        world, tmp_path / "job", train={"steps": 6, "batch_size": 2}, save={"save_every": 3},
        sample={"disable_sampling": False, "sample_every": 3, "prompts": PROMPTS},
        validation={"validate_every": 3, "holdout": 0.2, "times": [0.5]},
    )  # fmt: skip
    added = client.post("/api/jobs", json={"text": path.read_text()}).json()
    assert added["job"]["state"] in ("queued", "starting", "running")
    done = wait(client, "finished")
    assert (done["says"], done["progress"]["step"], done["progress"]["total_steps"]) == ("finished at step 6", 6, 6)

    found = get(client, "/api/jobs/1/curves")
    steps = [event for event in events(client) if event["type"] == "step"]
    assert found["steps"]["step"] == [1, 2, 3, 4, 5, 6]
    assert found["steps"]["loss"] == [event["loss"] for event in steps]
    assert sum(map(sum, found["bands"]["pictures"])) == sum(len(event["picture_losses"]) for event in steps) > 6
    assert found["validation"]["step"] == [0, 3, 6]
    assert found["validation"]["loss"] == found["validation"]["by_time"]["0.5"]

    samples = get(client, "/api/jobs/1/samples")
    assert [row["prompt"] for row in samples["prompts"]] == PROMPTS
    assert [(column["step"], column["pictures"]) for column in samples["steps"]] == [
        (0, [0, 1]),
        (3, [0, 1]),
        (6, [0, 1]),
    ]
    assert samples["untouched"] == [0, 1]
    small = client.get("/api/jobs/1/samples/1/6/1/thumbnail", params={"size": "160"})
    assert (small.status_code, small.headers["content-type"]) == (200, "image/webp")
    assert client.get("/api/jobs/1/samples/1/6/1").content.startswith(b"\x89PNG")

    files = {file["name"]: file for file in get(client, "/api/jobs/1/files")["files"]}
    assert {"zig.safetensors", "zig-000000003.safetensors", "job.yaml", "events.jsonl", "step-000000006"} <= set(files)
    lora = client.get("/api/jobs/1/files/1/zig.safetensors")
    assert len(load(lora.content)) > 10
    assert f"width: {SIZE}" in get(client, "/api/jobs/1/text")["ran"]
    assert "ended at step 6" in get(client, "/api/jobs/1/log")["text"]
    kinds = [moment["kind"] for moment in get(client, "/api/jobs/1/timeline")["moments"]]
    assert (kinds[0], kinds[-2:]) == ("created", ["end", "verdict"])
    assert kinds.count("save") >= 3

    assert files_with(OF_THE_ENVIRONMENT, tmp_path) == []
    assert files_with(OF_THE_PAGE, tmp_path) == [store_of(client).hub_token]

    cursor = found["cursor"]
    more = client.post("/api/jobs/1/extend", json={"steps": 2}).json()
    assert more["note"].startswith("to 8 steps: job 1 is queued")
    until(lambda: get(client, "/api/jobs/1")["attempts"] == 2 or None, "a second attempt", within=60)
    assert wait(client, "finished")["says"] == "finished at step 8"
    after = get(client, "/api/jobs/1/curves", since=cursor)
    assert (after["reset"], after["steps"]["step"]) == (True, [1, 2, 3, 4, 5, 6, 7, 8])
    assert after["steps"]["loss"][:6] == found["steps"]["loss"]
    assert "train.steps: 6 -> 8" in str(get(client, "/api/jobs/1/timeline"))  # the run says what has changed
