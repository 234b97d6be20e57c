"""Datasets over the API: made, listed, renamed, removed and brought back; what a name may and may not reach."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from urllib.parse import quote

import pytest
from filelock import FileLock
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import web_client
from datasets_made import fill, png, put, tree
from detour import UserError
from detour.jobs.states import StateError
from detour.web import datasets
from detour.web.datasets import Library
from detour.web.errors import MissingError

TRAVERSAL = [
    "..", ".", "../zig", "..\\zig", "%2e%2e", "..%2fzig", "zig/../zag", "zig;", "zig\0", "/etc", "C:\\x", "\\\\a\\b",
    "CON",
    "zig.", "zig ", "ZIG", "x" * 5000, "．．", "../../secret.txt", "secret.txt", "zig-evil/../zig", "./zig",
    "zig/", "link",
]  # fmt: skip


@pytest.fixture
def client(tmp_path):
    return web_client.signed_in(tmp_path / "ui")


@pytest.fixture
def folder(client):
    return client.app.state.context.folder


def names(client) -> list[str]:
    return [one["name"] for one in client.get("/api/datasets").json()["datasets"]]


def test_made_listed_and_shown(client, folder):
    assert client.get("/api/datasets").json() == {"datasets": [], "trash": []}
    made = client.post("/api/datasets", json={"name": "My cat 2"})
    assert (made.status_code, made.json()) == (201, {"name": "My cat 2", "pictures": 0, "captions": 0})
    fill(folder, 3)
    (folder / "datasets" / "zig" / "2.txt").unlink()
    (folder / "datasets" / "zig" / "sub").mkdir()
    (folder / "datasets" / "zig" / "sub" / "deep.jpg").write_bytes(png(9, format="JPEG"))
    (folder / "datasets" / "zig" / "lone.txt").write_text("x")
    (folder / "datasets" / "zig" / "notes.md").write_text("x")
    (folder / "datasets" / "zig" / "old.gif").write_text("x")
    assert client.get("/api/datasets").json()["datasets"] == [
        {"name": "My cat 2", "pictures": 0, "captions": 0},
        {"name": "zig", "pictures": 4, "captions": 2},
    ]
    details = client.get("/api/datasets/zig").json()
    assert {key: details[key] for key in ("pictures", "captions", "lone_captions", "others", "folder_path")} == {
        "pictures": 4, "captions": 2, "lone_captions": 1, "others": 2, "folder_path": "datasets/zig",
    }  # fmt: skip
    assert client.get("/datasets").status_code == 200
    shown = client.get("/datasets/My%20cat%202")
    assert shown.status_code == 200
    assert 'data-name="My cat 2"' in shown.text
    assert client.get("/datasets/none").status_code == 404


def test_names_that_are_taken_or_wrong_make_nothing(client, folder):
    client.post("/api/datasets", json={"name": "cats"})
    for name, status in (("Cats", 409), ("cats", 409), ("../x", 400), (".x", 400), ("", 400), ("a/b", 400)):
        answer = client.post("/api/datasets", json={"name": name})
        assert (answer.status_code, bool(answer.json()["error"])) == (status, True), name
    assert client.post("/api/datasets", json={"name": "a", "path": "/"}).status_code == 422
    assert names(client) == ["cats"]
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["datasets"]


def test_renamed_with_its_history_and_what_is_known_of_it(client, folder):
    fill(folder)
    saved = client.put("/api/datasets/zig/captions/0.png", json={"text": "new", "version": version(client, "0.png")})
    assert saved.status_code == 200
    before = tree(folder / "datasets" / "zig", hidden=True)
    assert client.post("/api/datasets/zig/rename", json={"name": "Zig"}).json() == {"name": "Zig"}, "capitals alone"
    assert client.post("/api/datasets/Zig/rename", json={"name": "z g"}).json() == {"name": "z g"}
    assert tree(folder / "datasets" / "z g", hidden=True) == before
    assert names(client) == ["z g"]
    client.post("/api/datasets", json={"name": "other"})
    assert client.post("/api/datasets/z%20g/rename", json={"name": "Other"}).status_code == 409
    assert client.post("/api/datasets/z%20g/rename", json={"name": "../x"}).status_code == 400
    assert client.post("/api/datasets/z%20g/history/1/undo", json={}).status_code == 200
    assert (folder / "datasets" / "z g" / "0.txt").read_text() == "a zig, number 0\n"


def version(client, key: str) -> str:
    return client.get(f"/api/datasets/zig/captions/{key}").json()["version"]


def test_removed_and_brought_back_to_the_byte(client, folder):
    fill(folder)
    before = tree(folder / "datasets" / "zig", hidden=True)
    gone = client.delete("/api/datasets/zig").json()
    assert names(client) == []
    assert client.get("/api/datasets/zig").status_code == 404
    (listed,) = client.get("/api/datasets").json()["trash"]
    assert listed == gone
    assert listed["name"] == "zig"
    assert abs(listed["at"] - time.time()) < 60
    client.post("/api/datasets", json={"name": "ZIG"})
    assert client.post(f"/api/trash/{gone['id']}/restore", json={}).status_code == 409
    client.post("/api/datasets/ZIG/rename", json={"name": "other"})
    assert client.post(f"/api/trash/{gone['id']}/restore", json={}).json() == {"name": "zig"}
    assert tree(folder / "datasets" / "zig", hidden=True) == before
    assert client.get("/api/datasets").json()["trash"] == []
    assert list((folder / "trash").iterdir()) == []


def test_deleted_for_good_only_from_the_trash(client, folder):
    fill(folder)
    gone = client.delete("/api/datasets/zig").json()["id"]
    assert client.delete(f"/api/trash/{gone}").status_code == 204
    assert client.delete(f"/api/trash/{gone}").status_code == 404
    assert list((folder / "trash").iterdir()) == []


@pytest.mark.parametrize("id", ["..", "../datasets/zig", "zig", "1-x", "%2e%2e", ".", "1-", "x" * 300])
def test_ids_of_the_trash_reach_nothing_else(client, folder, id):
    fill(folder)
    (folder / "trash").mkdir()
    before = tree(folder, hidden=True)
    for answer in (
        client.post(f"/api/trash/{quote(id, safe='')}/restore", json={}),
        client.delete(f"/api/trash/{quote(id, safe='')}"),
    ):
        assert answer.status_code in (404, 405), answer.text
    assert datasets_of(before) == datasets_of(tree(folder, hidden=True))


def test_other_things_in_the_trash_are_left_alone(client, folder):
    fill(folder)
    client.delete("/api/datasets/zig")
    for name in ("x/a", "notes-2/a", "12/a", "-/a", "-5/a", "5-empty", "6-two/a", "6-two/b", "zig/a"):
        (folder / "trash" / name).mkdir(parents=True)
    (folder / "trash" / "7-file").write_text("x")
    assert [one["name"] for one in client.get("/api/datasets").json()["trash"]] == ["zig"]


def test_a_dataset_that_has_gone_is_neither_removed_nor_renamed(tmp_path):
    library = Library(tmp_path)
    library.create("zig")
    for change in (lambda: library.remove("zag"), lambda: library.rename("zag", "x")):
        with pytest.raises(MissingError, match="there is no dataset 'zag'"):
            change()
    assert library.names() == ["zig"]


def datasets_of(found):
    return {name: data for name, data in found.items() if name.startswith("datasets/zig")}


def test_a_dataset_that_a_job_needs_is_neither_removed_nor_renamed(client, folder):
    fill(folder)
    fill(folder, name="other")
    store = client.app.state.context.store
    job = store.add(job_text("datasets/zig"), cwd=folder)
    for answer in (client.delete("/api/datasets/zig"), client.post("/api/datasets/zig/rename", json={"name": "x"})):
        assert answer.status_code == 409
        assert f"job {job.id}" in answer.json()["error"]
    assert client.delete("/api/datasets/other").status_code == 200
    store.ask_stop(job.id)
    assert client.delete("/api/datasets/zig").status_code == 200
    store.delete(job.id)
    place = fill(folder, name="Käse")
    store.add(job_text(str(place)).replace("K\\u00e4se", "K\\xe4se"), cwd=folder.parent)
    assert client.delete("/api/datasets/K%C3%A4se").status_code == 409, "escaped in its file"


def job_text(path: str) -> str:
    example = (Path(__file__).parents[2] / "examples" / "train_lora_zimage_base.yaml").read_text()
    lines = [
        f"{line.split('folder_path:')[0]}folder_path: {json.dumps(path)}" if "folder_path:" in line else line
        for line in example.splitlines()
    ]
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------------------------ what a name reaches


ROUTES = [
    ("GET", "/datasets/{}"), ("GET", "/api/datasets/{}"), ("GET", "/api/datasets/{}/pictures"),
    ("GET", "/api/datasets/{}/history"), ("GET", "/api/datasets/{}/figures"), ("GET", "/api/datasets/{}/health"),
    ("GET", "/api/datasets/{}/buckets"), ("DELETE", "/api/datasets/{}"), ("POST", "/api/datasets/{}/health"),
    ("DELETE", "/api/datasets/{}/history"), ("GET", "/api/datasets/{}/thumbnails/0.png"),
    ("GET", "/api/datasets/{}/download/0.png"),
]  # fmt: skip
KEYS = ["thumbnails", "enlarged", "download", "crops", "captions"]


@pytest.fixture
def place(client, folder):
    """A dataset with secrets around it, and links that lead to them."""
    place = fill(folder)
    for name in ("secret.txt", "secret.png", "datasets/secret.png", "datasets/zig-evil/secret.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(png(99))
    (folder / "datasets" / "link").symlink_to(folder / "datasets" / "zig-evil")
    (place / "link.png").symlink_to(folder / "secret.png")
    (place / "links").symlink_to(folder / "datasets" / "zig-evil")
    (place / ".hidden.png").write_bytes(png(98))
    return place


@pytest.mark.parametrize(("method", "route"), ROUTES)
def test_only_names_of_datasets_lead_to_one(client, place, folder, method, route):
    before = tree(folder, hidden=True)
    headers = web_client.cookie(client.app) | {"Origin": web_client.ORIGIN, "Content-Type": "application/json"}
    for name in TRAVERSAL:
        path = route.format(quote(name, safe=""))  # as it comes over the wire: clients would tidy it
        answer = web_client.ask(client.app, method, path, headers, b"{}")
        assert answer.status in (400, 404, 405), (name, answer.status, answer.body)
    after = tree(folder, hidden=True)
    after.pop("datasets/.lock", None)
    assert after == before


@pytest.mark.parametrize("what", KEYS)
def test_only_listed_pictures_are_given_out(client, place, folder, what):
    keys = [
        *TRAVERSAL, "../secret.png", "..%2fsecret.png", "../zig-evil/secret.png", "link.png", "links/secret.png",
        ".hidden.png", "0.txt", "./0.png", "0.PNG", "0.png/", "sub/../0.png", str(folder / "secret.png"), ".detour",
    ]  # fmt: skip
    for key in keys:
        for path in (quote(key, safe=""), quote(key, safe="/")):
            answer = web_client.ask(
                client.app, "GET", f"/api/datasets/zig/{what}/{path}", web_client.cookie(client.app)
            )
            assert answer.status == 404, (key, answer.body)
    answer = web_client.ask(client.app, "GET", f"/api/datasets/zig/{what}/0.png", web_client.cookie(client.app))
    assert answer.status == 200


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=40) | st.from_regex(r"(\.\.|\.|[a-z0-9/\\%;]){0,8}", fullmatch=True))
def test_whatever_is_asked_for_lies_in_the_dataset(client, place, folder, key):
    dataset = client.app.state.library.dataset("zig")
    try:
        path = dataset.picture(key)
    except UserError:
        return
    assert path.resolve().is_relative_to(place.resolve())
    assert path.parent == place


def test_a_hard_link_out_of_the_folder_is_never_written_through(client, place, folder):
    outside = folder / "outside.txt"
    outside.write_text("outside")
    (place / "0.txt").unlink()
    os.link(outside, place / "0.txt")
    caption = client.get("/api/datasets/zig/captions/0.png").json()
    assert caption["text"] == "outside"
    saved = client.put("/api/datasets/zig/captions/0.png", json={"text": "in", "version": caption["version"]})
    assert saved.status_code == 200
    assert (outside.read_text(), (place / "0.txt").read_text()) == ("outside", "in")


def test_a_link_in_a_captions_place_is_neither_followed_nor_replaced(client, place, folder):
    outside = folder / "outside.txt"
    outside.write_text("outside")
    (place / "0.txt").unlink()
    (place / "0.txt").symlink_to(outside)
    assert client.get("/api/datasets/zig/captions/0.png").json()["text"] is None
    saved = client.put("/api/datasets/zig/captions/0.png", json={"text": "in", "version": "none"})
    assert saved.status_code == 409
    add = {"action": "add", "text": "x", "make_missing": True}
    assert client.post("/api/datasets/zig/bulk/preview", json={"edit": add}).json()["changed"] == 2
    assert put(client, "0.txt", b"in", replace="true").status_code == 409
    assert (place / "0.txt").is_symlink()
    assert outside.read_text() == "outside"


def test_reading_changes_nothing_but_the_cache(client, place, folder):
    before = tree(folder, hidden=True)
    for address in (
        "/datasets", "/datasets/zig", "/api/datasets", "/api/datasets/zig", "/api/datasets/zig/pictures?q=zig",
        "/api/datasets/zig/captions/0.png", "/api/datasets/zig/figures", "/api/datasets/zig/history",
        "/api/datasets/zig/health", "/api/datasets/zig/buckets", "/api/datasets/zig/thumbnails/0.png",
        "/api/datasets/zig/enlarged/0.png", "/api/datasets/zig/crops/0.png?small=true",
        "/api/datasets/zig/crops/0.png", "/api/datasets/zig/download/0.png",
    ):  # fmt: skip
        assert client.get(address).status_code == 200, address
    after = tree(folder, hidden=True)
    assert {name for name in after if not name.startswith("cache/")} == set(before)
    assert all(after[name] == data for name, data in before.items() if not name.startswith("queue.db"))


# ---------------------------------------------------------------------------------------------------------- settings


def test_settings_are_kept_and_held_to_what_exists(client, folder):
    fill(folder)
    given = {"caption_ext": "caption", "trigger_word": "zig", "resolution": 512, "arch": "sdxl"}
    assert client.patch("/api/datasets/zig", json=given).json() == given
    assert client.patch("/api/datasets/zig", json={"resolution": 768}).json() == given | {"resolution": 768}
    details = client.get("/api/datasets/zig").json()
    assert (details["settings"]["resolution"], details["divisibility"], details["text_tokens"]) == (768, 64, 77)
    assert details["captions"] == 0, "captions end in .caption now"
    for wrong, status in (
        ({"caption_ext": "html"}, 400), ({"caption_ext": "../x"}, 400), ({"arch": "sdxxl"}, 400),
        ({"resolution": 63}, 422), ({"resolution": 99999}, 422), ({"folder": "/"}, 422),
    ):  # fmt: skip
        assert client.patch("/api/datasets/zig", json=wrong).status_code == status, wrong
    assert client.get("/api/datasets/zig").json()["settings"] == given | {"resolution": 768}


def test_damaged_settings_are_said_and_not_replaced(client, folder):
    place = fill(folder)
    (place / ".detour").mkdir()
    (place / ".detour" / "settings.json").write_text("{")
    answer = client.get("/api/datasets/zig")
    assert answer.status_code == 400
    assert "settings.json is damaged; remove it" in answer.json()["error"]


# ----------------------------------------------------------------------------------------------------- listing, locks


def test_the_listing_is_read_again_only_where_a_folder_changed(tmp_path, monkeypatch):
    place = fill(tmp_path)
    (place / "sub").mkdir()
    old = time.time() - 100
    for path in (place, place / "sub"):
        os.utime(path, (old, old))
    library, walks = Library(tmp_path), []
    walk = datasets._walk
    monkeypatch.setattr(datasets, "_walk", lambda folder: walks.append(folder) or walk(folder))
    dataset = library.dataset("zig")
    for _ in range(3):
        assert len(dataset.listing().pictures) == 3
    assert len(walks) == 1
    (place / "sub" / "new.png").write_bytes(png(9))
    assert dataset.listing().pictures == ("0.png", "1.png", "2.png", "sub/new.png")
    (place / "sub" / "new2.png").write_bytes(png(9))
    assert len(dataset.listing().pictures) == 5, "changed within the same tick of the clock, perhaps"
    (place / "sub" / "new.png").unlink()
    assert len(dataset.listing().pictures) == 4
    for folder in (place, place / "sub"):
        os.utime(folder, (old, old))
    assert len(dataset.listing().pictures) == 4
    (place / "sub" / "new3.png").write_bytes(png(9))
    os.utime(place / "sub", (old + 1, old + 1))  # unpacked by a program that sets times, say
    assert len(dataset.listing().pictures) == 5


def test_files_are_sorted_by_what_they_are(tmp_path):
    place = fill(tmp_path, 1)
    for name in (
        "B.JPG",
        "B.TXT",
        "a.b.webp",
        "a.b.txt",
        "x.txt",
        "y.HEIC",
        "v.mp4",
        "z.md",
        "none",
        "1.bmp",
        "1.jpeg",
    ):
        (place / name).write_text("x")
    listing = Library(tmp_path).dataset("zig").listing()
    assert listing.pictures == ("0.png", "1.bmp", "1.jpeg", "B.JPG", "a.b.webp")
    assert [listing.caption(key) for key in listing.pictures] == ["0.txt", None, None, "B.TXT", "a.b.txt"]
    assert (listing.lone, listing.unread, listing.others) == (["x.txt"], ("v.mp4", "y.HEIC"), ("none", "z.md"))
    assert listing.shared == {"1": ("1.bmp", "1.jpeg")}
    assert listing.captioned == 3


def test_a_change_waits_for_another_and_gives_up_with_a_sentence(tmp_path):
    fill(tmp_path)
    library = Library(tmp_path)
    held, free = threading.Event(), threading.Event()

    def hold():
        with library.locked():
            held.set()
            free.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(20)
    with pytest.raises(StateError, match="another change is still being made"), library.locked(patience=0.1):
        pass
    free.set()
    thread.join()
    with library.locked(patience=5):
        pass


def test_the_lock_holds_for_other_servers_too(tmp_path):
    fill(tmp_path)
    with FileLock(tmp_path / "datasets" / datasets.LOCK), pytest.raises(StateError), Library(tmp_path).locked(0.1):
        pass


def test_a_folder_that_vanished_is_said_and_not_made_again(client, folder):
    fill(folder)
    dataset = client.app.state.library.dataset("zig")
    (folder / "datasets").rename(folder / "moved")
    assert client.get("/api/datasets").json()["datasets"] == []
    assert put(client, "a.png", png(1)).status_code == 404
    with pytest.raises(UserError, match="there is no dataset 'zig' any more"):
        dataset.listing()
    folder.rename(folder.with_name("away"))
    assert client.post("/api/datasets", json={"name": "new"}).status_code == 503
    assert not folder.exists()
