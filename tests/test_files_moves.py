"""Files that are moved, written together, or made in a folder that goes."""

import os
import shutil

import pytest

from detour import UserError, files
from faults import Trap, disk_full, folder_in_memory, kill_at_each_call, leftovers, names, trapped


def test_moved_into_folders_that_are_made_and_never_onto_something(tmp_path):
    (tmp_path / "a").write_text("a")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "b").write_text("b")
    files.move([(tmp_path / "a", tmp_path / "new" / "deep" / "a"), (tmp_path / "folder", tmp_path / "other")])
    assert (tmp_path / "new" / "deep" / "a").read_text() == "a"
    assert names(tmp_path / "other") == ["b"]
    (tmp_path / "taken").write_text("taken")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    for target in ("taken", "nowhere"):
        with pytest.raises(FileExistsError):
            files.move([(tmp_path / "other" / "b", tmp_path / target)])
    assert (tmp_path / "taken").read_text() == "taken"
    assert names(tmp_path / "other") == ["b"]


def test_moves_are_durable_once_all_are_made(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(name)
    (tmp_path / "to").mkdir()
    with trapped(Trap()) as trap:
        files.move([(tmp_path / name, tmp_path / "to" / name) for name in "ab"])
    calls = [name for name, _ in trap.calls]
    assert calls[:2] == ["_rename", "_rename"]
    assert calls.count("_fsync") == 2, "each folder once"


def test_a_scratch_folder_goes_with_what_is_in_it(tmp_path):
    with files.scratch_folder(tmp_path / "place") as scratch:
        assert files.is_temporary(scratch)
        (scratch / "sub").mkdir()
        (scratch / "sub" / "a").write_text("a")
    assert names(tmp_path / "place") == []
    with pytest.raises(RuntimeError), files.scratch_folder(tmp_path / "place") as scratch:
        (scratch / "a").write_text("a")
        raise RuntimeError
    assert names(tmp_path / "place") == []
    with files.scratch_folder(tmp_path / "place") as scratch:
        files.move([(scratch, tmp_path / "kept")])
    assert (tmp_path / "kept").is_dir()


def test_many_files_are_old_or_new_each_wherever_it_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sync", lambda: None)  # of the whole machine; a kill does not ask for it
    with folder_in_memory(tmp_path) as place:
        root = place / "root"

        def prepare() -> None:
            shutil.rmtree(root, ignore_errors=True)
            for name in ("a", "b/c"):
                files.write_bytes(root / name, f"old {name}")

        def work() -> None:
            files.write_many(((root / name, f"new {name}".encode()) for name in ("a", "b/c", "b/d")), root / "aside")

        def check(when: str) -> None:
            for name in ("a", "b/c"):
                assert (root / name).read_text() in (f"old {name}", f"new {name}"), when
            assert not (root / "b" / "d").exists() or (root / "b" / "d").read_text() == "new b/d", when
            files.remove_stale(root / "aside")
            assert leftovers(root) == [], when

        assert kill_at_each_call(prepare, work, check) > 10
        prepare()
        work()
        assert [(root / name).read_text() for name in ("a", "b/c", "b/d")] == ["new a", "new b/c", "new b/d"]


def test_many_files_are_synced_before_they_take_their_names(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(os, "sync", lambda: done.append("sync"))
    real = files._rename
    monkeypatch.setattr(files, "_rename", lambda *pair: done.append("rename") or real(*pair))
    files.write_many([(tmp_path / "a", b"a"), (tmp_path / "b", b"b")], tmp_path / "aside")
    assert done == ["sync", "rename", "rename"]


def test_a_full_disk_while_many_are_written_changes_nothing(tmp_path):
    (tmp_path / "a").write_text("old")

    def contents():
        yield tmp_path / "a", b"new"
        raise files.DiskFullError("no space")

    with pytest.raises(UserError, match="no space"):
        files.write_many(contents(), tmp_path / "aside")
    assert (tmp_path / "a").read_text() == "old"
    with trapped(Trap(0, "before", disk_full())), pytest.raises(files.DiskFullError):
        files.write_many([(tmp_path / "a", b"new")], tmp_path / "aside")
    assert (tmp_path / "a").read_text() == "old"
    assert leftovers(tmp_path) == []
