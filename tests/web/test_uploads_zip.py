"""ZIPs: honest ones are unpacked whole; each trick in the corpus is refused with a sentence, and nothing is written."""

from __future__ import annotations

import contextlib
import io
import stat
import struct
import tracemalloc
import zipfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import web_client
from datasets_made import fill, png, put, tree
from detour import UserError, files
from detour.web import dataset_names, uploads, zips
from faults import folder_in_memory, leftovers


@pytest.fixture
def client(tmp_path):
    with folder_in_memory(tmp_path) as folder:
        yield web_client.signed_in(folder / "ui")


@pytest.fixture
def place(client):
    return fill(client.app.state.context.folder, 1)


def pack(entries, compression=zipfile.ZIP_DEFLATED) -> bytes:
    """A ZIP of (name or ZipInfo, bytes)."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, data in entries:
            archive.writestr(name, data, compression)
    return out.getvalue()


def info(name: str, mode: int = 0o100644, **values) -> zipfile.ZipInfo:
    made = zipfile.ZipInfo(name)
    made.external_attr = mode << 16
    for key, value in values.items():
        setattr(made, key, value)
    return made


def refused(client, place, data, status=400, name="a.zip", **query):
    """Refused whole. Returns the sentence."""
    root = client.app.state.context.folder
    before = tree(root, hidden=True)
    before.pop("datasets/.lock", None)
    answer = put(client, name, data, **query)
    assert answer.status_code == status, answer.text
    after = tree(root, hidden=True)
    after.pop("datasets/.lock", None)
    assert after == before
    assert leftovers(place) == []
    return answer.json()["error"]


# ----------------------------------------------------------------------------------------------------------- honest


def test_a_zip_is_unpacked_as_one_change_that_can_be_undone(client, place):
    before = tree(place)
    entries = [
        ("x.png", png(1)),
        ("x.txt", b"ex"),
        ("sub/y y.jpg", png(2, format="JPEG")),
        ("sub/y y.txt", "üps".encode()),
    ]
    answer = put(client, "cats.zip", pack(entries)).json()
    assert answer == {"outcome": "added", "added": 4, "same": 0, "replaced": 0, "left_out": []}
    assert tree(place) == before | dict(entries)
    (change,) = client.get("/api/datasets/zig/history").json()["changes"]
    assert (change["title"], change["count"]) == ("Added 4 files from cats.zip", 4)
    assert client.post(f"/api/datasets/zig/history/{change['id']}/undo", json={}).status_code == 200
    assert tree(place) == before
    assert put(client, "cats.zip", pack(entries)).json()["added"] == 4


def test_a_folder_that_holds_everything_is_left_away(client, place):
    entries = [("my cats/", b""), ("my cats/x.png", png(1)), ("my cats/sub/y.png", png(2))]
    assert put(client, "a.zip", pack(entries)).json()["added"] == 2
    assert {"x.png", "sub/y.png"} < set(tree(place))


def test_what_systems_leave_in_zips_is_passed_over(client, place):
    litter = [
        "__MACOSX/._x.png",
        ".DS_Store",
        "sub/.DS_Store",
        "Thumbs.db",
        ".git/config",
        ".detour/history/000001/done",
    ]
    answer = put(client, "a.zip", pack([("x.png", png(1)), *((name, b"z") for name in litter)])).json()
    assert (answer["added"], answer["left_out"]) == (1, [])
    assert "x.png" in tree(place)
    assert client.get("/api/datasets/zig/history").json()["changes"][0]["count"] == 1


def test_what_cannot_be_used_is_left_out_and_named(client, place):
    entries = [
        ("x.png", png(1)), ("cut.png", png(2)[:-40]), ("web.png", b"<html>"), ("z.txt", b"\0"), ("README.md", b"r"),
        ("x.svg", b"<svg>"), ("m.jsonl", b"{}"), ("y.heic", b"h"), ("run.sh", b"rm"), ("page.html", b"<script>"),
    ]  # fmt: skip
    answer = put(client, "a.zip", pack(entries)).json()
    assert answer["added"] == 1
    reasons = {text.split(":")[0].split(" ")[0]: text for text in answer["left_out"]}
    assert set(reasons) == {name for name, _ in entries[1:]}
    assert "cut off or damaged" in reasons["cut.png"]
    assert "in a format that is not read" in reasons["y.heic"]
    assert set(tree(place)) == {"0.png", "0.txt", "x.png"}
    assert "nothing in b.zip can be used: README.md" in refused(client, place, pack(entries[4:5]), name="b.zip")
    assert "it is empty" in refused(client, place, pack([]))


def test_files_that_are_there_are_not_overwritten_unasked(client, place):
    there = tree(place)
    entries = [("0.PNG", there["0.png"]), ("0.txt", b"other"), ("x.png", png(1))]
    said = refused(client, place, pack(entries), 409)
    assert "other files of these names already: 0.txt; nothing was changed" in said
    answer = put(client, "a.zip", pack(entries), replace="true").json()
    assert answer == {"outcome": "replaced", "added": 1, "same": 1, "replaced": 1, "left_out": []}
    assert tree(place) == there | {"0.txt": b"other", "x.png": png(1)}
    client.post("/api/datasets/zig/history/1/undo", json={})
    assert tree(place) == there
    assert put(client, "a.zip", pack(entries[:1])).json()["outcome"] == "same"


def test_folders_whose_names_differ_in_capitals_are_one(client, place):
    (place / "Cats").mkdir()
    (place / "Cats" / "a.png").write_bytes(png(3))
    answer = put(client, "a.zip", pack([("cats/b.png", png(4)), ("x.png", png(5))]))
    assert answer.json()["added"] == 2
    assert (place / "Cats" / "b.png").exists()
    assert not (place / "cats").exists()
    (place / "Link").symlink_to(place / "Cats")
    for name in ("link/c.png", "0.png/c.png"):
        assert "is in the way" in refused(client, place, pack([(name, png(6)), ("y.png", png(7))]), 409)


# ----------------------------------------------------------------------------------------------------------- tricks


SLIPS = [
    "../x.png", "a/../../x.png", "a/..", "..", "/etc/x.png", "//host/x.png", "\\x.png", "a\\..\\x.png", "C:/x.png",
    "C:x.png",
    "./x.png", "a/./x.png",
]  # fmt: skip


@pytest.mark.parametrize("name", SLIPS)
def test_names_that_lead_out_refuse_the_whole(client, place, name):
    said = refused(client, place, pack([("fine.png", png(1)), (name, png(2))]))
    assert "no plain name" in said or "leads out of its folder" in said
    assert not (place.parent / "x.png").exists()


@pytest.mark.parametrize(
    "name", ["CON.png", "a?.png", "a\nb.png", "a .png/x.png".replace(" .png/", " /"), "x" * 230 + ".png"]
)
def test_names_that_no_file_should_have_refuse_the_whole(client, place, name):
    assert "the ZIP holds a name that cannot be used: " in refused(
        client, place, pack([("a.png", png(1)), (name, png(2))])
    )


def test_a_zero_byte_in_a_name_refuses_the_whole(client, place):
    data = pack([("xxxx.png", png(1))]).replace(b"xxxx.png", b"x\0xx.png")
    assert "no plain name" in refused(client, place, data)


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFSOCK])
def test_links_and_devices_refuse_the_whole(client, place, kind):
    entries = [("fine.png", png(1)), (info("x.png", kind | 0o777), b"/etc/passwd")]
    assert "which is a link or device" in refused(client, place, pack(entries))


def test_passwords_and_other_compressions_refuse_the_whole(client, place):
    data = bytearray(pack([("x.png", png(1))], zipfile.ZIP_STORED))
    central = data.index(b"PK\x01\x02")
    data[central + 8] |= 1
    data[6] |= 1
    assert "has a password" in refused(client, place, bytes(data))
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        assert "compressed in a way that is not read" in refused(client, place, pack([("x.png", png(1))], method))


@pytest.mark.parametrize(
    "names",
    [("a.png", "A.png"), ("a.png", "a.png"), ("é.png", "e\u0301.png"), ("s/a.png", "S/b.png"), ("a.png", "a.png/b.png"),
     ("ß.png", "SS.png")],
)  # fmt: skip
def test_names_that_are_one_on_some_systems_refuse_the_whole(client, place, names):
    with pytest.warns(UserWarning) if names[0] == names[1] else contextlib.nullcontext():
        data = pack([*((name, png(seed)) for seed, name in enumerate(names)), ("z.png", png(9))])
    assert "two of one name" in refused(client, place, data)


@pytest.mark.parametrize("name", ["b.zip", "sub/B.ZIP", "c.tar", "d.7z", "e.gz"])
def test_archives_in_archives_refuse_the_whole(client, place, name):
    inner = pack([("x.png", png(1))])
    assert "another archive" in refused(client, place, pack([("y.png", png(2)), (name, inner)]))


def test_an_archive_by_a_pictures_name_is_no_picture(client, place):
    assert "is a ZIP" in refused(client, place, pack([("x.png", pack([("y.png", png(1))]))]))


def test_a_bomb_is_known_by_how_much_it_would_grow(client, place):
    bomb = pack([("a.bmp", b"BM" + bytes(70 << 20))])
    assert len(bomb) < 1 << 20
    tracemalloc.start()
    try:
        assert "times its size; such archives are refused" in refused(client, place, bomb)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def says(data: bytes, size: int, at: int = 0) -> bytes:
    """The ZIP, whose entry number `at` is said to have that size, in both places."""
    changed, place = bytearray(data), -1
    for _ in range(at + 1):
        place = data.index(b"PK\x01\x02", place + 1)
    changed[place + 24 : place + 28] = struct.pack("<I", size)
    local = struct.unpack("<I", data[place + 42 : place + 46])[0]
    changed[local + 22 : local + 26] = struct.pack("<I", size)
    return bytes(changed)


def test_a_file_of_two_gigabytes_is_refused_by_what_is_said_of_it(client, place):
    said = refused(client, place, says(pack([("x.png", png(1))]), 2 << 30))
    assert "x.png has 2048 MiB; a picture has at most 256 MiB" in said


def test_many_files_of_a_fair_size_are_a_bomb_together(client, place):
    data = pack([(f"{number}.png", b"x") for number in range(20)])
    for number in range(20):
        data = says(data, 200 << 20, number)
    assert "would grow to 4000 MiB" in refused(client, place, data)


@pytest.mark.parametrize("size", [1, 100, len(png(1)) - 1, len(png(1)) + 1, 100_000])
def test_sizes_that_lie_refuse_the_whole(client, place, size):
    for compression in (zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED):
        data = pack([("fine.png", png(2)), ("x.png", png(1))], compression)
        assert "the ZIP is damaged at x.png" in refused(client, place, says(data, size, 1))


def test_what_does_not_fit_on_the_disk_is_refused_first(client, place, monkeypatch):
    data = pack([("x.png", png(1))])
    free = iter([1 << 40])
    monkeypatch.setattr(files, "free_bytes", lambda path: next(free, 10))
    assert "and 0 MiB are free" in refused(client, place, data, 507)


def test_too_many_files_are_refused_before_their_list_is_read(client, place, monkeypatch):
    many = pack([(f"{number:06}.txt", b"") for number in range(30)], zipfile.ZIP_STORED)
    monkeypatch.setattr(zips, "ENTRIES", 29)
    assert "the ZIP holds 30 files: at most 29 are taken" in refused(client, place, many)
    monkeypatch.undo()
    monkeypatch.setattr(zips, "DIRECTORY", 30 * 56 - 1)
    assert "holds too many files" in refused(client, place, many)
    monkeypatch.setattr(zips, "DIRECTORY", 30 * 56 + 22)
    assert put(client, "a.zip", many).json()["added"] == 30


@pytest.mark.slow
def test_a_hundred_thousand_entries_cost_neither_time_nor_memory(client, place):
    many = pack([(f"{number:050}.txt", b"") for number in range(100_000)], zipfile.ZIP_STORED)
    tracemalloc.start()
    try:
        assert "too many files" in refused(client, place, many)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20  # the body, which the test's client holds
    finally:
        tracemalloc.stop()


def test_folders_in_folders_are_refused_beyond_some_depth(client, place):
    assert "folders in folders" in refused(client, place, pack([("a/" * 9 + "x.png", png(1)), ("b/y.png", png(2))]))


def test_damage_is_said(client, place):
    data = pack([("x.png", png(1)), ("y.png", png(2))])
    assert "damaged or no ZIP" in refused(client, place, data[:-10])
    assert "damaged or no ZIP" in refused(client, place, b"PK\3\4" + bytes(100))
    assert "damaged or no ZIP" in refused(client, place, png(1))
    broken = bytearray(data)
    broken[60] ^= 0xFF
    assert "the ZIP is damaged at x.png" in refused(client, place, bytes(broken))


@pytest.mark.parametrize("shift", [1000, -5, 2**31 - 1, 5])
def test_lists_that_lead_to_no_place_are_damage(client, place, shift):
    data = bytearray(pack([("x.png", png(1))]))
    at = data.rindex(b"PK\5\6") + 16  # where the list begins, as the end says; all other places count from there
    data[at : at + 4] = struct.pack("<I", struct.unpack("<I", data[at : at + 4])[0] + shift)
    assert "the ZIP is damaged" in refused(client, place, bytes(data))


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_flipped_bytes_give_a_sentence_or_a_whole_and_never_leave_the_folder(client, place, data):
    good = pack([("sub/x.png", png(1, (16, 16))), ("sub/x.txt", b"caption"), ("y.txt", b"y")], zipfile.ZIP_STORED)
    changed = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    dataset = client.app.state.library.dataset("zig")
    root = client.app.state.context.folder
    before = tree(root)
    try:
        uploads.receive(dataset, "a.zip", [bytes(changed)], None, replace=True)
    except UserError:
        assert tree(root) == before
        return
    outside = {name: text for name, text in tree(root).items() if not name.startswith("datasets/zig/")}
    assert outside == {name: text for name, text in before.items() if not name.startswith("datasets/zig/")}
    dataset.history.undo(dataset.history.changes(1)[0].change.id) if tree(root) != before else None
    assert tree(root) == before


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=4, unique=True))
def test_whatever_the_names_are_files_appear_under_honest_ones_or_not_at_all(client, place, names):
    try:
        data = pack([(f"{name}.txt", b"x") for name in names])
    except (UnicodeEncodeError, ValueError, IndexError):
        return  # `zipfile` writes no such name
    dataset = client.app.state.library.dataset("zig")
    root = client.app.state.context.folder
    before = tree(root)
    try:
        uploads.receive(dataset, "a.zip", [data], None, replace=False)
    except UserError:
        assert tree(root) == before
        return
    for key in set(tree(place)) - {"0.png", "0.txt"}:
        assert [dataset_names.checked(part) for part in key.split("/")] == key.split("/")
    for one in dataset.history.changes(1):
        if not one.undone:
            dataset.history.undo(one.change.id)
    assert tree(root) == before
