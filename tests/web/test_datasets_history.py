"""Changes of a dataset and taking them back: exact bytes, whatever was done in between and whatever died."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from datasets_made import png, tree
from detour import UserError, files
from detour.jobs.states import StateError
from detour.web import dataset_history
from detour.web.dataset_history import History
from detour.web.errors import MissingError
from faults import Trap, disk_full, folder_in_memory, kill_at_each_call, leftovers, trapped


@pytest.fixture
def history(tmp_path):
    return made(tmp_path / "zig")


def made(folder: Path) -> History:
    folder.mkdir()
    for name in ("a", "b", "c"):
        (folder / f"{name}.png").write_bytes(png(ord(name)))
        (folder / f"{name}.txt").write_bytes(f"caption {name}\r\n".encode())
    (folder / "d.txt").write_bytes(b"\xff\xfe\0not a text")
    return History(folder)


def incoming(history: History, data: bytes) -> Path:
    path = history.root.parent / "incoming"
    path.write_bytes(data)
    return path


def bulk(history: History) -> None:
    with history.change("bulk", "All") as draft:
        draft.write("a.txt", "ä".encode())
        draft.write("new.txt", b"")
        draft.write("sub/deep.txt", b"deep")
        draft.drop_text("d.txt")


def remove(history: History) -> None:
    with history.change("remove", "Two") as draft:
        draft.drop("a.png")
        draft.drop("b.png")
        draft.drop_text("a.txt")


def replace(history: History) -> None:
    source = incoming(history, png(200))
    with history.change("replace", "One") as draft:
        draft.put("c.png", source)


def add(history: History) -> None:
    source = incoming(history, png(201))
    with history.change("add", "New") as draft:
        draft.put("sub/new.png", source)
        draft.write("sub/new.txt", b"new")


def edit(history: History) -> None:
    history.edit("b.txt", "Caption of b.png", b"edited")


CHANGES = {"bulk": bulk, "remove": remove, "replace": replace, "add": add, "edit": edit}
AFTER = {
    "bulk": {"a.txt": "ä".encode(), "new.txt": b"", "sub/deep.txt": b"deep", "d.txt": None},
    "remove": {"a.png": None, "b.png": None, "a.txt": None},
    "replace": {"c.png": png(200)},
    "add": {"sub/new.png": png(201), "sub/new.txt": b"new"},
    "edit": {"b.txt": b"edited"},
}


def changed(before: dict[str, bytes], kind: str) -> dict[str, bytes]:
    after = before | AFTER[kind]
    return {name: data for name, data in after.items() if data is not None}


@pytest.mark.parametrize("kind", CHANGES)
def test_undone_to_the_byte_and_done_again_after_a_restart(history, kind):
    before = tree(history.root)
    times = {path.name: path.stat().st_mtime_ns for path in history.root.glob("*.png")}
    CHANGES[kind](history)
    after = tree(history.root)
    assert after == changed(before, kind)
    (listed,) = History(history.root).changes(10)
    assert (listed.change.kind, listed.change.count, listed.undone) == (kind, len(AFTER[kind]), False)
    undo = History(history.root).undo(1)
    assert tree(history.root) == before
    assert {path.name: path.stat().st_mtime_ns for path in history.root.glob("*.png")} == times
    assert undo.undoes == 1
    assert [(one.change.id, one.undone) for one in history.changes(10)] == [(2, False), (1, True)]
    History(history.root).undo(2)
    assert tree(history.root) == after
    assert [(one.change.id, one.undone) for one in history.changes(10)] == [(3, False), (2, True), (1, False)]
    assert history.changes(1)[0].change.title == history.changes(3)[2].change.title
    history.undo(1)
    assert tree(history.root) == before


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.sampled_from(["write", "drop", "put", "text"]), st.sampled_from("abce"), st.binary(max_size=9)),
        min_size=1, max_size=8,
    )
)  # fmt: skip
def test_any_changes_undone_backwards_give_every_state_that_was(tmp_path_factory, steps):
    with folder_in_memory(tmp_path_factory.mktemp("h")) as place:
        history = made(place / "zig")
        states, numbers = [tree(history.root)], []
        for what, name, data in steps:
            with history.change("bulk", what) as draft:
                if what == "write":
                    draft.write(f"{name}.txt", data)
                elif what == "put":
                    draft.put(f"{name}.png", incoming(history, data))
                elif what == "drop" and (history.root / f"{name}.png").exists():
                    draft.drop(f"{name}.png")
                elif what == "text" and (history.root / f"{name}.txt").exists():
                    draft.drop_text(f"{name}.txt")
            if draft.entries:
                numbers.append(draft.number)
                states.append(tree(history.root))
        for number, expected in zip(reversed(numbers), reversed(states[:-1]), strict=True):
            history.undo(number)
            assert tree(history.root) == expected
        for number, expected in zip(range(len(numbers) * 2, len(numbers), -1), states[1:], strict=True):
            history.undo(number)  # the undoing, undone
            assert tree(history.root) == expected


def test_what_was_changed_since_is_never_overwritten(history):
    bulk(history)
    (history.root / "a.txt").write_text("by an editor")
    before = tree(history.root)
    with pytest.raises(StateError, match=r"changed after it: a\.txt; undo the later changes first"):
        history.undo(1)
    assert tree(history.root) == before
    assert len(history.changes(10)) == 1
    remove(history)
    (history.root / "b.png").write_bytes(b"another of that name")
    with pytest.raises(StateError, match=r"b\.png"):
        history.undo(2)
    assert (history.root / "b.png").read_bytes() == b"another of that name"
    replace(history)
    os.utime(history.root / "c.png", (1, 1))
    with pytest.raises(StateError, match=r"c\.png"):
        history.undo(3)


def test_an_undone_change_is_not_undone_twice_and_an_unknown_one_never(history):
    edit(history)
    history.undo(1)
    with pytest.raises(StateError, match="undone already"):
        history.undo(1)
    for number in (0, 7, -1):
        with pytest.raises(MissingError):
            history.undo(number)


def test_a_change_of_nothing_or_with_an_error_leaves_no_trace(history):
    before = tree(history.root, hidden=True)
    with history.change("bulk", "nothing"):
        pass
    with pytest.raises(RuntimeError), history.change("bulk", "stopped") as draft:
        draft.write("a.txt", b"x")
        draft.put("new.png", incoming(history, b"x"))
        raise RuntimeError
    assert tree(history.root, hidden=True) == before
    assert leftovers(history.root) == []
    assert history.changes(5) == []


def test_what_is_typed_in_one_go_is_one_change(history, monkeypatch):
    for text in (b"o", b"on", b"one"):
        history.edit("b.txt", "b", text)
    assert [one.change.id for one in history.changes(9)] == [1]
    history.edit("a.txt", "a", b"other")
    history.edit("b.txt", "b", b"two")
    assert [one.change.id for one in history.changes(9)] == [3, 2, 1]
    monkeypatch.setattr(dataset_history, "MERGE", 0)
    history.edit("b.txt", "b", b"three")
    assert len(history.changes(9)) == 4
    for number in (4, 3, 2, 1):
        history.undo(number)
    assert (history.root / "b.txt").read_bytes() == b"caption b\r\n"
    monkeypatch.setattr(dataset_history, "MERGE", 1e9)
    history.edit("b.txt", "b", b"x")
    (history.root / "b.txt").write_bytes(b"by an editor")
    history.edit("b.txt", "b", b"y")
    history.undo(history.changes(1)[0].change.id)
    assert (history.root / "b.txt").read_bytes() == b"by an editor", "what came from elsewhere is kept too"


def test_a_huge_file_in_a_captions_place_is_moved_and_never_read(history):
    with (history.root / "a.txt").open("wb") as file:
        file.truncate(1 << 40)
    with history.change("remove", "One") as draft:
        draft.drop("a.png")
        draft.drop_text("a.txt")
    assert not (history.root / "a.txt").exists()
    history.undo(1)
    assert (history.root / "a.txt").stat().st_size == 1 << 40
    with pytest.raises(UserError, match=r"a\.txt is far too large for a caption"):
        history.edit("a.txt", "Caption of a.png", b"new")


def test_emptied_it_keeps_nothing_and_changes_nothing(history):
    remove(history)
    assert history.kept_bytes() > len(png(ord("a")))
    before = tree(history.root)
    history.forget()
    assert tree(history.root, hidden=True) == before
    assert history.changes(5) == []
    assert history.kept_bytes() == 0
    edit(history)
    assert history.changes(5)[0].change.id == 1


def test_damage_is_said(history):
    edit(history)
    (history.private / "history" / "000001" / "change.jsonl").write_text("{")
    with pytest.raises(UserError, match=r"change\.jsonl is damaged; remove its folder"):
        history.changes(5)


# ------------------------------------------------------------------------------------------------- kills, full disks


def some(*kinds: str) -> list:
    """These by default, the others among the slow tests."""
    return [kind if kind in kinds else pytest.param(kind, marks=pytest.mark.slow) for kind in CHANGES]


@pytest.mark.slow
@pytest.mark.parametrize("kind", some("replace"))
def test_killed_at_any_call_a_change_is_made_whole_or_not_at_all(tmp_path, kind):
    with folder_in_memory(tmp_path) as place:
        root = place / "zig"
        whole = tree(made(root).root)
        outcomes = set()

        def prepare() -> None:
            shutil.rmtree(root)
            made(root)

        def check(when: str) -> None:
            history = History(root)
            history.recover()
            now = tree(root)
            outcome = "before" if now == whole else "after" if now == changed(whole, kind) else "neither"
            assert outcome != "neither", when
            assert leftovers(root) == [], when
            assert outcome == ("after" if history.changes(5) else "before"), when
            if outcome == "after":
                history.undo(1)
                assert tree(root) == whole, when
            outcomes.add(outcome)

        assert kill_at_each_call(prepare, lambda: CHANGES[kind](History(root)), check) > 15
        assert outcomes == {"before", "after"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", some("bulk"))
def test_killed_at_any_call_of_undoing_it_is_done_or_not(tmp_path, kind):
    with folder_in_memory(tmp_path) as place:
        root = place / "zig"
        whole = tree(made(root).root)
        CHANGES[kind](History(root))

        def prepare() -> None:
            shutil.rmtree(root)
            CHANGES[kind](made(root))

        def check(when: str) -> None:
            history = History(root)
            history.recover()
            undone = history.changes(9)[-1].undone
            assert tree(root) == (whole if undone else changed(whole, kind)), when

        assert kill_at_each_call(prepare, lambda: History(root).undo(1), check) > 15


@pytest.mark.parametrize("kind", CHANGES)
def test_a_full_disk_at_any_call_breaks_nothing(tmp_path, kind):
    with folder_in_memory(tmp_path) as place:
        root = place / "zig"
        whole = tree(made(root).root)
        with trapped(Trap()) as dry:
            CHANGES[kind](History(root))
        for at, (name, _) in enumerate(dry.calls):
            if name not in ("_open", "_write", "_fsync", "_mkdir"):
                continue
            shutil.rmtree(root)
            history = made(root)
            with trapped(Trap(at, "before", disk_full())), pytest.raises(files.DiskFullError, match="no space"):
                CHANGES[kind](history)
            history.recover()
            assert tree(root) in (whole, changed(whole, kind)), (at, name)
            assert leftovers(root) == []


@pytest.mark.slow
def test_many_captions_at_once_are_as_safe(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset_history, "FEW", 1)
    monkeypatch.setattr(os, "sync", lambda: None)  # the whole machine's; a kill does not ask for it
    with folder_in_memory(tmp_path) as place:
        root = place / "zig"
        whole = tree(made(root).root)

        def work() -> None:
            with History(root).change("bulk", "All") as draft:
                for name in "abcd":
                    draft.write(f"{name}.txt", b"new")

        def prepare() -> None:
            shutil.rmtree(root)
            made(root)

        def check(when: str) -> None:
            history = History(root)
            history.recover()
            expected = whole | ({f"{name}.txt": b"new" for name in "abcd"} if history.changes(5) else {})
            assert tree(root) == expected, when
            assert leftovers(root) == [], when

        assert kill_at_each_call(prepare, work, check) > 15


def test_killed_while_typing_the_caption_is_the_old_or_the_new(tmp_path):
    with folder_in_memory(tmp_path) as place:
        root = place / "zig"
        made(root)

        def prepare() -> None:
            shutil.rmtree(root)
            made(root).edit("b.txt", "b", b"first")

        def check(when: str) -> None:
            History(root).recover(thorough=True)
            assert (root / "b.txt").read_bytes() in (b"first", b"second"), when
            assert leftovers(root) == [], when
            assert len(History(root).changes(5)) == 1

        prepare()
        assert kill_at_each_call(prepare, lambda: History(root).edit("b.txt", "b", b"second"), check) > 10


def test_a_file_that_somebody_changed_after_the_kill_is_left_to_him(tmp_path):
    history = made(tmp_path / "zig")
    bulk(history)
    (history.private / "history" / "000001" / "done").unlink()
    (history.root / "a.txt").write_text("by an editor")
    (history.root / "d.txt").write_bytes(b"\xff\xfe\0not a text")  # as if it had not been dropped yet
    assert history.recover() == 1
    assert (history.root / "a.txt").read_text() == "by an editor"
    assert not (history.root / "d.txt").exists()
    assert history.recover() == 0


def test_what_is_kept_is_plain_text_with_bytes_in_base64(history):
    edit(history)
    lines = (history.private / "history" / "000001" / "change.jsonl").read_text().splitlines()
    head, entry = map(json.loads, lines)
    assert (head["kind"], head["count"]) == ("edit", 1)
    assert entry == {"key": "b.txt", "before": {"base64": "Y2FwdGlvbiBiDQo="}, "after": {"base64": "ZWRpdGVk"}}
