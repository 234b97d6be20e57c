"""Uploads: what is taken, what is refused with which sentence, and that nothing half or overwritten is ever left."""

from __future__ import annotations

import http.client
import io
import socket
import threading
import time
import tracemalloc
import zlib

import pytest
import uvicorn
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import web_client
from datasets_made import fill, png, put, tree
from detour import UserError, files
from detour.jobs.states import StateError
from detour.web import dataset_views_api, uploads
from faults import Trap, disk_full, leftovers, trapped


@pytest.fixture
def client(tmp_path):
    return web_client.signed_in(tmp_path / "ui")


@pytest.fixture
def place(client):
    return fill(client.app.state.context.folder, 1)


def refused(client, place, name, data, status=400, **query):
    """Refused, and nothing is there that was not there before. Returns the sentence."""
    before = tree(place)
    answer = put(client, name, data, **query)
    assert answer.status_code == status, answer.text
    assert tree(place) == before
    assert leftovers(place) == []
    return answer.json()["error"]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
def test_pictures_and_captions_are_taken_as_they_are(client, place, kind):
    data = png(5, format=kind)
    name = f"a..b 猫.{kind.lower()}"
    assert put(client, name, data).json() == {
        "outcome": "added", "added": 1, "same": 0, "replaced": 0, "left_out": [],
    }  # fmt: skip
    assert (place / name).read_bytes() == data
    assert put(client, "a..b 猫.txt", "ein Käse\r\n".encode()).status_code == 200
    assert (place / "a..b 猫.txt").read_bytes() == "ein Käse\r\n".encode()
    assert (place / name).stat().st_mode & 0o777 == (place / "0.png").stat().st_mode & 0o777
    found = client.get("/api/datasets/zig/pictures", params={"q": "猫"}).json()["pictures"]
    assert [(one["key"], one["text"]) for one in found] == [(name, "ein Käse\r\n")]
    assert client.get("/api/datasets/zig/history").json()["changes"] == [], (
        "nothing was lost that could be brought back"
    )


def test_the_content_decides_and_a_wrong_ending_alone_is_no_fault(client, place):
    assert put(client, "named.jpg", png(5)).status_code == 200
    svg = b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"
    assert "is an SVG drawing, not a PNG" in refused(client, place, "a.png", svg)
    assert "is a web page, not a PNG" in refused(client, place, "a.png", b"<!DOCTYPE html><script>alert(1)</script>")
    assert "is a GIF" in refused(client, place, "a.png", png(1, format="GIF"))
    assert "is a TIFF" in refused(client, place, "a.jpg", png(1, format="TIFF"))
    assert "cut off or damaged" in refused(client, place, "a.png", png(1)[:-30])
    assert "is empty" in refused(client, place, "a.png", b"")
    assert "zero bytes" in refused(client, place, "a.txt", b"\0\1\2")
    assert "not UTF-8" in refused(client, place, "a.txt", "Käse".encode("utf-16"))
    assert refused(client, place, "a.txt", "Käse".encode("latin-1")).startswith("a.txt is not UTF-8")


@pytest.mark.parametrize(
    "name",
    ["a.svg", "a.html", "a.htm", "a.xml", "a.js", "a.py", "a.sh", "a", "a.png.html", "a.yaml", "a.ckpt", "a.json"],
)
def test_other_endings_are_refused_whatever_they_hold(client, place, name):
    assert f"{name} is not taken: pictures" in refused(client, place, name, png(1))


def test_pictures_in_formats_that_are_not_read_get_advice(client, place):
    for name in ("a.heic", "a.gif", "a.tiff", "a.mp4"):
        assert "convert it to PNG, JPEG or WebP" in refused(client, place, name, b"x")


@pytest.mark.parametrize("name", ["..png", ".png", "CON.png", "a:b.png", "a%00.png", "a%5Cb.png", "x" * 217 + ".png"])
def test_names_that_are_not_plain_are_refused(client, place, name):
    assert "the file's name: " in refused(client, place, name, png(1))


