"""Unpacking a ZIP that somebody else may have made. Everything is checked before anything is written.

What is wrong with the archive itself (names that lead out, links, passwords, bombs, damage) refuses it whole. A picture
in it that cannot be used is left out and named; so is what is neither a picture nor a caption.
"""

from __future__ import annotations

import stat
import struct
import zipfile
import zlib
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, BinaryIO

from detour import UserError, files
from detour.data.images import ENDINGS, UNREAD_ENDINGS
from detour.web import dataset_names

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence
    from pathlib import Path

ENTRIES = 50_000  # 20 000 pictures with captions, and folders
DIRECTORY = 8 << 20  # bytes of an archive's list of entries: 50 000 names of 100 letters
RATIO = 100  # times its own size; pictures hardly shrink, drawn BMPs by up to 50
HARMLESS = 64 << 20  # bytes below which the ratio does not matter
DEPTH = 8  # folders in folders
LISTED = 5
_CHUNK = 1 << 20
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_ARCHIVES = frozenset({".zip", ".7z", ".rar", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst"})


class _NowhereError(OSError):
    """An archive leads to a place that no file has. To be told from a disk that fails."""


# What `zipfile` raises on damaged files (found by flipping bytes, tests/web/test_uploads_zip.py).
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, struct.error, OverflowError, ValueError, KeyError, IndexError,
           NotImplementedError, RuntimeError, _NowhereError)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Member:
    """A picture or caption in an archive."""

    info: zipfile.ZipInfo
    key: str
    """Where it belongs in the dataset."""


@dataclass(slots=True)
class Contents:
    """What an archive holds."""

    members: list[Member] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    """Files that are neither pictures nor captions."""


class _Reader(BufferedReader):
    """A file of which only so much is read at once: `zipfile` reads the list of all entries in one go."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > DIRECTORY:
            raise UserError(f"the ZIP holds too many files: at most {ENTRIES} are taken; make several of it")
        return super().read(size)

    def seek(self, target: int, whence: int = 0, /) -> int:
        try:
            return super().seek(target, whence)
        except OSError as error:  # a place before the beginning, or beyond what a disk could hold
            raise _NowhereError(*error.args) from None


class Archive:
    """An archive that has been opened; a context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO | None = None

    def __enter__(self) -> Archive:
        self._size = self.path.stat().st_size
        self._file = _Reader(self.path.open("rb", buffering=0))
        try:
            self._zip = zipfile.ZipFile(self._file)
        except _DAMAGE as error:
            self._file.close()
            raise UserError(f"the ZIP is damaged or no ZIP ({error}); make it again") from None
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._zip.close()
        assert self._file is not None
        self._file.close()

    def contents(self, captions: Collection[str], limits: Mapping[str, int]) -> Contents:
        """What is in it, after every check that needs no unpacking.

        `captions` are the endings of captions; `limits` are the most bytes of a `picture` and of a `caption`.
        """
        found = Contents()
        infos = self._zip.infolist()
        if len(infos) > ENTRIES:
            raise UserError(f"the ZIP holds {len(infos)} files: at most {ENTRIES} are taken; make several of it")
        for info in infos:
            _require_plain(info)
        wanted = [info for info in infos if not info.is_dir() and not _is_litter(info)]
        parts = {info.filename: _parts(info) for info in wanted}
        skipped = _common_folder(list(parts.values()))
        for info in wanted:
            name = "/".join(parts[info.filename][skipped:])
            suffix = PurePosixPath(name).suffix.lower()
            if suffix in _ARCHIVES:
                raise UserError(f"the ZIP holds another archive ({name}); unpack that first")
            kind = "picture" if suffix in ENDINGS else "caption" if suffix in captions else None
            if kind is None:
                reason = "in a format that is not read" if suffix in UNREAD_ENDINGS else "neither picture nor caption"
                found.left_out.append(f"{name}: {reason}")
                continue
            if info.file_size > limits[kind]:
                raise UserError(f"{name} has {info.file_size >> 20} MiB; a {kind} has at most {limits[kind] >> 20} MiB")
            found.members.append(Member(info, name))
        self._require_reasonable(found.members)
        _require_different([member.key for member in found.members])
        return found

    def unpack(self, member: Member, target: Path) -> None:
        """Write a member to a file. UserError where it is damaged, or of another size than the archive says."""
        files.write_chunks(target, self._chunks(member))

    def _chunks(self, member: Member) -> Iterator[bytes]:
        size = 0
        try:
            with self._zip.open(member.info) as source:
                while chunk := source.read(_CHUNK):
                    size += len(chunk)
                    if size > member.info.file_size:
                        break
                    yield chunk
        except _DAMAGE as error:
            raise UserError(f"the ZIP is damaged at {member.key} ({error}); make it again") from None
        if size != member.info.file_size:
            raise UserError(f"the ZIP is damaged at {member.key}: its size is not what the ZIP says; make it again")

    def _require_reasonable(self, members: Sequence[Member]) -> None:
        total = sum(member.info.file_size for member in members)
        if total > HARMLESS and total > RATIO * self._size:
            times = total // max(1, self._size)
            raise UserError(
                f"the ZIP would grow to {total >> 20} MiB, {times} times its size; such archives are refused "
                f"(pictures hardly shrink in a ZIP)"
            )
        free = files.free_bytes(self.path)
        if total > free:
            raise files.DiskFullError(f"the ZIP needs {total >> 20} MiB, and {free >> 20} MiB are free; free some")


def _require_plain(info: zipfile.ZipInfo) -> None:
    """UserError for anything but a file or folder with an honest name, readable without a password."""
    name = info.orig_filename
    shown = name.encode("ascii", "backslashreplace").decode()[:80]
    kind = stat.S_IFMT(info.external_attr >> 16)
    if "\0" in name or "\\" in name or name.startswith("/") or ":" in name.split("/")[0]:
        raise UserError(f"the ZIP holds a name that is no plain name: {shown!r}; make it again")
    if any(part in ("..", ".") for part in name.split("/")):
        raise UserError(f"the ZIP holds a name that leads out of its folder: {shown!r}; make it again")
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise UserError(f"the ZIP holds {shown!r}, which is a link or device; put the file itself into it")
    if info.flag_bits & 0x1:
        raise UserError("the ZIP has a password; make one without")
    if info.compress_type not in _METHODS:
        raise UserError("the ZIP is compressed in a way that is not read; make an ordinary one (deflate)")


def _is_litter(info: zipfile.ZipInfo) -> bool:
    """What systems leave in archives unasked: hidden files, and what macOS and Windows keep for themselves."""
    parts = info.filename.split("/")
    return any(part.startswith(".") for part in parts) or parts[0] == "__MACOSX" or parts[-1].lower() == "thumbs.db"


def _parts(info: zipfile.ZipInfo) -> list[str]:
    parts = info.filename.split("/")
    if len(parts) > DEPTH:
        raise UserError(f"the ZIP holds folders in folders beyond {DEPTH}: {info.filename[:80]!r}; make it flatter")
    return [dataset_names.checked(part, "the ZIP holds a name that cannot be used") for part in parts]


def _common_folder(names: Sequence[Sequence[str]]) -> int:
    """How many leading folders all files share: a ZIP of a folder is meant as what is in it."""
    if not names:
        return 0
    shortest = min(len(parts) for parts in names) - 1
    for place in range(shortest):
        if len({parts[place] for parts in names}) > 1:
            return place
    return shortest


def _require_different(keys: Sequence[str]) -> None:
    """UserError where two names are one to some file system: two files, two folders, or a file and a folder."""
    seen: dict[str, tuple[str, bool]] = {}
    for key in keys:
        parts = key.split("/")
        for count in range(1, len(parts) + 1):
            name, is_file = "/".join(parts[:count]), count == len(parts)
            folded = dataset_names.folded(name)
            if folded not in seen:
                seen[folded] = (name, is_file)
            elif is_file or seen[folded] != (name, False):
                both = f"{seen[folded][0]!r} and {name!r}"
                raise UserError(f"the ZIP holds two of one name (capitals do not count): {both}; rename one")
