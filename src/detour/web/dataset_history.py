"""Every change of a dataset, kept on disk so that it can be undone: exact bytes, whatever died in between.

    DATASET/.detour/history/000012/change.jsonl   a line about the change, then one for each file
    DATASET/.detour/history/000012/a0             a file that the change put there or took away, while it is not there
    DATASET/.detour/history/000012/done           the change has been made in full

What is to be done is written down first, with all that undoing needs, and appears as a whole by one rename. Then it is
done, file by file; each file is at any moment as it was or as it is to be. `recover` goes on with a change that was cut
off. The caller holds the library's lock.
"""

from __future__ import annotations

import base64
import binascii
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from detour import UserError, files
from detour.jobs.states import StateError
from detour.web.errors import MissingError

PRIVATE = ".detour"
"""The folder in each dataset for what is not part of it. Hidden, so training passes it over."""
LISTED = 5  # files named in an error; the rest is counted
LARGEST_TEXT = 1 << 20  # bytes of a caption that the history holds in its lines
FEW = 32  # captions that are written one by one
MERGE = 120.0  # seconds in which further edits of one caption belong to the change that began there


@dataclass(frozen=True, slots=True)
class Kept:
    """A file that is moved, never copied: to its place in the history, and back."""

    place: str
    """In the history: `000012/a0`."""
    size: int
    mtime_ns: int


ChangeKind = Literal["edit", "bulk", "remove", "replace", "add", "undo"]
Side = bytes | Kept | None
"""What a file holds before or after a change: a caption's bytes, a picture, or nothing since it is not there."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What a change does to one file."""

    key: str
    before: Side
    after: Side


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """The line about a change."""

    id: int
    kind: ChangeKind
    title: str
    """For people."""
    at: float
    """Unix seconds."""
    count: int
    """Of the files."""
    undoes: int | None = None
    """The change that this one takes back."""


@dataclass(frozen=True, slots=True)
class Listed:
    """A change as the list of them shows it."""

    change: Change
    undone: bool


@dataclass(slots=True)
class Draft:
    """A change that is being put together. Nothing happens before it is complete."""

    root: Path
    scratch: Path
    number: int
    entries: list[Entry] = field(default_factory=list)

    def write(self, key: str, data: bytes) -> None:
        """A caption is to hold these bytes."""
        self.entries.append(Entry(key, self._text(key), data))

    def drop_text(self, key: str) -> None:
        """A caption is to go. One that is none, by its size, is moved as a picture is."""
        path = self.root / key
        if path.is_file() and path.stat().st_size > LARGEST_TEXT:
            self.drop(key)
        else:
            self.entries.append(Entry(key, self._text(key), None))

    def drop(self, key: str) -> None:
        """A picture is to go."""
        self.entries.append(Entry(key, self._there(key), None))

    def put(self, key: str, source: Path) -> None:
        """A finished file is to be the picture of that name; what was there is kept."""
        there, number = self._there(key), len(self.entries)
        target = self.scratch / f"a{number}"
        source.rename(target)
        found = target.stat()
        after = Kept(f"{_name(self.number)}/a{number}", found.st_size, found.st_mtime_ns)
        self.entries.append(Entry(key, there, after))

    def _text(self, key: str) -> bytes | None:
        path = self.root / key
        if path.is_file() and path.stat().st_size > LARGEST_TEXT:
            raise UserError(f"{key} is far too large for a caption; move it away")
        return path.read_bytes() if path.is_file() else None

    def _there(self, key: str) -> Kept | None:
        path = self.root / key
        if not path.is_file():
            return None
        found = path.stat()
        return Kept(f"{_name(self.number)}/b{len(self.entries)}", found.st_size, found.st_mtime_ns)