def test_paths_in_place_of_names_reach_no_route(client, place):
    headers = web_client.cookie(client.app) | {"Origin": web_client.ORIGIN} | web_client.UPLOAD
    before = tree(client.app.state.context.folder)
    for name in ("../a.png", "..%2fa.png", "%2e%2e/a.png", "sub/a.png", "sub%2Fa.png", "/etc/a.png", "%2Ftmp%2Fa.png"):
        answer = web_client.ask(client.app, "PUT", f"/api/datasets/zig/files/{name}", headers, png(1))
        assert answer.status in (400, 404, 405, 415), (name, answer.body)
    assert tree(client.app.state.context.folder) == before


def test_a_taken_name_is_never_overwritten_unasked(client, place):
    same = (place / "0.png").read_bytes()
    assert put(client, "0.png", same).json()["outcome"] == "same"
    assert put(client, "0.PNG", same).json()["outcome"] == "same", "capitals do not tell files apart everywhere"
    assert "there is another 0.png in this dataset already" in refused(client, place, "0.png", png(7), 409)
    assert "there is another 0.png" in refused(client, place, "0.PnG", png(7), 409)
    assert "there is another 0.txt" in refused(client, place, "0.txt", b"other", 409)
    put(client, "e\u0301.png", png(8))
    assert refused(client, place, "\u00c9.png", png(9), 409)


def test_replacing_keeps_what_was_there(client, place):
    before = tree(place)
    assert put(client, "0.PNG", png(7), replace="true").json()["outcome"] == "replaced"
    assert put(client, "0.txt", b"other", replace="true").json()["outcome"] == "replaced"
    assert tree(place) == {"0.png": png(7), "0.txt": b"other"}
    for number in (2, 1):
        assert client.post(f"/api/datasets/zig/history/{number}/undo", json={}).status_code == 200
    assert tree(place) == before


def test_a_folder_or_link_in_the_way_is_left_alone(client, place):
    (place / "sub.png").mkdir()
    (place / "link.png").symlink_to(place / "0.png")
    for name in ("sub.png", "SUB.png", "link.png"):
        for query in ({}, {"replace": "true"}):
            answer = put(client, name, png(9), **query)
            assert answer.status_code == 409
            assert "is in the way" in answer.json()["error"]
    assert (place / "link.png").is_symlink()


def test_the_ending_of_captions_is_the_datasets(client, place):
    assert "is not taken" in refused(client, place, "0.caption", b"x")
    client.patch("/api/datasets/zig", json={"caption_ext": "caption"})
    assert put(client, "0.caption", b"x").status_code == 200
    assert put(client, "1.txt", b"x").status_code == 200


def test_a_polyglot_is_never_shown_as_what_else_it_is(client, place):
    info = PngInfo()
    info.add_text("Comment", "<script>alert(1)</script>")
    data = png(5, pnginfo=info) + b"<html><script>alert(2)</script>"
    assert put(client, "p.png", data).status_code == 200
    for what in ("thumbnails", "enlarged", "crops"):
        shown = client.get(f"/api/datasets/zig/{what}/p.png")
        assert shown.status_code == 200
        assert b"script" not in shown.content
        assert shown.headers["content-type"] in ("image/webp", "image/png")
        assert shown.headers["x-content-type-options"] == "nosniff"
    saved = client.get("/api/datasets/zig/download/p.png")
    assert saved.content == data
    assert saved.headers["content-type"] == "application/octet-stream"
    assert saved.headers["content-disposition"].startswith("attachment; filename*=UTF-8''p.png")
    assert saved.headers["x-content-type-options"] == "nosniff"


# ------------------------------------------------------------------------------------------------------------- limits


