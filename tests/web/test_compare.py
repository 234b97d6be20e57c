"""Two jobs side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

import web_client
from detour.config.load import changed_options, differences, dump_job, load_text
from queueing import job_text
from web_jobs import add, ended, store_of


@pytest.fixture
def client(tmp_path: Path) -> TestClient:
    return web_client.signed_in(tmp_path / "folder")


def text(folder: Path, name: str, **train: Any) -> str:
    data = json.loads(job_text(folder, name))
    data["config"]["process"][0]["train"] = train
    return json.dumps(data)


def asked(client: TestClient, a: int, b: int) -> dict[str, Any]:
    answer = client.get("/api/compare", params={"a": a, "b": b})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/json"
    return answer.json()


def test_only_options_that_differ_defaults_included(client: TestClient) -> None:
    store = store_of(client)
    hostile = "<img src=x onerror=alert(1)>"
    add(store, text=text(store.folder, "one", lr=1e-4, steps=3000))
    add(store, text=text(store.folder, hostile, lr=2e-4))
    found = asked(client, 1, 2)
    assert found["differences"] == [
        {"option": "config.output_name", "a": "one", "b": f'"{hostile}"'},
        {"option": "train.lr", "a": "0.0001", "b": "0.0002"},
    ]
    assert (found["a"]["id"], found["b"]["name"], found["trouble"]) == (1, hostile, "")
    assert asked(client, 1, 1)["differences"] == []


def test_what_ran_counts_and_not_what_was_edited_since(client: TestClient) -> None:
    store = store_of(client)
    job = ended(store, add(store, text=text(store.folder, "one", lr=1e-4)))
    add(store, text=text(store.folder, "one", lr=5e-4))
    job.run_folders[0].mkdir(parents=True)
    (job.run_folders[0] / "job.yaml").write_text(client.get("/api/jobs/2/text").json()["resolved"])
    store.edit(job.id, text(store.folder, "other", lr=3e-4))
    assert [found["option"] for found in asked(client, 1, 2)["differences"]] == ["config.output_name", "train.lr"]
    store.edit(job.id, text(store.folder, "one", lr=3e-4))
    assert asked(client, 1, 2)["differences"] == []


def test_jobs_that_cannot_be_compared(client: TestClient) -> None:
    store = store_of(client)
    add(store)
    add(store, "other")
    with store._database.transaction() as db:
        db.execute("UPDATE document SET text = 'config: 3' WHERE id = 2")
    found = asked(client, 1, 2)
    assert found["differences"] == []
    assert found["trouble"].startswith("job 2: ")
    assert client.get("/api/compare", params={"a": 1, "b": 9}).status_code == 404
    for wrong in ({"a": 1}, {"a": "x", "b": 1}, {"a": 0, "b": 1}, {"a": 10**20, "b": 1}):
        assert client.get("/api/compare", params=wrong).status_code == 422


def test_differences_in_words_and_in_parts_are_the_same(tmp_path: Path) -> None:
    old = dump_job(load_text(text(tmp_path, "a", steps=5)).job)
    new = dump_job(load_text(text(tmp_path, "a", lr=0.5)).job)
    assert differences(old, new) == [("train.steps", "5", "null"), ("train.lr", "0.0001", "0.5")]
    assert changed_options(old, new) == ["train.steps: 5 -> null", "train.lr: 0.0001 -> 0.5"]
    assert differences("{a: 1}", "{b: 2}") == [("a", "1", None), ("b", None, "2")]
    assert changed_options("{a: 1}", "{b: 2}") == ["a: 1 -> not set", "b: not set -> 2"]
