"""What pages show of pictures: small ones made once, and crops that are training's to the last pixel."""

from __future__ import annotations

import io
import os

import numpy as np
import pytest
from PIL import Image

import web_client
from datasets_made import fill, png
from detour import archs, files
from detour.config.job import DatasetConfig
from detour.data import images, order
from detour.data.scan import scan
from detour.web import thumbnails
from detour.web.thumbnails import Cut
from faults import Trap, disk_full, trapped
from photographs import write_photographs


@pytest.fixture
def client(tmp_path):
    return web_client.signed_in(tmp_path / "ui")


@pytest.fixture
def place(client):
    return fill(client.app.state.context.folder, 2)


def opened(answer) -> Image.Image:
    assert answer.status_code == 200, answer.text
    return Image.open(io.BytesIO(answer.content))


@pytest.fixture
def draws(monkeypatch):
    """Counts how often a picture is decoded."""
    found, real = [], images.small
    monkeypatch.setattr(images, "small", lambda path, *more: found.append(path.name) or real(path, *more))
    return found


def test_made_once_and_again_only_when_the_picture_changes(client, place, draws):
    first = client.get("/api/datasets/zig/thumbnails/0.png")
    assert opened(first).format == "WEBP"
    assert client.get("/api/datasets/zig/thumbnails/0.png").content == first.content
    client.app.state.library.rename("zig", "zag")
    assert client.get("/api/datasets/zag/thumbnails/0.png").content == first.content
    assert draws == ["0.png"]
    path = place.with_name("zag") / "0.png"
    path.write_bytes(png(77))
    changed = client.get("/api/datasets/zag/thumbnails/0.png")
    assert changed.content != first.content
    path.write_bytes(png(0))
    assert client.get("/api/datasets/zag/thumbnails/0.png").content == first.content
    assert len(draws) == 3


def test_they_survive_the_server_and_may_be_deleted(client, place, draws):
    folder = client.app.state.context.folder
    first = client.get("/api/datasets/zig/thumbnails/0.png").content
    again = web_client.signed_in(folder)
    assert again.get("/api/datasets/zig/thumbnails/0.png").content == first
    assert draws == ["0.png"]
    for path in (folder / "cache").rglob("*.webp"):
        path.unlink()
    assert again.get("/api/datasets/zig/thumbnails/0.png").content == first


def test_small_upright_and_flat(client, place):
    exif = Image.Exif()
    exif[0x0112] = 6
    wide = Image.new("RGB", (2000, 1000), "red")
    wide.paste("blue", (0, 500, 2000, 1000))
    wide.save(place / "w.jpg", exif=exif)
    Image.new("RGBA", (50, 50), (0, 0, 0, 0)).save(place / "clear.png")
    shown = opened(client.get("/api/datasets/zig/thumbnails/w.jpg"))
    assert shown.size == (160, 320)
    right, left = shown.getpixel((150, 100)), shown.getpixel((10, 100))
    assert right[0] > 200 > right[2]
    assert left[2] > 200 > left[0]
    assert opened(client.get("/api/datasets/zig/enlarged/w.jpg")).size == (800, 1600)
    assert opened(client.get("/api/datasets/zig/thumbnails/clear.png")).convert("RGB").getpixel((25, 25)) == (255,) * 3
    assert opened(client.get("/api/datasets/zig/thumbnails/0.png")).size == (64, 48), "never enlarged"


def test_addresses_that_hold_the_version_may_be_kept(client, place):
    (picture, _) = client.get("/api/datasets/zig/pictures").json()["pictures"]
    for what in ("thumbnails", "enlarged", "crops"):
        address = f"/api/datasets/zig/{what}/0.png"
        assert "immutable" in client.get(f"{address}?v={picture['v']}").headers["cache-control"]
        assert client.get(address).headers["cache-control"] == "no-store"
    (place / "0.png").write_bytes(png(50))
    assert client.get("/api/datasets/zig/pictures").json()["pictures"][0]["v"] != picture["v"]


def test_what_cannot_be_shown_is_an_error_and_no_file(client, place):
    (place / "cut.png").write_bytes(png(1)[:-30])
    (place / "web.png").write_text("<svg onload=alert(1)>")
    for name in ("cut.png", "web.png"):
        for what in ("thumbnails", "enlarged", "crops"):
            answer = client.get(f"/api/datasets/zig/{what}/{name}")
            assert answer.status_code == 400
            assert answer.json()["error"].startswith(f"{name} is ")
    assert list((client.app.state.context.folder / "cache").rglob("*.webp")) == []


