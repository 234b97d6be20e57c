"""Makes the system calls of `detour.files` fail, or kills the process at them. Real signals, real processes."""

import errno
import os
import random
import signal
import stat
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from detour import files


class Trap:
    """Stands around every system call of `files`; at the call number `at` it acts, before the call or after it."""

    def __init__(self, at: int = -1, when: str = "before", action: Callable[[], None] = lambda: None) -> None:
        self.calls: list[tuple[str, str]] = []
        self.at, self.when, self.action = at, when, action

    def wrap(self, name: str, original: Callable) -> Callable:
        def call(*args):
            here = len(self.calls)
            self.calls.append((name, _target(args[0])))
            if here == self.at and self.when == "before":
                self.action()
            result = original(*args)
            if here == self.at and self.when == "after":
                self.action()
            return result

        return call


def _target(argument) -> str:
    return str(Path(f"/proc/self/fd/{argument}").readlink()) if isinstance(argument, int) else str(argument)


@contextmanager
def trapped(trap: Trap) -> Iterator[Trap]:
    """The system calls of `files`, with a trap around each."""
    originals = {name: getattr(files, name) for name in files.SYSCALLS}
    try:
        for name, original in originals.items():
            setattr(files, name, trap.wrap(name, original))
        yield trap
    finally:
        for name, original in originals.items():
            setattr(files, name, original)


def disk_full(number: int = errno.ENOSPC) -> Callable[[], None]:
    """An action that fails as the kernel does."""

    def action() -> None:
        raise OSError(number, os.strerror(number))

    return action


def die() -> None:
    """Kills this process, as `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def fork(work: Callable[[], None]) -> int:
    """Starts a child that does the work; 0 on success, 1 after a traceback. Returns its id."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def wait(pid: int) -> int:
    """The exit code of a child, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_at_each_call(
    prepare: Callable[[], None],
    work: Callable[[], None],
    check: Callable[[str], None],
    moments: tuple[str, ...] = ("before", "after"),
) -> int:
    """Around every system call of `work`: prepare, do the work in a child that is killed there, check.

    Returns how often a child was killed.
    """
    prepare()
    with trapped(Trap()) as dry:
        work()
    places = [(at, when) for at in range(len(dry.calls)) for when in moments]
    for at, when in places:
        prepare()

        def child(at: int = at, when: str = when) -> None:
            with trapped(Trap(at, when, die)):
                work()

        assert wait(fork(child)) == -signal.SIGKILL, (at, when, dry.calls[at])
        check(f"{when} call {at} {dry.calls[at]}")
    return len(places)


def kill_after(pid: int, seconds: float) -> None:
    """Kills a child after some time, and waits for it. It must not have ended by itself."""
    time.sleep(seconds)
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    assert wait(pid) == -signal.SIGKILL


def flip(path: Path, rng: random.Random) -> int:
    """Changes one byte of a file to another value; returns its place."""
    data = bytearray(path.read_bytes())
    place = rng.randrange(len(data))
    data[place] ^= rng.randrange(1, 256)
    path.write_bytes(data)
    return place


@contextmanager
def folder_in_memory(fallback: Path) -> Iterator[Path]:
    """A folder on a file system in memory, where there is one: thousands of syncs then wait for no disk.

    What a kill or a failing call leaves behind does not depend on the kind of disk.
    """
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield fallback
        return
    with tempfile.TemporaryDirectory(prefix="detour-", dir=memory) as folder:
        yield Path(folder)


def leftovers(folder: Path) -> list[str]:
    """Names of temporaries under a folder."""
    return sorted(path.name for path in folder.rglob("*") if files.is_temporary(path))


def names(folder: Path) -> list[str]:
    """What is in a folder."""
    return sorted(path.name for path in folder.iterdir())


class PowerCut:
    """Knows what a disk surely holds: the content of files and of folders as they were when they were last synced.

    `rebuild` makes the tree that a machine might find after its power failed now. What was not synced may be there or
    not: `latest` names the folders ("top", "below") whose newest entries have reached the disk by chance.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.content: dict[int, bytes] = {}
        self.entries: dict[int, dict[str, int]] = {}
        self.held: dict[int, int] = {}  # an open file for each inode, so that no number is given out twice
        self.sync(os.open(root, os.O_RDONLY))

    def sync(self, fd: int) -> None:
        inode = os.fstat(fd).st_ino
        path = Path(f"/proc/self/fd/{fd}").readlink()
        self.held.setdefault(inode, os.dup(fd))
        if path.is_dir():
            self.entries[inode] = self.listing(path)
        else:
            self.content[inode] = path.read_bytes()

    def listing(self, path: Path) -> dict[str, int]:
        found = {}
        for item in path.iterdir():
            fd = os.open(item, os.O_RDONLY)
            found[item.name] = os.fstat(fd).st_ino
            if self.held.setdefault(found[item.name], fd) != fd:
                os.close(fd)
        return found

    def rebuild(self, target: Path, latest: tuple[str, ...]) -> None:
        self._folder(self.root.stat().st_ino, target, latest, "top")

    def _folder(self, inode: int, target: Path, latest: tuple[str, ...], level: str) -> None:
        target.mkdir()
        entries = self.entries.get(inode, {})
        if level in latest:
            path = Path(f"/proc/self/fd/{self.held[inode]}").readlink()
            entries = self.listing(path) if path.is_dir() else {}
        for name, child in entries.items():
            if stat.S_ISDIR(os.fstat(self.held[child]).st_mode):
                self._folder(child, target / name, latest, "below")
            else:
                (target / name).write_bytes(self.content.get(child, b""))

    def close(self) -> None:
        for fd in self.held.values():
            os.close(fd)
