"""Captions over the API: saved over the version that was seen, changed many at a time as previewed, counted."""

from __future__ import annotations

import os
import re
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import web_client
from datasets_made import fill, png, tree
from detour import UserError
from detour.jobs.states import StateError
from detour.web import captions_edit, datasets_api
from detour.web.captions_edit import Add, Caption, Replace
from detour.web.datasets import Library


@pytest.fixture
def client(tmp_path):
    return web_client.signed_in(tmp_path / "ui")


@pytest.fixture
def place(client):
    return fill(client.app.state.context.folder, 3)


def read(client, key="0.png"):
    return client.get(f"/api/datasets/zig/captions/{key}").json()


def save(client, text, version, key="0.png"):
    return client.put(f"/api/datasets/zig/captions/{key}", json={"text": text, "version": version})


# -------------------------------------------------------------------------------------------------------------- one


def test_saved_as_typed_and_read_back(client, place):
    for text in ("one", "zwei\nZeilen ", "猫 <b>&amp;</b> \u2028", "", "last"):
        answer = save(client, text, read(client)["version"])
        assert answer.status_code == 200
        assert answer.json() == read(client) == {"text": text, "version": answer.json()["version"], "problem": ""}
        assert (place / "0.txt").read_bytes() == text.encode()


def test_a_change_on_the_disk_is_never_overwritten(client, place):
    seen = read(client)["version"]
    (place / "0.txt").write_text("by an editor")
    answer = save(client, "mine", seen)
    assert answer.status_code == 409
    assert "has been changed meanwhile" in answer.json()["error"]
    assert (place / "0.txt").read_text() == "by an editor"
    assert save(client, "mine", read(client)["version"]).status_code == 200
    assert save(client, "late", seen).status_code == 409
    (place / "0.txt").unlink()
    assert save(client, "mine", seen).status_code == 409
    assert not (place / "0.txt").exists()


def test_a_caption_that_appeared_meanwhile_is_not_overwritten(client, place):
    (place / "new.png").write_bytes(png(9))
    assert read(client, "new.png") == {"text": None, "version": "none", "problem": ""}
    (place / "new.txt").write_text("by an editor")
    assert save(client, "mine", "none", "new.png").status_code == 409
    (place / "new.txt").unlink()
    assert save(client, "mine", "none", "new.png").status_code == 200
    assert (place / "new.txt").read_text() == "mine"


