"""The health report of the UI: made in the background, each picture looked at once, and the buckets that follow."""

from __future__ import annotations

import threading
import time

import pytest

import web_client
from datasets_made import fill, png
from detour import UserError, archs
from detour.config.job import DatasetConfig
from detour.data import buckets, images, order
from detour.data.scan import scan
from detour.nano import concepts
from detour.web import dataset_health
from detour.web.dataset_health import Health
from detour.web.datasets import Library, Settings
from detour.web.thumbnails import Cut


@pytest.fixture
def client(tmp_path):
    return web_client.signed_in(tmp_path / "ui")


@pytest.fixture
def place(client):
    return fill(client.app.state.context.folder, 4)


@pytest.fixture
def looks(monkeypatch):
    """Counts which pictures are looked at."""
    found, real = [], images.check
    monkeypatch.setattr(images, "check", lambda path, *more: found.append(path.name) or real(path, *more))
    return found


def report(client, name="zig", start=True):
    address = f"/api/datasets/{name}/health"
    found = client.post(address, json={}).json() if start else client.get(address).json()
    end = time.monotonic() + 60
    while found["state"] == "running":
        assert time.monotonic() < end
        time.sleep(0.02)
        found = client.get(address).json()
    return found


def kinds(found) -> dict[str, list[list[str]]]:
    return {one["kind"]: [item["keys"] for item in one["items"]] for one in found["findings"]}


def test_a_clean_drawn_set_is_healthy(client):
    folder = client.app.state.context.folder
    concepts.write_dataset(folder / "datasets" / "mip", "mip")
    client.patch("/api/datasets/mip", json={"resolution": 128, "trigger_word": "mip"})
    assert client.get("/api/datasets/mip/health").json()["state"] == "none"
    found = report(client, "mip")
    assert (found["state"], found["done"], found["total"], found["pictures"]) == ("done", 24, 24, 24)
    assert found["findings"] == []
    assert abs(found["at"] - time.time()) < 60


def test_findings_say_what_where_why_and_what_to_do(client, place):
    client.patch("/api/datasets/zig", json={"resolution": 64, "trigger_word": "zig"})
    (place / "cut.png").write_bytes(png(5)[:-30])
    (place / "copy.png").write_bytes(png(0))
    (place / "copy.txt").write_text("a zig, number 0")
    (place / "1.txt").write_bytes(b"\xff")
    (place / "2.txt").write_text("")
    (place / "3.txt").write_text("no such word")
    (place / "lone.txt").write_text("x")
    (place / "y.heic").write_text("x")
    (place / "0.jpg").write_bytes(png(8, format="JPEG", size=(80, 80)))
    found = report(client)
    assert kinds(found) == {
        "unusable": [["cut.png"]], "unread": [["y.heic"]], "shared_name": [["0.jpg", "0.png"]],
        "missing_caption": [["cut.png"]], "unreadable_caption": [["1.png"]], "duplicate": [["0.png", "copy.png"]],
        "small": [["0.png"], ["1.png"], ["2.png"], ["3.png"], ["copy.png"]], "empty_caption": [["2.png"]],
        "no_trigger": [["3.png"]], "lone_caption": [["lone.txt"]], "same_caption": [["0.jpg", "0.png"]],
    }  # fmt: skip
    for one in found["findings"]:
        assert all(one[part] for part in ("severity", "title", "why", "advice"))
        assert one["count"] == len(one["items"])
    assert "cut off or damaged" in found["findings"][0]["items"][0]["note"]


def test_each_picture_is_looked_at_once_across_restarts_and_renames(client, place, looks):
    folder = client.app.state.context.folder
    report(client)
    assert sorted(looks) == ["0.png", "1.png", "2.png", "3.png"]
    (place / "0.txt").write_text("a caption that is new")
    assert report(client)["state"] == "done"
    again = web_client.signed_in(folder)
    assert report(again)["pictures"] == 4
    again.post("/api/datasets/zig/rename", json={"name": "zag"})
    report(again, "zag")
    report(web_client.signed_in(folder), "zag")
    assert len(looks) == 4
    (folder / "datasets" / "zag" / "1.png").write_bytes(png(9))
    report(again, "zag")
    assert looks[4:] == ["1.png"]
    again.patch("/api/datasets/zag", json={"resolution": 512})
    report(again, "zag")
    assert sorted(looks[5:]) == ["0.png", "1.png", "2.png", "3.png"], "sharpness is measured at the resolution"


def test_captions_are_read_anew_each_time(client, place):
    assert "empty_caption" not in kinds(report(client))
    (place / "0.txt").write_text("")
    assert kinds(report(client))["empty_caption"] == [["0.png"]]


def test_what_is_kept_may_be_damaged_or_deleted(client, place, looks):
    first = report(client)
    file = client.app.state.context.folder / "cache" / "health" / "zig.json"
    for text in ("{", "[]", '{"version": 99, "pictures": {}}', '{"version": 1, "pictures": {"0.png": [1]}}'):
        file.write_text(text)
        found = report(web_client.signed_in(client.app.state.context.folder))
        assert kinds(found) == kinds(first)
    assert len(looks) == 20


def test_progress_can_be_followed_and_a_second_request_joins(client, place, monkeypatch):
    go, real = threading.Semaphore(0), images.check

    def check(*given):
        assert go.acquire(timeout=20)
        return real(*given)

    monkeypatch.setattr(images, "check", check)
    address = "/api/datasets/zig/health"
    assert client.post(address, json={}).json()["state"] == "running"
    go.release()
    go.release()
    wait(lambda: client.get(address).json()["done"] == 2)
    now = client.post(address, json={}).json()
    assert (now["state"], now["done"], now["total"], now["findings"]) == ("running", 2, 4, [])
    for _ in range(2):
        go.release()
    assert report(client, start=False)["done"] == 4


