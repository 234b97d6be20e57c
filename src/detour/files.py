"""Durable writes: what stands under its final name is whole, or is not there at all.

Everything is written under a temporary name beside its place, fsynced, renamed, and the folder fsynced too: a process
killed at any instant, or a machine that loses power, leaves the old file or the new one and never a piece of one.
Temporary names are `NAME.tmp-HOST-PID-RANDOM`, so that leftovers of dead processes can be told from live ones.
Every system call that changes the disk goes through one of the small functions named in `SYSCALLS`: the tests let each
of them fail, and kill the process before and after each.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import stat
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from detour import UserError

MANIFEST = "manifest.json"
FORMAT = 1
SYSCALLS = ("_open", "_write", "_fsync", "_chmod", "_rename", "_mkdir", "_unlink", "_rmdir")
CHUNK = 1 << 24  # bytes in one write, so that a signal is not held up for long
FOREIGN_AGE = 86400.0  # seconds without a change after which another machine's temporary counts as left behind

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_DIRECTORY_FSYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)  # some network file systems
_TEMPORARY = re.compile(r"\.(?P<kind>tmp|old)-(?P<host>[0-9a-f]{6})-(?P<pid>\d+)-[0-9a-f]{8}$")
_RESERVED = re.compile(r"^(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)  # device names on Windows
_HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:6]

if sys.platform == "win32":
    BINARY = os.O_BINARY
else:
    BINARY = 0


class DamagedError(UserError):
    """A file or directory is not what was written."""


class DiskFullError(UserError):
    """The disk, the quota or the allowed file size is used up. What was there before is untouched."""


def _open(path: Path, flags: int, mode: int = 0o666) -> int:
    return os.open(path, flags | BINARY, mode)


def _write(fd: int, data: memoryview) -> int:
    return os.write(fd, data)


def _fsync(fd: int) -> None:
    os.fsync(fd)


def _chmod(path: Path, mode: int) -> None:
    path.chmod(mode)


def _rename(source: Path, target: Path) -> None:
    source.replace(target)


def _mkdir(path: Path) -> None:
    path.mkdir()


def _unlink(path: Path) -> None:
    path.unlink()


def _rmdir(path: Path) -> None:
    path.rmdir()


def write_bytes(path: Path, data: bytes | str, *, private: bool = False) -> None:
    """Write a whole file durably (text as UTF-8), with its folder if that is missing.

    A reader sees the old content or the new. UserError (DiskFullError for space) says what to do; then the old content
    is untouched and nothing is left behind. A `private` file can be read by its owner only, from the first byte on.
    """
    write_chunks(path, [data.encode() if isinstance(data, str) else data], private=private)


def write_json(path: Path, obj: object) -> None:
    """Write `obj` durably as indented JSON. ValueError if it holds something that JSON lacks, such as NaN."""
    write_bytes(path, json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_chunks(path: Path, chunks: Iterable[bytes | memoryview], *, private: bool = False) -> None:
    """As `write_bytes`, for content that comes in pieces: never more than one piece is held."""
    make_folder(path.parent)
    tmp = _temporary(path)
    with explained(path), _removed_on_error(tmp):
        fd = _open(tmp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o666)
        try:
            for chunk in chunks:
                write_all(fd, chunk)
            _fsync(fd)
        finally:
            os.close(fd)
        _rename(tmp, path)
    _fsync_folder(path.parent)


def publish(tmp: Path, final: Path) -> None:
    """Make a finished temporary file durable under its final name, readable as the umask says (not only by its owner).

    For writers that write a file themselves. `tmp` must lie in the folder of `final`; on error it is removed.
    """
    if tmp.parent.resolve() != final.parent.resolve():
        raise ValueError(f"{tmp} must lie in the folder of {final}, since a rename across file systems is not atomic")
    with explained(final), _removed_on_error(tmp):
        _fsync_path(tmp)
        _chmod(tmp, _mode_by_umask(final))
        _rename(tmp, final)
    _fsync_folder(final.parent)


def move(pairs: Iterable[tuple[Path, Path]]) -> None:
    """Give files or folders other places on the same disk (source, target). FileExistsError where one is taken."""
    changed: set[Path] = set()
    try:
        for source, target in pairs:
            make_folder(target.parent)
            with explained(target):
                if os.path.lexists(target):
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
                _rename(source, target)
            changed |= {source.parent, target.parent}
    finally:
        for folder in changed:
            _fsync_folder(folder)


@contextlib.contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """Yield a new folder in `parent` under a temporary name; at the end it is removed with what is left in it."""
    make_folder(parent)
    tmp = _temporary(parent / "scratch")
    with explained(tmp):
        _mkdir(tmp)
    try:
        yield tmp
    finally:
        if tmp.is_dir():
            with contextlib.suppress(OSError):  # what cannot be removed now, `remove_stale` will
                _remove(tmp)


@contextlib.contextmanager
def new_file(final: Path) -> Iterator[Path]:
    """Yield a temporary name beside `final` for a writer that writes a file itself.

    It is published at the end, and removed on error.
    """
    make_folder(final.parent)
    tmp = _temporary(final)
    with explained(final), _removed_on_error(tmp):
        yield tmp
        publish(tmp, final)


@contextlib.contextmanager
def new_directory(final: Path, check: Callable[[Path], None] | None = None) -> Iterator[Path]:
    """Yield a temporary directory to fill; at the end it appears as `final` with a manifest, whole or not at all.

    `check` is called with the complete temporary directory before it takes its name, and refuses it by raising.
    An existing `final` is moved aside first and deleted last; `remove_stale` brings it back if the process dies
    between.
    """
    make_folder(final.parent)
    tmp = _temporary(final)
    with explained(final), _removed_on_error(tmp):
        _mkdir(tmp)
        yield tmp
        names = _file_names(tmp)
        for name in names:
            _chmod(tmp / name, stat.S_IMODE(tmp.stat().st_mode) & 0o666)  # the directory was made by the umask
            _fsync_path(tmp / name)
        write_bytes(tmp / MANIFEST, _manifest(tmp, names))
        for folder in sorted({(tmp / name).parent for name in names} | {tmp}, reverse=True):
            _fsync_folder(folder)
        if check is not None:
            check(tmp)
        _take_name(tmp, final)


def write_many(contents: Iterable[tuple[Path, bytes]], aside: Path) -> None:
    """As `write_bytes` for many small files, which are first written in a folder `aside` on the same disk.

    One `sync` makes them durable: to ask for each of 10 000 captions takes a minute, this takes seconds.
    """
    targets: list[Path] = []
    with scratch_folder(aside) as scratch:
        for path, data in contents:
            with explained(path):
                (scratch / str(len(targets))).write_bytes(data)
            targets.append(path)
        os.sync()
        for number, path in enumerate(targets):
            with explained(path):
                _rename(scratch / str(number), path)
    for folder in {path.parent for path in targets}:
        _fsync_folder(folder)


def read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    """File name -> {"size", "sha256"} of a directory made by `new_directory`.

    DamagedError if the manifest is missing or not as written, down to the last blank.
    """
    file = path / MANIFEST
    try:
        text = file.read_bytes()
        content = json.loads(text)
        own = content.pop("sha256")
        whole = own == _manifest_hash(content) and text == _json_bytes(content | {"sha256": own})
    except FileNotFoundError:
        raise DamagedError(f"{path}: {MANIFEST} is missing, so it was never finished or was taken apart") from None
    except OSError as error:
        raise DamagedError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DamagedError(f"{file} is damaged: it is not a manifest any more") from None
    if not whole:
        raise DamagedError(f"{file} is damaged: it does not match its own checksum")
    if content["format"] > FORMAT:
        found = f"format {content['format']}, this one knows {FORMAT}"
        raise UserError(f"{file} was written by a newer Detour ({found}); update Detour")
    files: dict[str, dict[str, Any]] = content["files"]
    return files


def verify_directory(path: Path) -> None:
    """Raise DamagedError, naming file and damage, unless the directory is bit for bit what was written."""
    listed = read_manifest(path)
    found = set(_file_names(path)) - {MANIFEST}
    for name in sorted(found - set(listed)):
        raise DamagedError(f"{path / name} does not belong there: {MANIFEST} does not list it")
    for name, entry in listed.items():
        file = path / name
        if name not in found:
            raise DamagedError(f"{file} is missing")
        try:
            size, digest = file.lstat().st_size, sha256_file(file)
        except OSError as error:
            raise DamagedError(f"{file} cannot be read: {error.strerror}") from None
        if size != entry["size"]:
            raise DamagedError(f"{file} is damaged: {size} bytes where {entry['size']} were written")
        if digest != entry["sha256"]:
            raise DamagedError(f"{file} is damaged: its content has changed since it was written (sha256 differs)")


def remove_directory(path: Path) -> None:
    """Delete a directory so that no half of it is ever seen under its name: it is renamed first, durably."""
    aside = _temporary(path)
    with explained(path):
        _rename(path, aside)
        _fsync_folder(path.parent)
        _remove(aside)


def remove_stale(parent: Path) -> list[Path]:
    """Remove what dead processes left in a folder under temporary names; returns what was removed.

    A directory that was moved aside to be replaced, and whose successor never came, gets its name back.
    """
    removed = []
    for path in sorted(parent.iterdir()) if parent.is_dir() else []:
        match = _TEMPORARY.search(path.name)
        if match is None or _owner_lives(path, match):
            continue
        final = path.with_name(path.name[: match.start()])
        with explained(path), contextlib.suppress(FileNotFoundError):  # another process may clean up too
            if match["kind"] == "old" and not final.exists():
                _rename(path, final)
                _fsync_folder(parent)
            else:
                _remove(path)
                removed.append(path)
    return removed


def is_temporary(path: Path) -> bool:
    """Whether a name is one of the temporary ones (unfinished, or on its way out)."""
    return _TEMPORARY.search(path.name) is not None


def set_aside_name(path: Path) -> Path | None:
    """The name a directory had before it was moved aside to be replaced, or None for any other path."""
    match = _TEMPORARY.search(path.name)
    return path.with_name(path.name[: match.start()]) if match and match["kind"] == "old" else None


def make_folder(path: Path) -> None:
    """Make a folder and those above it, durably. UserError if it cannot be made or something else has its name."""
    if path.is_dir():
        return
    with explained(path):
        make_folder(path.parent)
        with contextlib.suppress(FileExistsError):  # another process may make it at the same moment
            _mkdir(path)
        if not path.is_dir():
            raise UserError(f"{path} is a file where a folder is needed; move it or choose another folder")
        _fsync_folder(path.parent)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's content as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def safe_name(text: str) -> str:
    """`text` as a file name for every file system.

    Separators, signs that Windows forbids and control characters become `_`. Names that are fine already pass unchanged
    (`a..b`, `Jürgen 2`). UserError if nothing is left or it is too long.
    """
    normal = unicodedata.normalize("NFC", text)
    name = "".join("_" if c in '/\\:*?"<>|' or unicodedata.category(c)[0] == "C" else c for c in normal)
    name = name.strip(" ").rstrip(". ").lstrip(".")
    if not name.strip("_. "):
        raise UserError(f"{text!r} cannot be a file name: nothing is left of it; use letters or digits")
    if (length := len(name.encode())) > 150:  # of 255; the rest is for a step number, an ending, a temporary's suffix
        raise UserError(f"{text[:40]!r}... is too long for a file name: {length} bytes, 150 are allowed; shorten it")
    return f"_{name}" if _RESERVED.match(name) else name


def free_bytes(path: Path) -> int:
    """Bytes that this user may still write where `path` is, or will be."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def _temporary(path: Path, kind: str = "tmp") -> Path:
    return path.with_name(f"{path.name}.{kind}-{_HOST}-{os.getpid()}-{secrets.token_hex(4)}")