def test_too_much_is_refused_before_it_comes_or_as_it_comes(client, place, monkeypatch):
    assert "a.txt is too large: at most 64 KiB" in refused(client, place, "a.txt", b"x" * 65537, 413)
    monkeypatch.setattr(uploads, "PICTURE", 1 << 20)
    assert "at most 1 MiB" in refused(client, place, "a.png", b"x" * ((1 << 20) + 1), 413)
    read = []

    def unending():
        while True:
            read.append(65536)
            yield bytes(65536)

    # Without a length; the body ends only because it is not read on.
    before = tree(place)
    answer = client.put("/api/datasets/zig/files/a.png", content=limited(unending()), headers=web_client.UPLOAD)
    assert answer.status_code == 413
    assert tree(place) == before


def limited(chunks, most=64):
    for _ in range(most):
        yield next(chunks)


def test_what_is_announced_as_too_large_is_not_read_at_all(client, place):
    dataset = client.app.state.library.dataset("zig")

    def chunks():
        pytest.fail("was read")
        yield b""

    with pytest.raises(Exception, match="too large"):
        uploads.receive(dataset, "a.png", chunks(), uploads.PICTURE + 1, replace=False)


def test_a_large_upload_is_never_held_in_memory(client, place):
    dataset = client.app.state.library.dataset("zig")
    chunk = bytes(65536)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="the ZIP is damaged or no ZIP"):
            uploads.receive(dataset, "a.zip", (chunk for _ in range(1600)), None, replace=False)  # 100 MiB
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 << 20
    assert leftovers(place) == []


def test_a_dataset_holds_only_so_many_files(client, place, monkeypatch):
    monkeypatch.setattr(uploads, "FILES", 2)
    assert "at most 2 files" in refused(client, place, "a.png", png(1))


def test_a_full_disk_is_said_and_leaves_nothing(client, place, monkeypatch):
    monkeypatch.setattr(files, "free_bytes", lambda path: 1000)
    assert "free some" in refused(client, place, "a.png", png(1), 507)
    monkeypatch.undo()
    for _ in range(2):  # the first makes the folder for what is not part of the dataset
        with trapped(Trap()) as dry:
            assert put(client, "a.png", png(1)).status_code == 200
        (place / "a.png").unlink()
    writes = [at for at, (name, _) in enumerate(dry.calls) if name in ("_open", "_write", "_fsync", "_mkdir")]
    assert len(writes) > 3
    for at in writes:
        with trapped(Trap(at, "before", disk_full())):
            answer = put(client, "a.png", png(1))
        assert answer.status_code == 507, (at, answer.text)
        assert leftovers(place) == []
        (place / "a.png").unlink(missing_ok=True)  # it had its name already, when its folder could not be synced


def test_a_dataset_that_goes_while_a_file_comes_is_not_made_again(client, place):
    dataset = client.app.state.library.dataset("zig")

    def chunks():
        yield png(1)
        client.app.state.library.remove("zig")

    with pytest.raises((UserError, OSError)):
        uploads.receive(dataset, "a.png", chunks(), None, replace=False)
    assert not place.exists()
    assert client.get("/api/datasets").json()["datasets"] == []


# ------------------------------------------------------------------------------------------------- over a real socket