class History:
    """The changes of the dataset in a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.private = root / PRIVATE
        self._folder = self.private / "history"

    # --- reading --------------------------------------------------------------------------------------------------

    def changes(self, limit: int) -> list[Listed]:
        """The latest changes, the newest first."""
        undone: dict[int, bool] = {}
        found: list[Listed] = []
        for number in reversed(self._numbers()[-limit:]):
            change = self._head(number)
            effective = not undone.get(number, False)
            if change.undoes is not None and effective:
                undone[change.undoes] = True
            found.append(Listed(change, not effective))
        return found

    def entries(self, number: int) -> Iterator[Entry]:
        """What a change did, file by file."""
        with self._file(number).open(encoding="utf-8") as lines:
            next(lines)
            for line in lines:
                entry = json.loads(line)
                yield Entry(entry["key"], _side(entry["before"]), _side(entry["after"]))

    def kept_bytes(self) -> int:
        """What the history takes on the disk."""
        return sum(path.stat().st_size for path in self._folder.rglob("*") if path.is_file())

    # --- changing -------------------------------------------------------------------------------------------------

    @contextmanager
    def change(self, kind: ChangeKind, title: str, undoes: int | None = None) -> Iterator[Draft]:
        """Put a change together; it is made when the block ends. A change of nothing leaves no trace."""
        self.recover()
        number = max(self._numbers(), default=0) + 1
        with files.scratch_folder(self.private) as scratch:
            draft = Draft(self.root, scratch, number)
            yield draft
            if not draft.entries:
                return
            change = Change(
                id=number, kind=kind, title=title, at=time.time(), count=len(draft.entries), undoes=undoes
            )  # fmt: skip
            files.write_chunks(scratch / "change.jsonl", _lines(change, draft.entries))
            files.move([(scratch, self._folder / _name(number))])
        try:
            self._do(number)
        except files.DiskFullError as error:
            raise files.DiskFullError(f"{error}. The change goes on with the next one, once there is space") from error

    def edit(self, key: str, title: str, data: bytes) -> None:
        """Change one caption. What is typed in one go is one change."""
        self.recover()
        last = max(self._numbers(), default=0)
        path = self.root / key
        if last and self._head(last).kind == "edit" and time.time() - self._head(last).at < MERGE:
            (entry,) = self.entries(last)
            if entry.key == key and _holds(path, entry.after):
                merged = Entry(key, entry.before, data)
                files.write_chunks(self._file(last), _lines(self._head(last), [merged]))
                files.write_bytes(path, data)
                return
        with self.change("edit", title) as draft:
            draft.write(key, data)

    def undo(self, number: int) -> Change:
        """Take a change back, as a change of its own; that can be undone in turn.

        StateError where it has been undone, or files have been changed since: nothing is touched then.
        """
        self.recover()
        listed = {one.change.id: one for one in self.changes(len(self._numbers()))}
        if number not in listed:
            raise MissingError(f"there is no change {number} in the history of {self.root.name!r}")
        if listed[number].undone:
            raise StateError(f"change {number} has been undone already")
        backwards = [Entry(entry.key, entry.after, entry.before) for entry in self.entries(number)]
        self._require_possible(backwards)
        title = listed[number].change.title
        title = title.removeprefix("Undone: ") if title.startswith("Undone: ") else f"Undone: {title}"
        with self.change("undo", title, undoes=number) as draft:
            draft.entries += backwards
        return self._head(draft.number)

    def recover(self, *, thorough: bool = False) -> int:
        """Go on with changes that were cut off; returns how many there were. `thorough`: tidy up elsewhere too."""
        files.remove_stale(self.private)
        numbers = self._numbers()
        cut_off = [number for number in numbers if not (self._folder / _name(number) / "done").exists()]
        for number in cut_off:
            self._do(number)
        touched = {(self.root / entry.key).parent for number in cut_off for entry in self.entries(number)}
        touched |= {self._folder / _name(number) for number in cut_off}
        if thorough:  # where an edit that went into the change before it was cut off
            touched |= {self.root} | {self._folder / _name(number) for number in numbers[-1:]}
        for folder in touched:
            files.remove_stale(folder)
        return len(cut_off)

    def forget(self) -> None:
        """Remove the history with all that it keeps: nothing of it can be undone any more."""
        self.recover()
        if self._folder.is_dir():
            files.remove_directory(self._folder)

    # --- steps ----------------------------------------------------------------------------------------------------

    def _do(self, number: int) -> None:
        """Bring every file of a change from how it was to how it is to be. What has been brought there is passed over;
        so is a file that somebody else has changed since."""
        out: list[tuple[Path, Path]] = []
        into: list[tuple[Path, Path]] = []
        texts: list[tuple[Path, bytes]] = []
        for entry in self.entries(number):
            path = self.root / entry.key
            if _holds(path, entry.after):
                continue
            kept = isinstance(entry.before, Kept) and not path.exists() and (self._folder / entry.before.place).exists()
            if not (kept or _holds(path, entry.before)):
                continue
            if isinstance(entry.before, Kept) and not kept:
                out.append((path, self._folder / entry.before.place))
            if isinstance(entry.after, Kept):
                into.append((self._folder / entry.after.place, path))
            elif isinstance(entry.after, bytes):
                texts.append((path, entry.after))
            elif isinstance(entry.before, bytes):
                path.unlink()
        files.move(out)
        files.move(into)
        self._write(texts)
        files.write_bytes(self._folder / _name(number) / "done", b"")

    def _write(self, texts: list[tuple[Path, bytes]]) -> None:
        if len(texts) > FEW:
            files.write_many(texts, self.private)
            return
        for path, data in texts:
            files.write_bytes(path, data)

    def _require_possible(self, entries: list[Entry]) -> None:
        changed = []
        for entry in entries:
            path = self.root / entry.key
            ready = not isinstance(entry.after, Kept) or (self._folder / entry.after.place).is_file()
            if not (_holds(path, entry.after) or (ready and _holds(path, entry.before))):
                changed.append(entry.key)
        if changed:
            more = f" and {len(changed) - LISTED} more" if len(changed) > LISTED else ""
            raise StateError(
                f"this cannot be undone, since files have been changed after it: {', '.join(changed[:LISTED])}{more}; "
                f"undo the later changes first"
            )

    def _numbers(self) -> list[int]:
        if not self._folder.is_dir():
            return []
        return sorted(int(path.name) for path in self._folder.iterdir() if path.name.isdecimal())

    def _file(self, number: int) -> Path:
        return self._folder / _name(number) / "change.jsonl"

    def _head(self, number: int) -> Change:
        try:
            with self._file(number).open(encoding="utf-8") as lines:
                return Change(**json.loads(next(lines)))
        except (OSError, ValueError, TypeError, StopIteration):
            raise UserError(f"{self._file(number)} is damaged; remove its folder to go on without it") from None


def _name(number: int) -> str:
    return f"{number:06}"


def _lines(change: Change, entries: list[Entry]) -> Iterator[bytes]:
    head = {name: getattr(change, name) for name in Change.__dataclass_fields__}
    yield json.dumps(head).encode() + b"\n"
    for entry in entries:
        line = {"key": entry.key, "before": _plain(entry.before), "after": _plain(entry.after)}
        yield json.dumps(line).encode() + b"\n"


def _plain(side: Side) -> dict[str, Any] | None:
    if isinstance(side, Kept):
        return {"place": side.place, "size": side.size, "mtime_ns": side.mtime_ns}
    return None if side is None else {"base64": base64.b64encode(side).decode()}


def _side(plain: dict[str, Any] | None) -> Side:
    if plain is None:
        return None
    if "place" in plain:
        return Kept(plain["place"], plain["size"], plain["mtime_ns"])
    try:
        return base64.b64decode(plain["base64"], validate=True)
    except binascii.Error:
        raise UserError("the history of this dataset is damaged") from None


def _holds(path: Path, side: Side) -> bool:
    """Is the file as that side of a change has it?"""
    if side is None:
        return not path.exists()
    if not path.is_file() or path.is_symlink():
        return False
    found = path.stat()
    if isinstance(side, Kept):
        return (found.st_size, found.st_mtime_ns) == (side.size, side.mtime_ns)
    return found.st_size == len(side) and path.read_bytes() == side