def test_of_two_that_save_at_once_one_is_told(client, place, monkeypatch):
    real = captions_edit.read

    def slowly(*given):
        found = real(*given)
        time.sleep(0.1)  # time for the others to see the same
        return found

    monkeypatch.setattr(captions_edit, "read", slowly)
    dataset = client.app.state.library.dataset("zig")
    seen, start, answers = captions_edit.read(dataset, "0.png").version, threading.Barrier(4), []

    def send(number: int) -> None:
        start.wait(20)
        try:
            captions_edit.save(dataset, "0.png", f"text {number}", seen)
            answers.append(number)
        except StateError:
            answers.append(None)

    threads = [threading.Thread(target=send, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    (winner,) = [answer for answer in answers if answer is not None]
    assert len(answers) == 4
    assert (place / "0.txt").read_text() == f"text {winner}"


def test_what_does_not_change_is_not_written(client, place):
    before = (place / "0.txt").stat().st_mtime_ns
    assert save(client, "a zig, number 0\n", read(client)["version"]).status_code == 200
    assert (place / "0.txt").stat().st_mtime_ns == before
    (place / "new.png").write_bytes(png(9))
    assert save(client, "", "none", "new.png").status_code == 200
    assert not (place / "new.txt").exists(), "nothing was typed, so no empty caption is made"
    assert client.get("/api/datasets/zig/history").json()["changes"] == []


def test_captions_that_cannot_be_read_say_so_and_come_back_to_the_byte(client, place):
    for data, problem in (
        (b"\xff\xfea\0", "UTF-16"), (b"a\0b", "zero bytes"), (b"x" * 70_000, "longer than 64 KiB"),
    ):  # fmt: skip
        (place / "0.txt").write_bytes(data)
        found = read(client)
        assert found["text"] is None
        assert problem in found["problem"]
        assert str(place) not in found["problem"]
        listed = client.get("/api/datasets/zig/pictures").json()["pictures"][0]
        assert (listed["problem"], listed["version"]) == (found["problem"], found["version"])
        assert save(client, "new", found["version"]).status_code == 200
        (change, *_) = client.get("/api/datasets/zig/history").json()["changes"]
        client.post(f"/api/datasets/zig/history/{change['id']}/undo", json={})
        assert (place / "0.txt").read_bytes() == data
        (place / ".detour" / "history").rename(place / ".detour" / f"away{len(data)}")


def test_what_is_far_too_long_for_a_caption_is_not_even_read(client, place, monkeypatch):
    with (place / "0.txt").open("wb") as file:
        file.truncate(1 << 40)
    found = read(client)
    assert "longer than 64 KiB" in found["problem"]
    os.utime(place / "0.txt", (5, 5))
    assert read(client)["version"] != found["version"]


@pytest.mark.parametrize("text", ["a\0b", "x" * 65537, "猫" * 30_000])
def test_what_is_no_caption_is_not_saved(client, place, text):
    before = tree(place)
    answer = save(client, text, read(client)["version"])
    assert answer.status_code in (400, 422)
    assert tree(place) == before


def test_half_a_sign_is_not_saved(client, place):
    version = read(client)["version"]
    body = f'{{"text": "\\ud800", "version": "{version}"}}'.encode()
    answer = client.put("/api/datasets/zig/captions/0.png", content=body)
    assert answer.status_code in (400, 422)
    assert (place / "0.txt").read_text() == "a zig, number 0\n"


def test_captions_keep_their_ending_and_new_ones_take_the_datasets(client, place):
    (place / "0.txt").rename(place / "0.TXT")
    assert save(client, "loud", read(client)["version"]).status_code == 200
    assert (place / "0.TXT").read_text() == "loud"
    assert not (place / "0.txt").exists()
    client.patch("/api/datasets/zig", json={"caption_ext": "caption"})
    assert read(client)["version"] == "none"
    assert save(client, "new", "none").status_code == 200
    assert (place / "0.caption").read_text() == "new"


# -------------------------------------------------------------------------------------------------- pages of pictures


def test_pictures_come_in_pages_and_can_be_searched(client, place):
    for index in range(3, 13):
        (place / f"{index:02}.png").write_bytes(png(index))
    (place / "03.txt").write_text("A Käse")
    (place / "04.txt").write_text(" \n")
    ask = lambda **query: client.get("/api/datasets/zig/pictures", params=query).json()  # noqa: E731
    keys = lambda answer: [one["key"] for one in answer["pictures"]]  # noqa: E731
    everything = keys(ask(limit=200))
    assert len(everything) == 13
    assert everything == sorted(everything)
    assert [key for offset in (0, 5, 10) for key in keys(ask(limit=5, offset=offset))] == everything
    assert ask(limit=5)["total"] == 13
    assert keys(ask(offset=100)) == []
    assert keys(ask(q="KÄSE")) == ["03.png"]
    assert keys(ask(q="12")) == ["12.png"]
    assert keys(ask(only="uncaptioned")) == [f"{index:02}.png" for index in range(4, 13)]
    assert keys(ask(only="uncaptioned", q="05")) == ["05.png"]
    assert client.get("/api/datasets/zig/pictures?limit=201").status_code == 422


def test_captions_that_have_not_changed_are_not_read_again(tmp_path, monkeypatch):
    place = fill(tmp_path)
    dataset = Library(tmp_path).dataset("zig")
    reads, real = [], captions_edit._read
    monkeypatch.setattr(captions_edit, "_read", lambda path: reads.append(Path(path).name) or real(path))
    for _ in range(3):
        captions_edit.read_all(dataset, dataset.listing())
    assert reads == ["0.txt", "1.txt", "2.txt"]
    time.sleep(0.02)
    (place / "1.txt").write_text("a zig, number 9\n")
    assert captions_edit.read_all(dataset, dataset.listing())["1.png"].text == "a zig, number 9\n"
    assert reads[3:] == ["1.txt"]


# -------------------------------------------------------------------------------------------------------------- many


@pytest.mark.parametrize(
    ("edit", "before", "after"),
    [
        ({"find": "cat", "replace": "dog"}, "Cat, catalogue, CAT", "dog, dogalogue, dog"),
        ({"find": "cat", "replace": "dog", "whole_words": True}, "cat, catalogue, a-cat", "dog, catalogue, a-dog"),
        ({"find": "cat", "replace": "dog", "match_case": True}, "Cat cat", "Cat dog"),
        ({"find": "a.b", "replace": r"\1\g<0>$1"}, "a.b axb", r"\1\g<0>$1 axb"),
        ({"find": "(", "replace": ""}, "a (b", "a b"),
        ({"find": "猫", "replace": "犬", "whole_words": True}, "猫, 猫舎", "犬, 猫舎"),
        ({"find": "\n", "replace": ", "}, "a\nb", "a, b"),
        ({"find": "x", "replace": "xx"}, "xx", "xxxx"),
    ],
)
def test_find_and_replace_takes_texts_as_they_are(edit, before, after):
    assert Replace(action="replace", **edit).applied(before) == after


@pytest.mark.parametrize(
    ("edit", "before", "after"),
    [
        ({"text": "zig"}, "a shape", "zig, a shape"),
        ({"text": "zig", "where": "end"}, "a shape\n", "a shape, zig\n"),
        ({"text": "zig", "separator": " "}, "  a shape ", "  zig a shape "),
        ({"text": "zig"}, "a zig here", "a zig here"),
        ({"text": "zig"}, "a zigzag", "zig, a zigzag"),
        ({"text": "zig", "skip_present": False}, "a zig", "zig, a zig"),
        ({"text": "zig"}, " \n", "zig"),
        ({"text": "(x)"}, "y (x) z", "y (x) z"),
        ({"text": "a"}, "b b b", "a, b b b"),
    ],
)
def test_a_word_is_put_before_or_after(edit, before, after):
    assert Add(action="add", **edit).applied(before) == after


@given(st.text(min_size=1, max_size=30), st.text(max_size=10), st.text(max_size=200), st.booleans())
def test_nothing_typed_makes_replacing_fail(find, replacement, text, whole):
    edit = Replace(action="replace", find=find, replace=replacement, whole_words=whole, match_case=True)
    if not whole:
        assert edit.applied(text) == text.replace(find, replacement)
    elif find not in text:
        assert edit.applied(text) == text


def test_replacing_takes_no_longer_for_what_would_trip_a_pattern():
    text, started = "a" * 60_000 + "!", time.process_time()
    for find in ("(a+)+$", "(a|a)*b", "a" * 400 + "b", ".*" * 100):
        assert Replace(action="replace", find=find, whole_words=True).applied(text) == text
    assert time.process_time() - started < 5


EDIT = {"action": "replace", "find": "zig", "replace": "zag"}


def preview(client, edit, **more):
    answer = client.post("/api/datasets/zig/bulk/preview", json={"edit": edit} | more)
    assert answer.status_code == 200, answer.text
    return answer.json()


def apply(client, edit, token, **more):
    return client.post("/api/datasets/zig/bulk/apply", json={"edit": edit, "token": token} | more)


def test_what_the_preview_shows_is_what_is_done_and_can_be_undone(client, place):
    (place / "1.txt").write_bytes(b"\xef\xbb\xbfa ZIG\r\nhere")
    (place / "2.txt").write_bytes(b"\xff")
    before = tree(place)
    shown = preview(client, EDIT)
    assert tree(place) == before
    assert shown["changed"] == 2
    assert shown["shown"] == [
        {"key": "0.png", "before": "a zig, number 0\n", "after": "a zag, number 0\n"},
        {"key": "1.png", "before": "a ZIG\r\nhere", "after": "a zag\r\nhere"},
    ]
    assert shown["unreadable"] == ["2.png"]
    done = apply(client, EDIT, shown["token"]).json()
    assert done["changed"] == 2
    assert tree(place) == before | {"0.txt": b"a zag, number 0\n", "1.txt": b"a zag\r\nhere"}
    assert preview(client, EDIT)["changed"] == 0
    assert client.post(f"/api/datasets/zig/history/{done['change']}/undo", json={}).json()["changed"] == 2
    assert tree(place) == before, "the mark at its beginning and all"


def test_only_what_was_previewed_is_done(client, place):
    token = preview(client, EDIT)["token"]
    other = EDIT | {"replace": "zug"}
    assert apply(client, other, token).status_code == 409
    assert apply(client, EDIT, token, keys=["0.png"]).status_code == 409
    (place / "1.txt").write_text("a zig, changed meanwhile")
    answer = apply(client, EDIT, token)
    assert answer.status_code == 409
    assert "look at it again" in answer.json()["error"]
    (place / "1.txt").write_text("no such word")
    assert apply(client, EDIT, token).status_code == 409
    assert (place / "0.txt").read_text() == "a zig, number 0\n"
    assert apply(client, EDIT, preview(client, EDIT)["token"]).json()["changed"] == 2


def test_some_pictures_alone_and_pictures_without_captions(client, place):
    (place / "new.png").write_bytes(png(9))
    assert [one["key"] for one in preview(client, EDIT, keys=["1.png", "../0.png"])["shown"]] == ["1.png"]
    add = {"action": "add", "text": "w0rd"}
    assert preview(client, add)["changed"] == 3
    with_missing = add | {"make_missing": True}
    shown = preview(client, with_missing)
    assert shown["changed"] == 4
    done = apply(client, with_missing, shown["token"]).json()
    assert (place / "new.txt").read_text() == "w0rd"
    assert (place / "0.txt").read_text() == "w0rd, a zig, number 0\n"
    client.post(f"/api/datasets/zig/history/{done['change']}/undo", json={})
    assert not (place / "new.txt").exists()


def test_pictures_that_share_a_caption_change_it_once(client, place):
    (place / "0.jpg").write_bytes(png(5, format="JPEG"))
    shown = preview(client, {"action": "add", "text": "w", "skip_present": False})
    assert shown["changed"] == 3
    apply(client, {"action": "add", "text": "w", "skip_present": False}, shown["token"])
    assert (place / "0.txt").read_text() == "w, a zig, number 0\n"


def test_captions_do_not_grow_beyond_what_a_caption_is(client, place):
    (place / "0.txt").write_text("a" * 60_000)
    answer = client.post("/api/datasets/zig/bulk/preview", json={"edit": EDIT | {"find": "a", "replace": "bb"}})
    assert answer.status_code == 400
    assert "would grow beyond 64 KiB; nothing was changed" in answer.json()["error"]


def test_edits_are_held_to_their_form(client, place):
    for edit in (
        {"action": "regex", "find": "a"}, {"action": "replace", "find": ""}, {"action": "replace"}, {"find": "a"},
        {"action": "replace", "find": "a" * 501}, {"action": "add", "text": "a", "where": "middle"},
        EDIT | {"more": 1},
    ):  # fmt: skip
        assert client.post("/api/datasets/zig/bulk/preview", json={"edit": edit}).status_code == 422, edit


# ------------------------------------------------------------------------------------------------- removing pictures


def test_removed_with_captions_and_brought_back(client, place):
    before = tree(place)
    done = client.post("/api/datasets/zig/remove", json={"keys": ["0.png", "2.png", "../x.png", "0.txt"]}).json()
    assert done["changed"] == 2
    assert set(tree(place)) == {"1.png", "1.txt"}
    client.post(f"/api/datasets/zig/history/{done['change']}/undo", json={})
    assert tree(place) == before
    assert client.post("/api/datasets/zig/remove", json={"keys": ["none.png"]}).json() == {"changed": 0, "change": None}


def test_a_shared_caption_goes_with_the_last_of_its_pictures(client, place):
    (place / "0.jpg").write_bytes(png(5, format="JPEG"))
    client.post("/api/datasets/zig/remove", json={"keys": ["0.jpg"]})
    assert (place / "0.txt").exists()
    client.post("/api/datasets/zig/remove", json={"keys": ["0.png"]})
    assert not (place / "0.txt").exists()


# ------------------------------------------------------------------------------------------------------------ figures


def test_figures(client, place):
    (place / "0.txt").write_text("A red Cat, on the  sofa, red cat")
    (place / "1.txt").write_text("a cat, red cat\n")
    (place / "2.txt").write_text(" ")
    for name, caption in (("3", None), ("4", b"\xff"), ("5", b"one " * 25)):
        (place / f"{name}.png").write_bytes(png(int(name)))
        if caption:
            (place / f"{name}.txt").write_bytes(caption)
    found = client.get("/api/datasets/zig/figures").json()
    words, tags = dict(found.pop("words")), dict(found.pop("tags"))
    assert found == {
        "pictures": 6, "missing": 1, "empty": 1, "unreadable": 1, "shortest": 4, "median": 8, "longest": 25,
        "lengths": [[0, 2], [20, 1]], "complete": True,
    }  # fmt: skip
    assert words == {"cat": 2, "red": 2, "sofa": 1, "one": 1}, "in how many captions; little words are left out"
    assert tags == {"red cat": 2, "a red cat": 1, "a cat": 1, "on the sofa": 1}


def test_figures_of_many_captions_come_once_all_are_read(client, place, monkeypatch):
    captions_edit._known.cache_clear()
    monkeypatch.setattr(datasets_api, "READ", 1)
    answers = [client.get("/api/datasets/zig/figures").json() for _ in range(6)]
    assert [answer["complete"] for answer in answers][:2] == [False, False]
    assert answers[0]["pictures"] == 0
    assert answers[-1]["complete"] is True
    captions_edit._known.cache_clear()
    address = "/api/datasets/zig/pictures?q=0"
    found = [client.get(address).json() for _ in range(6)]
    assert (found[0]["complete"], found[0]["pictures"]) == (False, [])
    assert (found[-1]["complete"], found[-1]["pictures"][0]["key"]) == (True, "0.png")
    monkeypatch.setattr(datasets_api, "READ", 1000)
    captions_edit._known.cache_clear()
    assert client.get("/api/datasets/zig/figures").json() == answers[-1]


def test_figures_of_nothing():
    found = captions_edit.figures({})
    assert (found.pictures, found.median, found.longest, found.words) == (0, 0, 0, [])
    assert captions_edit.figures({"a": Caption(None, "none")}).missing == 1


def test_titles_say_what_was_done():
    assert Replace(action="replace", find="a", replace="b").title == "Replaced “a” with “b”"
    assert Replace(action="replace", find="a").title == "Removed “a”"
    assert Add(action="add", text="x" * 60, where="end").title == f"Put “{'x' * 37}...” after captions"


def test_unknown_pictures_have_no_captions(client, place):
    dataset = client.app.state.library.dataset("zig")
    for key in ("none.png", "../zig/0.png", "0.txt", ""):
        with pytest.raises(UserError):
            captions_edit.read(dataset, key)
        with pytest.raises(UserError):
            captions_edit.save(dataset, key, "x", "none")


def test_pages_never_make_html_of_what_users_write():
    """No page of the UI assigns HTML; only text and elements. (Browser tests look at what is shown.)"""
    static = Path(captions_edit.__file__).parent / "static"
    scripts = list(static.glob("dataset*.js"))
    assert len(scripts) > 5
    for script in scripts:
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", script.read_text()
        )