def test_a_full_disk_only_means_that_they_are_made_again(client, place, draws):
    with trapped(Trap()) as dry:
        first = client.get("/api/datasets/zig/thumbnails/0.png").content
    at = next(at for at, (name, _) in enumerate(dry.calls) if name == "_write")
    for path in (client.app.state.context.folder / "cache").rglob("*.webp"):
        path.unlink()
    with trapped(Trap(1, "before", disk_full())):
        assert client.get("/api/datasets/zig/thumbnails/0.png").content == first
    assert at > 0
    assert client.get("/api/datasets/zig/thumbnails/0.png").content == first
    assert list((client.app.state.context.folder / "cache").rglob("*.tmp-*")) == []


def test_the_identity_of_a_file_follows_it(tmp_path):
    (tmp_path / "a").write_bytes(b"x")
    first = thumbnails.identity(tmp_path / "a")
    files.move([(tmp_path / "a", tmp_path / "sub" / "b")])
    assert thumbnails.identity(tmp_path / "sub" / "b") == first
    os.utime(tmp_path / "sub" / "b", ns=(5, 5))
    assert thumbnails.identity(tmp_path / "sub" / "b") != first


# -------------------------------------------------------------------------------------------------------------- crops


@pytest.mark.parametrize(("arch", "upscale"), [("zimage", False), ("sdxl", True), ("flux", False)])
def test_crops_are_what_training_sees_to_the_last_pixel(client, place, arch, upscale):
    paths = write_photographs(place)
    for path in paths[4:6]:
        path.unlink()
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.open(paths[0]).convert("RGB").crop((0, 0, 500, 300)).save(place / "turned.jpg", exif=exif)
    clear = Image.open(paths[2]).convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    clear.save(place / "clear.png")
    Image.open(paths[1]).convert("CMYK").save(place / "print.jpg")
    for extra in ("turned", "clear", "print"):
        (place / f"{extra}.txt").write_text("x")
    divisibility = archs.spec(arch).bucket_divisibility
    config = DatasetConfig(folder_path=place, resolution=[384], upscale=upscale, bad_images="skip")
    scanned = scan([config], trigger=None, divisibility=divisibility)
    items = order.make_items(scanned.pictures, [config], divisibility)
    assert len(items) == 10
    sizes = set()
    for item in items:
        transform = order.transform_of(item, config, 0)
        (trained,) = images.pixels(item.picture.path, item.picture.sha256, [transform])
        query = {"resolution": 384, "arch": arch, "upscale": upscale}
        shown = opened(client.get(f"/api/datasets/zig/crops/{item.picture.key}", params=query))
        assert shown.format == "PNG"
        assert np.array_equal(np.asarray(shown), trained), item.picture.key
        sizes.add(shown.size)
    assert len(sizes) > 2
    small = opened(client.get("/api/datasets/zig/crops/coffee.png", params=query | {"small": True}))
    expected = opened(client.get("/api/datasets/zig/crops/coffee.png", params=query))
    expected.thumbnail((320, 320), images.RESAMPLE, reducing_gap=3.0)
    assert small.size == expected.size
    assert np.abs(np.asarray(small, int) - np.asarray(expected, int)).mean() < 6, "a WebP of it"


def test_crops_are_kept_apart_by_what_decides_them(client, place):
    path, cache = place / "0.png", client.app.state.context.folder / "cache"
    Image.open(write_photographs(place)[0]).save(path)
    cuts = [Cut(resolution=r, divisibility=d, upscale=u) for r in (64, 96) for d in (16, 32) for u in (False, True)]
    made = [thumbnails.crop_thumbnail(path, cut, cache) for cut in cuts]
    again = [thumbnails.crop_thumbnail(path, cut, cache) for cut in cuts]
    assert made == again
    assert len(list(cache.rglob("*.webp"))) == len(cuts)


@pytest.mark.parametrize("query", ["resolution=63", "resolution=5000", "arch=none", "resolution=x"])
def test_crops_are_asked_for_within_limits(client, place, query):
    assert client.get(f"/api/datasets/zig/crops/0.png?{query}").status_code in (400, 422)