def write_all(fd: int, data: bytes | memoryview) -> None:
    view = memoryview(data).cast("B")
    while view:
        view = view[_write(fd, view[:CHUNK]) :]


def _fsync_path(path: Path) -> None:
    fd = _open(path, os.O_RDWR)
    try:
        _fsync(fd)
        if sys.platform == "linux":  # forget the copy in memory, so that the reading back comes from the disk
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def _fsync_folder(path: Path) -> None:
    """Make the names in a folder durable. Windows has no such call, and renames there are journalled."""
    if os.name == "nt":
        return
    with explained(path):
        fd = _open(path, os.O_RDONLY)
        try:
            _fsync(fd)
        except OSError as error:
            if error.errno not in _NO_DIRECTORY_FSYNC:
                raise
        finally:
            os.close(fd)


def _mode_by_umask(path: Path) -> int:
    """The mode a new file gets beside `path`, asked of the disk: to read the umask is to set it for every thread."""
    probe = _temporary(path)
    fd = _open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        return stat.S_IMODE(os.fstat(fd).st_mode)
    finally:
        os.close(fd)
        _unlink(probe)


def _take_name(tmp: Path, final: Path) -> None:
    """Rename a complete directory, moving an older one of that name aside until the new one is in place."""
    if not final.exists():
        _rename(tmp, final)
        _fsync_folder(final.parent)
        return
    old = _temporary(final, "old")
    _rename(final, old)
    try:
        _rename(tmp, final)
    except BaseException:
        _rename(old, final)
        raise
    _fsync_folder(final.parent)
    # The new one is in place. If the old one cannot be removed now, it lies under a name that `remove_stale` knows.
    with contextlib.suppress(OSError, UserError):
        remove_directory(old)


