"""Taking files in: pictures, captions and ZIPs of them. Content decides what a file is; nothing is overwritten unasked.

A file is written aside while it comes, checked in full, and only then gets its name. What is cut off leaves nothing.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal

from fastapi import HTTPException

from detour import UserError, files
from detour.data import caption_files, images
from detour.data.images import BadPictureError
from detour.jobs.states import StateError
from detour.web import captions_edit, dataset_names, zips
from detour.web.datasets import UNREAD
from detour.web.errors import MissingError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from detour.web.dataset_history import Draft
    from detour.web.datasets import Dataset

PICTURE = 256 << 20
CAPTION = captions_edit.LARGEST
ARCHIVE = 8 << 30
"""Most bytes of a file."""
FILES = 200_000  # in a dataset
SPARE = 64 << 20  # bytes that stay free on the disk
BUDGET = images.Budget(64_000_000)
"""Pixels that uploads decode at once: 200 MB."""
_KINDS = "pictures (.png, .jpg, .webp, .bmp), captions (.txt) and .zip files are taken"

Kind = Literal["picture", "caption", "archive"]


@dataclass(frozen=True, slots=True)
class Received:
    """What became of an upload."""

    outcome: Literal["added", "same", "replaced"]
    """`same`: the very file was there already. Of an archive: whether anything was new, or replaced."""
    added: int = 0
    same: int = 0
    replaced: int = 0
    left_out: list[str] = field(default_factory=list)
    """Of an archive: files that were not taken, with the reason."""


@dataclass(slots=True)
class _Incoming:
    """A file that has come, been checked, and lies aside."""

    key: str
    path: Path
    kind: Kind


class _Room:
    """Which names a dataset has, whatever their capitals."""

    def __init__(self, folder: Path, nested: bool) -> None:
        """`nested`: look into subfolders too."""
        self._folder = folder
        keys: list[str] = []
        for place, folders, names in os.walk(folder):
            prefix = "" if place == str(folder) else Path(place).relative_to(folder).as_posix() + "/"
            keys += [prefix + name for name in (*folders, *names)]
            if not nested:
                break
        self._keys = {dataset_names.folded(key): key for key in keys}
        if len(keys) > FILES:
            raise UserError(f"a dataset holds at most {FILES} files; make another one")

    def place(self, key: str) -> tuple[str, Path | None]:
        """Where a file of that name belongs, and what is there already.

        What differs in capitals alone is the same. Something that is no file of its own, such as a link or a folder,
        is in the way, as is a file where a folder is needed: StateError.
        """
        parts = key.split("/")
        for count in range(1, len(parts)):
            known = self._keys.get(dataset_names.folded("/".join(parts[:count])))
            if known is not None:
                folder = self._folder / known
                if not folder.is_dir() or folder.is_symlink():
                    raise StateError(f"{known} is in the way of {key}; rename one of them")
                parts[:count] = known.split("/")
        known = self._keys.get(dataset_names.folded("/".join(parts)))
        if known is None:
            return "/".join(parts), None
        there = self._folder / known
        if there.is_symlink() or not there.is_file():
            raise StateError(f"{known} is in the way of {key}; rename one of them")
        return known, there


def receive(dataset: Dataset, name: str, chunks: Iterable[bytes], length: int | None, replace: bool) -> Received:
    """Take a file in. `length` is what the client says it has; `replace` lets it take the place of another.

    UserError for what cannot be used, StateError where the name is taken by something else, 413 for too much.
    """
    name = dataset_names.checked(name, "the file's name")
    kind, limit = _kind_of(dataset, name)
    if length is not None and length > limit:
        raise _too_large(name, limit)
    if not dataset.folder.is_dir():
        raise MissingError(f"there is no dataset {dataset.name!r} any more")
    if (free := files.free_bytes(dataset.folder)) < (length or 0) + SPARE:
        raise files.DiskFullError(f"{name} does not fit: {free >> 20} MiB are free on the disk; free some")
    with files.scratch_folder(dataset.private) as scratch:
        path = scratch / f"incoming{PurePosixPath(name).suffix.lower()}"
        files.write_chunks(path, _limited(chunks, name, limit))
        if kind == "archive":
            return _take_archive(dataset, name, path, scratch, replace)
        _require_usable(kind, path, name)
        with dataset.locked():
            dataset.history.recover()
            return _take_one(dataset, _Incoming(name, path, kind), replace)


def _kind_of(dataset: Dataset, name: str) -> tuple[Kind, int]:
    suffix = PurePosixPath(name).suffix.lower()
    if suffix in images.ENDINGS:
        return "picture", PICTURE
    if suffix in _caption_endings(dataset):
        return "caption", CAPTION
    if suffix == ".zip":
        return "archive", ARCHIVE
    advice = "; convert it to PNG, JPEG or WebP" if suffix in UNREAD else ""
    raise UserError(f"{name} is not taken: {_KINDS}{advice}")


def _caption_endings(dataset: Dataset) -> frozenset[str]:
    return frozenset({".txt", f".{dataset.settings.caption_ext}"})


def _too_large(name: str, limit: int) -> HTTPException:
    size = f"{limit >> 20} MiB" if limit >> 20 else f"{limit >> 10} KiB"
    return HTTPException(413, f"{name} is too large: at most {size} are taken")


def _limited(chunks: Iterable[bytes], name: str, limit: int) -> Iterator[bytes]:
    """The chunks, gathered to a mebibyte; 413 once there are more bytes than that."""
    held, total = bytearray(), 0
    for chunk in chunks:
        total += len(chunk)
        if total > limit:
            raise _too_large(name, limit)
        held += chunk
        if len(held) >= 1 << 20:
            yield bytes(held)
            held.clear()
    yield bytes(held)


def _require_usable(kind: Kind, path: Path, name: str) -> None:
    """UserError unless the content is what the name says it is, down to the last pixel."""
    if kind == "caption":
        caption_files.decoded(path.read_bytes(), Path(name))
        return
    try:
        images.check(path, BUDGET, 1024)
    except BadPictureError as error:
        raise UserError(f"{name} {error}") from None


def _take_one(dataset: Dataset, incoming: _Incoming, replace: bool) -> Received:
    key, there = _Room(dataset.folder, nested=False).place(incoming.key)
    if there is None:
        files.move([(incoming.path, dataset.folder / key)])
        return Received("added", added=1)
    if _same(there, incoming.path):
        return Received("same", same=1)
    if not replace:
        raise StateError(f"there is another {there.name} in this dataset already; rename yours, or replace it")
    with dataset.history.change("replace", f"Replaced {key}") as draft:
        _put(draft, key, incoming)
    return Received("replaced", replaced=1)


def _put(draft: Draft, key: str, incoming: _Incoming) -> None:
    if incoming.kind == "caption":
        draft.write(key, incoming.path.read_bytes())
    else:
        draft.put(key, incoming.path)


def _same(there: Path, new: Path) -> bool:
    if there.stat().st_size != new.stat().st_size:
        return False
    return files.sha256_file(there) == files.sha256_file(new)


# -------------------------------------------------------------------------------------------------------- archives


def _take_archive(dataset: Dataset, name: str, path: Path, scratch: Path, replace: bool) -> Received:
    """Unpack aside, check each file, and put all of them in their places as one change."""
    limits = {"picture": PICTURE, "caption": CAPTION}
    incoming: list[_Incoming] = []
    with zips.Archive(path) as archive:
        found = archive.contents(_caption_endings(dataset), limits)
        left_out = found.left_out
        for number, member in enumerate(found.members):
            suffix = PurePosixPath(member.key).suffix.lower()
            kind: Kind = "picture" if suffix in images.ENDINGS else "caption"
            one = _Incoming(member.key, scratch / f"{number}{suffix}", kind)
            archive.unpack(member, one.path)
            try:
                _require_usable(kind, one.path, member.key)
            except UserError as error:
                left_out.append(str(error))
                one.path.unlink()
                continue
            incoming.append(one)
    if not incoming:
        raise UserError(f"nothing in {name} can be used: {'; '.join(left_out[:5]) or 'it is empty'}")
    with dataset.locked():
        dataset.history.recover()
        return _put_all(dataset, name, incoming, left_out, replace)


def _put_all(dataset: Dataset, name: str, incoming: list[_Incoming], left_out: list[str], replace: bool) -> Received:
    room = _Room(dataset.folder, nested=True)
    same = added = replaced = 0
    taken: list[str] = []
    todo: list[tuple[str, _Incoming]] = []
    for one in incoming:
        key, there = room.place(one.key)
        if there is None:
            added += 1
        elif _same(there, one.path):
            same += 1
            continue
        elif replace:
            replaced += 1
        else:
            taken.append(one.key)
        todo.append((key, one))
    if taken:
        more = f" and {len(taken) - 5} more" if len(taken) > 5 else ""
        raise StateError(
            f"this dataset has other files of these names already: {', '.join(taken[:5])}{more}; nothing was changed. "
            f"Rename them, or replace what is there"
        )
    with dataset.history.change("add", f"Added {len(todo)} files from {name}") as draft:
        for key, one in todo:
            _put(draft, key, one)
    outcome: Literal["added", "same", "replaced"] = "replaced" if replaced else "added" if added else "same"
    return Received(outcome, added, same, replaced, left_out)