@pytest.fixture
def server(client):
    """The app behind a real server; its port, and the headers of a page that is logged in."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    site = client.app.state.site
    object.__setattr__(site, "names", frozenset({f"127.0.0.1:{port}"}))
    server = uvicorn.Server(uvicorn.Config(client.app, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    headers = {
        "Host": f"127.0.0.1:{port}",
        "Origin": f"http://127.0.0.1:{port}",
        "Cookie": web_client.cookie(client.app)["Cookie"],
        **web_client.UPLOAD,
    }
    yield port, headers
    server.should_exit = True
    thread.join(20)


def begin(port: int, headers: dict[str, str], name: str, length: int) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=20)
    lines = [f"PUT /api/datasets/zig/files/{name} HTTP/1.1", *(f"{key}: {value}" for key, value in headers.items())]
    connection.sendall("\r\n".join([*lines, f"Content-Length: {length}", "", ""]).encode())
    return connection


def until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("name", ["cut.png", "cut.txt", "cut.zip"])
def test_an_upload_that_is_cut_off_leaves_nothing(server, place, name):
    port, headers = server
    before = tree(place, hidden=True)
    connection = begin(port, headers, name, 50_000)
    connection.sendall(png(1)[:300] if name != "cut.txt" else b"half a capt")
    until(lambda: leftovers(place))
    connection.close()
    until(lambda: not leftovers(place))
    assert tree(place, hidden=True) == before


def test_an_upload_that_falls_silent_is_given_up(server, place, monkeypatch):
    monkeypatch.setattr(dataset_views_api, "SILENCE", 0.3)
    port, headers = server
    connection = begin(port, headers, "slow.png", 50_000)
    connection.sendall(b"a beginning")
    answer = http.client.HTTPResponse(connection)
    answer.begin()
    assert answer.status == 400
    assert b"cut off" in answer.read()
    assert leftovers(place) == []
    connection.close()


def test_several_at_once_and_no_more_than_so_many(server, client, place, monkeypatch):
    monkeypatch.setattr(dataset_views_api, "_UPLOADS", threading.BoundedSemaphore(3))
    port, headers = server
    bodies = [png(seed) for seed in range(10, 14)]
    waiting = [begin(port, headers, f"{place}.png", len(bodies[place])) for place in range(1, 4)]
    for number, connection in enumerate(waiting, 1):
        connection.sendall(bodies[number][:100])
    until(lambda: len([name for name in leftovers(place) if name.startswith("scratch")]) == 3)
    refused_one = begin(port, headers, "4.png", 10)
    refused_one.sendall(b"x" * 10)
    answer = http.client.HTTPResponse(refused_one)
    answer.begin()
    assert answer.status == 429
    for number, connection in enumerate(waiting, 1):
        connection.sendall(bodies[number][100:])
    for number, connection in enumerate(waiting, 1):
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        assert answer.status == 200, answer.read()
        assert (place / f"{number}.png").read_bytes() == bodies[number]
        connection.close()
    assert leftovers(place) == []
    assert put(client, "5.png", png(20)).status_code == 200, "their places are free again"


def test_the_same_name_from_two_sides_is_taken_once(client, place, monkeypatch):
    class Slow(uploads._Room):
        def __init__(self, *given, **named):
            super().__init__(*given, **named)
            time.sleep(0.1)  # time for the others to see the same

    monkeypatch.setattr(uploads, "_Room", Slow)
    answers, refused, start = [], [], threading.Barrier(4)
    dataset = client.app.state.library.dataset("zig")

    def send(seed: int) -> None:
        start.wait(20)
        try:
            answers.append((seed, uploads.receive(dataset, "one.png", [png(seed)], None, replace=False).outcome))
        except StateError:
            refused.append(seed)

    threads = [threading.Thread(target=send, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    ((seed, outcome),) = answers
    assert len(refused) == 3
    assert outcome == "added"
    assert (place / "one.png").read_bytes() == png(seed)


def test_what_killed_servers_left_is_tidied_up(tmp_path):
    place = fill(tmp_path / "ui", 1)
    stale = place / ".detour" / "scratch.tmp-000000-999999999-00000000"
    stale.mkdir(parents=True)
    (stale / "incoming.png").write_bytes(b"half")
    host = files._HOST
    stale.rename(stale.with_name(f"scratch.tmp-{host}-999999999-00000000"))
    web_client.signed_in(tmp_path / "ui")
    assert leftovers(place) == []


def test_pixels_are_checked_before_they_are_decoded(client, place):
    """A PNG that says 100 000 x 100 000."""
    out = io.BytesIO()
    Image.new("1", (8, 8)).save(out, "PNG")
    data = bytearray(out.getvalue())
    data[16:24] = (100_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    assert "is too large" in refused(client, place, "bomb.png", bytes(data))
