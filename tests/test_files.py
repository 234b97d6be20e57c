import errno
import json
import os
import random
import resource
import signal
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from detour import UserError, files
from faults import Trap, disk_full, fork, kill_at_each_call, leftovers, names, trapped, wait


@pytest.fixture
def umask():
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


# Single files


@pytest.mark.parametrize("data", [b"", b"abc", "Jürgen\n", bytes(range(256)) * 1000])
def test_write_bytes_writes_what_was_given(tmp_path, data):
    path = tmp_path / "new" / "folder" / "a.bin"
    files.write_bytes(path, data)
    assert path.read_bytes() == (data.encode() if isinstance(data, str) else data)
    files.write_bytes(path, b"second")
    assert path.read_bytes() == b"second"
    assert names(path.parent) == ["a.bin"]


def test_long_data_goes_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CHUNK", 1000)
    data = random.Random(0).randbytes(4321)
    with trapped(Trap()) as trap:
        files.write_chunks(tmp_path / "a", [data[:7], memoryview(data)[7:]])
    assert (tmp_path / "a").read_bytes() == data
    assert [name for name, _ in trap.calls].count("_write") == 6


def test_a_short_write_is_continued(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(files, "_write", lambda fd, data: real(fd, data[:3]))
    files.write_bytes(tmp_path / "a", b"0123456789")
    assert (tmp_path / "a").read_bytes() == b"0123456789"


@pytest.mark.parametrize(("mask", "expected"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_get_the_mode_that_the_umask_says(tmp_path, umask, mask, expected):
    umask(mask)
    files.write_bytes(tmp_path / "a", b"x")
    tmp = tmp_path / "private"
    tmp.write_bytes(b"y")
    tmp.chmod(0o600)
    files.publish(tmp, tmp_path / "b")
    with files.new_directory(tmp_path / "d") as folder:
        (folder / "c").write_bytes(b"z")
        (folder / "c").chmod(0o600)
    for name in ("a", "b", "d/c", "d/manifest.json"):
        assert mode(tmp_path / name) == expected, name
    assert not leftovers(tmp_path)


def test_write_json_round_trips_and_refuses_nan(tmp_path):
    files.write_json(tmp_path / "a.json", {"x": 0.1, "ü": [1, None, True]})
    assert json.loads((tmp_path / "a.json").read_bytes()) == {"x": 0.1, "ü": [1, None, True]}
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "a.json", {"x": float("nan")})
    assert json.loads((tmp_path / "a.json").read_bytes())["x"] == 0.1


def test_data_is_synced_before_the_name_and_the_folder_after(tmp_path):
    with trapped(Trap()) as trap:
        files.write_bytes(tmp_path / "a", b"x")
    tmp, folder = trap.calls[0][1], str(tmp_path)
    on_file = [("_open", tmp), ("_write", tmp), ("_fsync", tmp), ("_rename", tmp)]
    assert trap.calls == [*on_file, ("_open", folder), ("_fsync", folder)]


def test_publish_replaces_and_stays_in_one_folder(tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    (tmp_path / "t").write_bytes(b"new")
    files.publish(tmp_path / "t", tmp_path / "a")
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"new"
    (tmp_path / "sub").mkdir()
    with pytest.raises(ValueError, match="must lie in the folder"):
        files.publish(tmp_path / "a", tmp_path / "sub" / "a")


def test_new_file_appears_at_the_end_or_not_at_all(tmp_path):
    with files.new_file(tmp_path / "deep" / "a") as tmp:
        tmp.write_bytes(b"x")
        assert not (tmp_path / "deep" / "a").exists()
    assert (tmp_path / "deep" / "a").read_bytes() == b"x"
    with pytest.raises(RuntimeError), files.new_file(tmp_path / "deep" / "a") as tmp:
        tmp.write_bytes(b"half")
        raise RuntimeError
    assert (tmp_path / "deep" / "a").read_bytes() == b"x"
    assert names(tmp_path / "deep") == ["a"]


# Failures


def works(folder: Path) -> dict:
    """What is tried under every failure: name -> (work, its result, reading it)."""

    def publish() -> None:
        tmp = folder / "private"
        tmp.write_bytes(b"new")
        files.publish(tmp, folder / "a")

    def directory() -> None:
        with files.new_directory(folder / "d") as tmp:
            files.write_bytes(tmp / "a", b"new")
            (tmp / "sub").mkdir()
            (tmp / "sub" / "b").write_bytes(b"new")

    def read_directory() -> bytes:
        files.verify_directory(folder / "d")
        return (folder / "d" / "a").read_bytes()

    return {
        "write_bytes": (lambda: files.write_bytes(folder / "a", b"new"), (folder / "a").read_bytes),
        "publish": (publish, (folder / "a").read_bytes),
        "directory": (directory, read_directory),
    }


def old_content(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    files.write_bytes(folder / "a", b"old")
    if not (folder / "d").exists() or (folder / "d" / "a").read_bytes() != b"old":
        with files.new_directory(folder / "d") as tmp:
            (tmp / "a").write_bytes(b"old")


@pytest.mark.parametrize("name", ["write_bytes", "publish", "directory"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
def test_a_failure_at_any_call_leaves_the_old_content_and_nothing_else(tmp_path, name, number):
    folder = tmp_path / "there"
    old_content(folder)
    work, read = works(folder)[name]
    with trapped(Trap()) as dry:
        work()
    expected = files.DiskFullError if number != errno.EIO else UserError
    failed = 0
    for at, call in enumerate(dry.calls):
        folder = tmp_path / f"at-{at}"
        old_content(folder)
        work, read = works(folder)[name]
        with trapped(Trap(at, "before", disk_full(number))):
            try:
                work()
            except UserError as error:
                failed += 1
                assert isinstance(error, expected), call
                assert str(folder) in str(error), call
                assert ".tmp-" not in str(error), call
        assert read() in (b"old", b"new"), call
        if call[0] in ("_open", "_write", "_fsync", "_chmod", "_rename", "_mkdir"):
            # An old directory that was moved aside may stay until `remove_stale`; what is unfinished never stays.
            left = [left for left in leftovers(folder) if ".old-" not in left]
            assert not left or call[1].startswith(str(folder / "d.old-")), (call, left)
    assert failed >= 6


def test_messages_say_what_to_do(tmp_path):
    cases = {
        errno.ENOSPC: "no space .* MiB free.* Free some",
        errno.EACCES: "Permission denied.*Change the owner or mode",
        errno.EROFS: "Read-only.*Mount",
        errno.EIO: "system log",
    }
    for number, sentence in cases.items():
        with trapped(Trap(0, "before", disk_full(number))), pytest.raises(UserError, match=sentence):
            files.write_bytes(tmp_path / "a", b"x")


def test_other_errors_pass_as_they_are(tmp_path):
    with trapped(Trap(0, "before", disk_full(errno.EBADF))), pytest.raises(OSError, match="Bad file"):
        files.write_bytes(tmp_path / "a", b"x")


def test_a_file_in_place_of_a_folder_is_named(tmp_path):
    (tmp_path / "a").write_bytes(b"x")
    with pytest.raises(UserError, match="a is a file where a folder is needed"):
        files.write_bytes(tmp_path / "a" / "b" / "c", b"y")


def test_a_real_file_size_limit(tmp_path):
    files.write_bytes(tmp_path / "a", b"old")

    def child() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))
        with pytest.raises(files.DiskFullError, match="File too large"):
            files.write_bytes(tmp_path / "a", bytes(10001))
        with pytest.raises(files.DiskFullError), files.new_directory(tmp_path / "d") as tmp:
            files.write_bytes(tmp / "small", b"x")
            files.write_bytes(tmp / "large", bytes(10001))

    assert wait(fork(child)) == 0
    assert (tmp_path / "a").read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_a_real_full_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount")
    try:
        files.write_bytes(disk / "a", b"old" * 1000)
        with pytest.raises(files.DiskFullError, match="No space left"):
            files.write_bytes(disk / "a", bytes(300_000))
        assert (disk / "a").read_bytes() == b"old" * 1000
        assert names(disk) == ["a"]
        assert files.free_bytes(disk / "not" / "yet") < 256 * 1024
        files.write_bytes(disk / "a", b"new")
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="changes the user")
def test_a_real_missing_permission():
    folder = Path("/tmp") / f"detour-permission-{os.getpid()}"
    folder.mkdir(mode=0o755)

    def child() -> None:
        os.setuid(65534)
        with pytest.raises(UserError, match="Permission denied"):
            files.write_bytes(folder / "a", b"x")
        with pytest.raises(UserError, match="Permission denied"), files.new_directory(folder / "d"):
            pass

    try:
        assert wait(fork(child)) == 0
    finally:
        folder.rmdir()


@pytest.mark.parametrize("name", ["write_bytes", "publish", "directory"])
def test_killed_at_any_call_the_old_content_or_the_new_is_there(tmp_path, name):
    folder = tmp_path / "there"
    old_content(folder)
    work, read = works(folder)[name]
    seen = set()

    def check(where: str) -> None:
        files.remove_stale(folder)
        seen.add(read())
        assert set(names(folder)) - {"private"} == {"a", "d"}, where  # `private` is the caller's

    assert kill_at_each_call(lambda: old_content(folder), work, check) >= 12
    assert seen == {b"old", b"new"}


# Directories


def directory(path: Path) -> Path:
    with files.new_directory(path) as tmp:
        (tmp / "a.bin").write_bytes(bytes(range(200)))
        (tmp / "sub").mkdir()
        (tmp / "sub" / "b.txt").write_text("hello")
        (tmp / "empty").write_bytes(b"")
    return path


def test_a_new_directory_has_a_manifest_and_is_synced_before_it_gets_its_name(tmp_path):
    with trapped(Trap()) as trap:
        path = directory(tmp_path / "d")
    files.verify_directory(path)
    listed = files.read_manifest(path)
    assert {name: entry["size"] for name, entry in listed.items()} == {"a.bin": 200, "sub/b.txt": 5, "empty": 0}
    assert listed["sub/b.txt"]["sha256"] == files.sha256_file(path / "sub" / "b.txt")
    content = json.loads((path / "manifest.json").read_bytes())
    assert content["format"] == 1
    assert abs(content["created"] - time.time()) < 60
    assert names(tmp_path) == ["d"]
    tmp = trap.calls[0][1]
    rename = trap.calls.index(("_rename", tmp))
    synced = [target for call, target in trap.calls[:rename] if call == "_fsync"]
    assert {tmp, f"{tmp}/sub", f"{tmp}/a.bin", f"{tmp}/sub/b.txt", f"{tmp}/empty"} <= set(synced)
    assert synced.index(f"{tmp}/a.bin") < next(i for i, target in enumerate(synced) if "manifest.json" in target)
    assert trap.calls[rename + 1 :] == [("_open", str(tmp_path)), ("_fsync", str(tmp_path))]


def test_an_error_or_a_refusal_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), files.new_directory(tmp_path / "d") as tmp:
        (tmp / "a").write_bytes(b"x")
        raise KeyboardInterrupt
    assert names(tmp_path) == []

    def refuse(path: Path) -> None:
        files.verify_directory(path)
        raise RuntimeError

    with pytest.raises(RuntimeError), files.new_directory(tmp_path / "d", refuse) as tmp:
        (tmp / "a").write_bytes(b"x")
    assert names(tmp_path) == []


def test_reading_back_comes_from_the_disk_and_not_from_memory(tmp_path):
    def cached(path: Path) -> bool:
        fd = os.open(path, os.O_RDONLY)
        try:
            return os.preadv(fd, [bytearray(1)], 0, os.RWF_NOWAIT) == 1
        except BlockingIOError:
            return False
        finally:
            os.close(fd)

    (tmp_path / "probe").write_bytes(bytes(1 << 20))
    try:
        if not cached(tmp_path / "probe"):
            pytest.skip("this file system does not keep pages")
    except OSError:
        pytest.skip("this file system cannot be asked what is in memory")
    for attempt in range(5):  # the kernel is only advised to drop pages, and now and then holds on to one
        (tmp_path / "probe").write_bytes(bytes(1 << 20))
        files.publish(tmp_path / "probe", tmp_path / f"a{attempt}")
        if not cached(tmp_path / f"a{attempt}"):
            return
    pytest.fail("what was written is still in memory")


def test_every_damage_is_named(tmp_path):
    def damaged(change, sentence: str) -> None:
        path = directory(tmp_path / "d")
        change(path)
        with pytest.raises(files.DamagedError, match=sentence):
            files.verify_directory(path)

    damaged(lambda path: (path / "manifest.json").unlink(), "d: manifest.json is missing")
    damaged(lambda path: (path / "manifest.json").write_text("[]"), "manifest.json is damaged")
    damaged(lambda path: (path / "manifest.json").write_text("{"), "manifest.json is damaged")
    damaged(lambda path: (path / "manifest.json").write_bytes(b"\xff"), "manifest.json is damaged")
    damaged(lambda path: (path / "a.bin").unlink(), "d/a.bin is missing")
    damaged(lambda path: (path / "a.bin").write_bytes(bytes(199)), "a.bin is damaged: 199 bytes where 200 were written")
    damaged(lambda path: (path / "a.bin").write_bytes(bytes(200)), "a.bin is damaged: its content has changed")
    damaged(lambda path: (path / "extra").write_bytes(b""), "d/extra does not belong there")
    damaged(lambda path: (path / "sub" / "extra").write_bytes(b""), "d/sub/extra does not belong there")

    def link(path: Path) -> None:
        (path / "a.bin").rename(tmp_path / "elsewhere")
        (path / "a.bin").symlink_to(tmp_path / "elsewhere")

    damaged(link, "a.bin is damaged")

    def folder(path: Path) -> None:
        (path / "a.bin").unlink()
        (path / "a.bin").mkdir()

    damaged(folder, "a.bin is missing")
    with pytest.raises(files.DamagedError, match="missing"):
        files.verify_directory(tmp_path / "nothing")


def test_every_flipped_or_cut_byte_of_a_directory_is_found(tmp_path):
    path = directory(tmp_path / "d")
    rng = random.Random(1)
    tried = 0
    for file in [path / "a.bin", path / "sub" / "b.txt", path / "manifest.json"]:
        data = file.read_bytes()
        changed = [data[:place] for place in range(len(data))]
        changed += [data[:i] + bytes([data[i] ^ rng.randrange(1, 256)]) + data[i + 1 :] for i in range(len(data))]
        changed += [data + b"\n", data + b"\0"]
        for content in changed:
            file.write_bytes(content)
            with pytest.raises(files.DamagedError, match=file.name):
                files.verify_directory(path)
        tried += len(changed)
        file.write_bytes(data)
        files.verify_directory(path)
    assert tried > 1000


def test_a_newer_format_is_not_called_damage(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "FORMAT", 2)
    path = directory(tmp_path / "d")
    files.verify_directory(path)
    monkeypatch.setattr(files, "FORMAT", 1)
    with pytest.raises(UserError, match="newer Detour") as caught:
        files.verify_directory(path)
    assert not isinstance(caught.value, files.DamagedError)


def test_an_existing_directory_is_replaced(tmp_path):
    directory(tmp_path / "d")
    with files.new_directory(tmp_path / "d") as tmp:
        (tmp / "only").write_bytes(b"new")
    files.verify_directory(tmp_path / "d")
    assert names(tmp_path / "d") == ["manifest.json", "only"]
    assert names(tmp_path) == ["d"]


def test_a_removed_directory_never_looks_whole(tmp_path):
    path = directory(tmp_path / "d")

    def prepare() -> None:
        files.remove_stale(tmp_path)
        if not path.exists():
            directory(path)

    def check(where: str) -> None:
        if path.exists():
            files.verify_directory(path)

    assert kill_at_each_call(prepare, lambda: files.remove_directory(path), check) >= 10
    files.remove_stale(tmp_path)
    assert names(tmp_path) in ([], ["d"])


# Leftovers


def leave(folder: Path, work) -> None:
    def child() -> None:
        work()
        os.kill(os.getpid(), signal.SIGKILL)

    assert wait(fork(child)) == -signal.SIGKILL


def test_leftovers_of_dead_processes_go_and_those_of_live_ones_stay(tmp_path):
    kept = []

    def unfinished() -> None:
        kept.append(files.new_directory(tmp_path / "d"))
        kept[0].__enter__().joinpath("a").write_bytes(b"x")
        files._temporary(tmp_path / "file").write_bytes(b"x")

    leave(tmp_path, unfinished)
    assert len(leftovers(tmp_path)) == 2
    (tmp_path / "mine.tmp-notours").write_bytes(b"x")
    with files.new_directory(tmp_path / "live") as tmp:
        assert len(files.remove_stale(tmp_path)) == 2
        assert tmp.is_dir()
    assert names(tmp_path) == ["live", "mine.tmp-notours"]
    assert files.remove_stale(tmp_path / "nothing") == []


def test_a_process_number_that_was_given_out_again_protects_nothing(tmp_path):
    path = files._temporary(tmp_path / "a")
    path.write_bytes(b"x")
    assert files.remove_stale(tmp_path) == []
    os.utime(path, (1e9, 1e9))  # long before this process began
    assert files.remove_stale(tmp_path) == [path]


def test_another_machines_leftovers_go_after_a_day(tmp_path):
    path = tmp_path / "a.tmp-000000-1-00000000"
    path.write_bytes(b"x")
    assert files.remove_stale(tmp_path) == []
    os.utime(path, (time.time() - 90000,) * 2)
    assert files.remove_stale(tmp_path) == [path]


def test_a_directory_moved_aside_gets_its_name_back(tmp_path):
    leave(tmp_path, lambda: directory(tmp_path / "d").rename(files._temporary(tmp_path / "d", "old")))
    (aside,) = tmp_path.iterdir()
    assert files.set_aside_name(aside) == tmp_path / "d"
    assert files.remove_stale(tmp_path) == []
    files.verify_directory(tmp_path / "d")
    leave(tmp_path, lambda: directory(tmp_path / "e").rename(files._temporary(tmp_path / "d", "old")))
    assert len(files.remove_stale(tmp_path)) == 1  # d is there
    files.verify_directory(tmp_path / "d")


# Names and space


@pytest.mark.parametrize("name", ["a..b", "my-lora_v1.2", "Jürgen 2", "日本", "a", "...a b"[3:], "_x", "console"])
def test_honest_names_pass(name):
    assert files.safe_name(name) == name


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a/b", "a_b"), ("../../etc/passwd", "_.._etc_passwd"), ("C:\\x", "C__x"), ("a\0b\n", "a_b_"), (" a. ", "a"),
     (".hidden", "hidden"), ("nul", "_nul"), ("COM1.txt", "_COM1.txt"), ("u\u0308", "ü")],
)  # fmt: skip
def test_other_names_are_made_safe(text, expected):
    assert files.safe_name(text) == expected


@pytest.mark.parametrize("text", ["", ".", "..", "/", "///", " . ", "\0"])
def test_a_name_of_which_nothing_is_left_is_an_error(text):
    with pytest.raises(UserError, match="nothing is left"):
        files.safe_name(text)


def test_a_long_name_is_an_error():
    assert files.safe_name("é" * 75) == "é" * 75
    with pytest.raises(UserError, match="152 bytes"):
        files.safe_name("é" * 76)


@given(st.text(max_size=60))
def test_a_safe_name_can_be_a_file(text):
    try:
        name = files.safe_name(text)
    except UserError:
        return
    assert files.safe_name(name) == name
    assert Path(name).name == name
    folder = Path("/tmp") / f"detour-names-{os.getpid()}"
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"")
    assert names(folder) == [name]
    (folder / name).unlink()
    folder.rmdir()


def test_free_bytes_of_a_folder_that_is_not_there_yet(tmp_path):
    assert abs(files.free_bytes(tmp_path / "not" / "yet") - files.free_bytes(tmp_path)) < 1 << 30
    assert files.free_bytes(tmp_path) > 0