def wait(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_another_aim_takes_the_place_of_the_first(tmp_path, monkeypatch):
    fill(tmp_path, 8)
    dataset = Library(tmp_path).dataset("zig")
    health, go, real = Health(dataset.library), threading.Event(), images.check
    monkeypatch.setattr(images, "check", lambda *given: go.wait(20) and real(*given))
    first = health.start(dataset, dataset_health.aim_of(Settings(resolution=512)))
    second = health.start(dataset, dataset_health.aim_of(Settings(resolution=64)))
    go.set()
    wait(lambda: second.state == "done" and first.state == "failed")
    assert health.look("zig") is second
    assert first.done < 8, "it stopped looking"


def test_what_goes_wrong_ends_the_report_with_a_sentence(client, place, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    monkeypatch.setattr(images, "check", lambda *_: 1 / 0)
    found = report(client)
    assert found["state"] == "failed"
    assert "the server's terminal shows where" in found["problem"]
    monkeypatch.setattr(dataset_health, "_look_at", lambda *_: (_ for _ in ()).throw(UserError("no space")))
    assert report(client)["problem"] == "no space"


def test_pictures_that_go_meanwhile_are_passed_over(client, place, monkeypatch):
    real = dataset_health._look

    def look(path, resolution):
        if path.name == "1.png":
            path.unlink()
        return real(path, resolution)

    monkeypatch.setattr(dataset_health, "_look", look)
    found = report(client)
    assert (found["state"], found["done"]) == ("done", 4)
    assert not any(["1.png"] in keys for keys in kinds(found).values())


def test_only_so_many_datasets_are_held_in_memory(client):
    folder = client.app.state.context.folder
    for number in range(dataset_health.REMEMBERED + 3):
        fill(folder, 1, f"set {number}")
        report(client, f"set {number}")
    assert len(client.app.state.health._works) <= dataset_health.REMEMBERED + 1


def test_long_lists_are_cut_and_counted(client, monkeypatch):
    fill(client.app.state.context.folder, 5)
    from detour.web import dataset_views_api

    monkeypatch.setattr(dataset_views_api, "LISTED", 2)
    (tiny, *_) = [one for one in report(client)["findings"] if one["kind"] == "tiny"]
    assert (tiny["count"], len(tiny["items"])) == (5, 2)


def test_the_default_model_is_a_distilled_one():
    name = dataset_health.default_arch()
    assert archs.spec(name).default.distilled
    aim = dataset_health.aim_of(Settings(arch="sdxl", trigger_word=" zig ", resolution=768))
    assert (aim.divisibility, aim.text_tokens, aim.trigger, aim.resolution) == (64, 77, "zig", 768)
    assert dataset_health.aim_of(Settings()).trigger is None


# ------------------------------------------------------------------------------------------------------------ buckets


@pytest.mark.parametrize("upscale", [False, True])
@pytest.mark.parametrize("arch", ["zimage", "sdxl"])
def test_buckets_are_those_of_training(client, place, arch, upscale):
    for seed, size in enumerate([(640, 640), (300, 500), (301, 499), (900, 200), (63, 200), (70, 70), (16, 16)], 10):
        (place / f"{seed}.png").write_bytes(png(seed, size))
        (place / f"{seed}.txt").write_text("x")
    (place / "cut.png").write_bytes(png(1)[:-30])
    report(client)
    query = {"arch": arch, "resolution": 256, "upscale": upscale}
    found = client.get("/api/datasets/zig/buckets", params=query).json()
    divisibility = archs.spec(arch).bucket_divisibility
    config = DatasetConfig(folder_path=place, resolution=[256], upscale=upscale, bad_images="skip")
    scanned = scan([config], trigger=None, divisibility=divisibility)
    expected: dict[tuple[int, int], set[str]] = {}
    for item in order.make_items(scanned.pictures, [config], divisibility):
        expected.setdefault((item.bucket.width, item.bucket.height), set()).add(item.picture.key)
    shown = {(one["width"], one["height"]): {each["key"] for each in one["pictures"]} for one in found["buckets"]}
    assert shown == expected
    assert [one["count"] for one in found["buckets"]] == sorted(map(len, expected.values()), reverse=True)
    assert found["unknown"] == len(client.app.state.library.dataset("zig").listing().pictures) - len(scanned.pictures)
    assert (found["divisibility"], found["resolution"], found["upscale"]) == (divisibility, 256, upscale)


def test_the_share_that_is_seen_is_that_of_the_crop(client, place):
    (place / "wide.png").write_bytes(png(20, (700, 300)))
    report(client)
    dataset = client.app.state.library.dataset("zig")
    seen = client.app.state.health.seen(dataset, dataset.listing())
    one = {"wide.png": seen["wide.png"]}
    (bucket,) = dataset_health.filled(one, Cut(resolution=256, divisibility=64))
    plan = buckets.plan(700, 300, 256, 64)
    assert bucket.kept == plan.width * plan.height / (plan.scaled_w * plan.scaled_h)
    assert 0.5 < bucket.kept <= 1


def test_pictures_that_were_not_looked_at_are_counted(client, place):
    found = client.get("/api/datasets/zig/buckets").json()
    assert (found["buckets"], found["unknown"]) == ([], 4)
