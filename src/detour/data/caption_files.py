"""Reads captions: a text file beside each picture, or one JSONL or CSV file for the whole folder. No torch.

A text file is one caption; newlines inside it stay, white space around it goes. Several captions of a picture come
from a JSONL list, or from several rows for one file.
"""

from __future__ import annotations

import csv
import io
import json
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from detour import UserError


@dataclass(frozen=True, slots=True)
class Table:
    """The rows of a captions file."""

    captions: dict[str, tuple[str, ...]]
    """Of the pictures that are there, by key."""
    missing: dict[str, int] = field(default_factory=dict)
    """Files that rows name and that are not there, with the line of the first such row."""


def read_caption(path: Path) -> str:
    """The caption in a text file; UserError where it cannot be read as UTF-8."""
    return _text(path).strip()


def read_table(path: Path, folder: Path, keys: Iterable[str]) -> Table:
    """The captions in a JSONL or CSV file for the pictures `keys` of a folder; UserError listing every broken row."""
    if path.suffix.lower() not in (".jsonl", ".csv"):
        raise UserError(f"{path}: a captions file ends in .jsonl or .csv, not {path.suffix!r}")
    text = _text(path)
    rows = _json_rows(text) if path.suffix.lower() == ".jsonl" else _csv_rows(text)
    known = {unicodedata.normalize("NFC", key): key for key in keys}  # macOS takes names apart, editors do not
    captions: dict[str, list[str]] = {}
    missing: dict[str, int] = {}
    broken: list[str] = []
    for line, row in rows:
        if isinstance(row, str):
            broken.append(f"line {line}: {row}")
            continue
        name = _key(row[0], folder)
        if name in known:
            captions.setdefault(known[name], []).extend(caption.strip() for caption in row[1])
        else:
            missing.setdefault(row[0], line)
    if broken:
        more = f"\n  and {len(broken) - 20} more" if len(broken) > 20 else ""
        listed = "".join(f"\n  {text}" for text in broken[:20])
        raise UserError(f"{path} cannot be used:{listed}{more}")
    return Table({key: tuple(texts) for key, texts in captions.items()}, missing)


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {(error.strerror or 'unknown reason').lower()}") from None
    return decoded(data, path)


def decoded(data: bytes, path: Path | str) -> str:
    """The text of a caption file that holds these bytes; UserError, which begins with `path`, where it is none."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = "UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else f"byte {error.start + 1} is no UTF-8"
        raise UserError(f"{path} is not UTF-8 text ({found}); save it again as UTF-8") from None
    if "\0" in text:
        raise UserError(f"{path} is not text (it contains zero bytes); write the caption again as UTF-8")
    return text


_Row = tuple[int, tuple[str, list[str]] | str]
"""Line and content: the file's name and its captions, or what is wrong with the row."""


def _json_rows(text: str) -> Iterator[_Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, _json_row(line)


def _json_row(line: str) -> tuple[str, list[str]] | str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"is not JSON ({error})"
    expected = 'expected {"file": "name.png", "caption": "..."} (or a list of captions)'
    if not isinstance(row, dict):
        return f"is not an object; {expected}"
    if absent := [key for key in ("file", "caption") if key not in row]:
        return f"has no {' and no '.join(repr(key) for key in absent)} (it has {_listed(row)}); {expected}"
    captions = row["caption"] if isinstance(row["caption"], list) else [row["caption"]]
    if not isinstance(row["file"], str) or not captions or not all(isinstance(item, str) for item in captions):
        return f"file and caption must be text; {expected}"
    return row["file"], captions


def _csv_rows(text: str) -> Iterator[_Row]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = [column.strip() for column in reader.fieldnames or []]
        reader.fieldnames = columns
        if absent := [column for column in ("file", "caption") if column not in columns]:
            yield 1, f"has no column {' and no column '.join(map(repr, absent))} (it has {_listed(columns)})"
            return
        for row in reader:
            if None in row or row["file"] is None or row["caption"] is None:
                where = 'a caption with a comma needs quotes: photo.png,"a cat, asleep"'
                yield reader.line_num, f"has not {len(columns)} columns; {where}"
            else:
                yield reader.line_num, (row["file"], [row["caption"]])
    except csv.Error as error:
        yield reader.line_num, f"is not CSV ({error})"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names) or "nothing"


def _key(name: str, folder: Path) -> str:
    """A row's file as a picture's key: relative to the folder, with forward slashes, composed (NFC)."""
    path = Path(name)
    if path.is_absolute() and path.is_relative_to(folder.absolute()):
        name = path.relative_to(folder.absolute()).as_posix()
    return unicodedata.normalize("NFC", PurePosixPath(name.strip().replace("\\", "/")).as_posix())