def _manifest(path: Path, names: list[str]) -> bytes:
    listed = {name: {"size": (path / name).stat().st_size, "sha256": sha256_file(path / name)} for name in names}
    content = {"format": FORMAT, "created": time.time(), "files": listed}
    return _json_bytes(content | {"sha256": _manifest_hash(content)})


def _manifest_hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(_json_bytes(content)).hexdigest()


def _json_bytes(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


def _file_names(path: Path) -> list[str]:
    """Everything in a directory that is not a plain folder, as sorted relative names."""
    found = (item for item in path.rglob("*") if item.is_symlink() or not item.is_dir())
    return sorted(item.relative_to(path).as_posix() for item in found)


def _remove(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():
        _unlink(path)
        return
    for child in path.iterdir():
        _remove(child)
    _rmdir(path)


def _owner_lives(path: Path, match: re.Match[str]) -> bool:
    """Whether the process that made a temporary may still be at work on it."""
    import psutil

    try:
        changed = max(item.lstat().st_mtime for item in (path, *path.rglob("*")))
        if match["host"] != _HOST:
            return time.time() - changed < FOREIGN_AGE
        started: float = psutil.Process(int(match["pid"])).create_time()
    except psutil.NoSuchProcess:
        return False
    except (psutil.Error, FileNotFoundError):
        return True  # not ours to ask about, or it changes while we look
    return started < changed + 2.0  # started later: the number now belongs to someone else. 2 s for the clock's grain


@contextlib.contextmanager
def _removed_on_error(tmp: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            _remove(tmp)
        raise


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn the failures a user can do something about into sentences; others pass as they are."""
    try:
        yield
    except OSError as error:
        known = _explanation(path, error)
        if known is None:
            raise
        raise known from error


def _explanation(path: Path, error: OSError) -> UserError | None:
    reason = error.strerror or str(error)
    path = Path(*(_TEMPORARY.sub("", part) for part in path.parts))  # the name that the user knows
    if error.errno in _FULL:
        with contextlib.suppress(OSError):
            reason += f", {free_bytes(path) / 2**20:.0f} MiB free"
        advice = "Free some, raise the quota, or choose another folder"
        return DiskFullError(f"{path} cannot be written: no space ({reason}). {advice}; what was there is untouched")
    advice = ""
    if error.errno in (errno.EACCES, errno.EPERM):
        advice = f"Change the owner or mode of {path.parent}, or choose another folder"
    elif error.errno == errno.EROFS:
        advice = "Mount that file system writable, or choose another folder"
    elif error.errno in (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EXDEV):
        advice = "Choose another name or folder"
    elif error.errno == errno.EIO:
        advice = "The disk reports an error: look at the system log, and choose another disk"
    return UserError(f"{path} cannot be written: {reason}. {advice}") if advice else None
