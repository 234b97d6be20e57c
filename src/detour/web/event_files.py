"""Event files of runs, read bit by bit while they grow: whole lines from a place on.

A place is known by how the file begins and by an offset, so that it holds across servers and copies of the folder, and
is not taken for a place in another file of that name (`detour run --fresh` moves the old one aside).
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from detour import UserError
from detour.events import parse_line

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NAME = "events.jsonl"
BEGINNING = 4096  # bytes of the first line that identify a file; it holds a time in microseconds
LONGEST = 1 << 22  # bytes of a line that is read; a longer one is no event
_BLOCK = 1 << 16

_MARK = re.compile(r"([0-9a-f]{12}|0)-(\d{1,15})")


@dataclass(frozen=True, slots=True)
class Mark:
    """A place between two lines of a file."""

    beginning: str = ""
    """Names the file; empty as long as its first line is not whole."""
    offset: int = 0

    def __str__(self) -> str:
        return f"{self.beginning or '0'}-{self.offset}"

    @classmethod
    def parse(cls, text: str) -> Mark | None:
        """The inverse of `str`; None for anything else."""
        found = _MARK.fullmatch(text)
        return cls("" if found[1] == "0" else found[1], int(found[2])) if found else None


def opened(path: Path) -> BinaryIO | None:
    """The file, None where there is none yet. UserError where it cannot be read."""
    try:
        return path.open("rb")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def beginning(file: BinaryIO) -> str:
    """The name that a file's first line gives it."""
    file.seek(0)
    line = file.readline(BEGINNING)
    whole = line.endswith(b"\n") or len(line) == BEGINNING
    return hashlib.sha256(line).hexdigest()[:12] if whole else ""


def holds(file: BinaryIO, name: str, mark: Mark) -> bool:
    """Is the place still one in this file, which begins with `name`? Before the first line any file will do."""
    if mark.offset == 0:
        return True
    if mark.beginning != name or os.fstat(file.fileno()).st_size < mark.offset:
        return False
    file.seek(mark.offset - 1)
    return file.read(1) == b"\n"


def lines(file: BinaryIO, offset: int) -> Iterator[tuple[bytes, int]]:
    """Whole lines from `offset` on, each with the place behind it. One that nobody can read for its length is empty."""
    file.seek(offset)
    while line := file.readline(LONGEST):
        offset += len(line)
        if not line.endswith(b"\n"):
            if len(line) < LONGEST:
                return  # it is still being written
            while not line.endswith(b"\n"):
                line = file.readline(_BLOCK)
                offset += len(line)
                if not line:
                    return
            line = b""
        yield line, offset


def end(file: BinaryIO) -> Mark:
    """The place behind the last whole line."""
    name, at = beginning(file), os.fstat(file.fileno()).st_size
    while at > 0:
        start = max(0, at - _BLOCK)
        file.seek(start)
        newline = file.read(at - start).rfind(b"\n")
        if newline >= 0:
            return Mark(name, start + newline + 1)
        at = start
    return Mark(name, 0)


def event(line: bytes) -> dict[str, Any]:
    """The event of a line; a warning in its place where it is damaged, so that nothing is passed over in silence."""
    record = parse_line(line)
    if record is not None:
        return record
    message = "a line of events.jsonl is not an event (damaged or edited) and was left out"
    return {"type": "warning", "time": None, "step": None, "message": message, "details": [repr(line[:80])]}


def number(record: dict[str, Any], name: str) -> float | None:
    """A figure of an event; None where it is missing, null (not finite) or something else."""
    value = record.get(name)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
