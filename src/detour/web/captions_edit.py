"""Captions: reading them for the pages, saving one, changing many at once, and figures about all of them.

Nothing is overwritten that was not seen: who saves says which version was on the page, who changes many says what the
preview showed. Every change goes through the history, which gives back the exact bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import statistics as averages
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from math import inf
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from detour import UserError, files
from detour.data import caption_files
from detour.jobs.states import StateError
from detour.web.errors import MissingError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from detour.web.datasets import Dataset, Listing

LARGEST = 1 << 16  # bytes of a caption; models read 77 to 512 tokens
ABSENT = "none"
"""The version of a caption that is not there."""
SHOWN = 100  # changes that a preview shows; the rest is counted
COMMON = 40  # words and tags in the statistics
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
_SMALL_WORDS = frozenset(
    ("a", "an", "and", "are", "as", "at", "by", "for", "from", "in", "into", "is", "it", "its", "of", "on", "or",
     "the", "their", "to", "with")
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Caption:
    """A caption as it is on the disk."""

    text: str | None
    """None where there is none, or it cannot be read."""
    version: str
    """Changes when the file does."""
    problem: str = ""
    """Why it cannot be read."""


NONE = Caption(None, ABSENT)


class Replace(BaseModel):
    """Put one text in the place of another, wherever it stands. Both are plain text."""

    model_config = ConfigDict(extra="forbid")
    action: Literal["replace"]
    find: Annotated[str, Field(min_length=1, max_length=500)]
    replace: Annotated[str, Field(max_length=500)] = ""
    match_case: bool = False
    whole_words: bool = False

    def applied(self, text: str) -> str:
        """A caption after it."""
        # Escaped text between two fixed signs of width 0: there is nothing that could take long.
        found = re.escape(self.find)
        pattern = rf"(?<!\w){found}(?!\w)" if self.whole_words else found
        return re.sub(pattern, lambda _: self.replace, text, flags=0 if self.match_case else re.IGNORECASE)

    @property
    def title(self) -> str:
        """For the history."""
        if not self.replace:
            return f"Removed {_short(self.find)}"
        return f"Replaced {_short(self.find)} with {_short(self.replace)}"


class Add(BaseModel):
    """Put a text before or after every caption, such as a trigger word."""

    model_config = ConfigDict(extra="forbid")
    action: Literal["add"]
    text: Annotated[str, Field(min_length=1, max_length=500)]
    where: Literal["start", "end"] = "start"
    separator: Annotated[str, Field(max_length=10)] = ", "
    skip_present: bool = True
    """Leave captions alone that have it already, as a word."""
    make_missing: bool = False
    """Give pictures without a caption one that is this text alone."""

    def applied(self, text: str) -> str:
        """A caption after it."""
        if self.skip_present and re.search(rf"(?<!\w){re.escape(self.text)}(?!\w)", text):
            return text
        body = text.strip()
        if not body:
            return self.text
        joined = (self.text, body) if self.where == "start" else (body, self.text)
        return text.replace(body, self.separator.join(joined), 1)

    @property
    def title(self) -> str:
        """For the history."""
        return f"Put {_short(self.text)} {'before' if self.where == 'start' else 'after'} captions"


Edit = Annotated[Replace | Add, Field(discriminator="action")]


@dataclass(frozen=True, slots=True)
class Planned:
    """What would happen to one caption."""

    key: str
    """The picture's."""
    file: str
    """The caption's."""
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What would happen."""

    changes: Sequence[Planned]
    unreadable: Sequence[str]
    """Pictures whose captions cannot be read and stay as they are."""
    token: str
    """Names this edit of these captions as they are now."""


# --------------------------------------------------------------------------------------------------------- reading


def read(dataset: Dataset, key: str) -> Caption:
    """The caption of a picture. MissingError if there is no such picture."""
    listing = dataset.listing()
    if key not in listing.stems:
        raise MissingError(f"there is no picture {key!r} in {dataset.name!r}")
    name = listing.caption(key)
    return NONE if name is None else _read(str(dataset.folder / name))


def read_all(
    dataset: Dataset, listing: Listing, keys: Sequence[str] | None = None, *, most: float = inf
) -> dict[str, Caption]:
    """The captions of these pictures, or of all. Files that have not changed are not read again.

    Once `most` were read anew, the rest is left for the next time.
    """
    known = _known(dataset.folder)
    if len(known) > 2 * len(listing.texts) + 1000:
        known.clear()  # most belong to files that are gone
    found: dict[str, Caption] = {}
    folder = f"{dataset.folder}{os.sep}"  # texts: 10 000 paths take three times as long
    before = len(known)
    for key in listing.pictures if keys is None else keys:
        if len(known) - before >= most:
            break
        name = listing.caption(key)
        found[key] = NONE if name is None else _remembered(folder + name, known)
    return found


_Known = dict[str, tuple[tuple[int, int, int], Caption]]


@lru_cache(maxsize=8)
def _known(_folder: Path) -> _Known:
    """The captions in a folder that were read before, with the state of their files then."""
    return {}


def _remembered(path: str, known: _Known) -> Caption:
    try:
        found = os.stat(path)  # noqa: PTH116
    except FileNotFoundError:
        return NONE
    state = (found.st_size, found.st_mtime_ns, found.st_ino)
    before = known.get(path)
    if before is not None and before[0] == state:
        return before[1]
    caption = _read(path)
    known[path] = (state, caption)
    return caption


def _read(path: str) -> Caption:
    try:
        file = os.open(path, os.O_RDONLY | files.BINARY)  # a file object would take as long again
        try:
            data = os.read(file, LARGEST + 1)
            found = os.fstat(file) if len(data) > LARGEST else None
        finally:
            os.close(file)
    except FileNotFoundError:
        return NONE
    except OSError as error:
        return Caption(None, "unread", f"cannot be read: {error.strerror}")
    if found is not None:
        problem = f"is longer than {LARGEST >> 10} KiB, so it is no caption"
        return Caption(None, f"{found.st_size}-{found.st_mtime_ns}", problem)
    try:
        return Caption(caption_files.decoded(data, path), _version(data))
    except UserError as error:
        return Caption(None, _version(data), str(error).removeprefix(f"{path} "))


def _version(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------- saving


def save(dataset: Dataset, key: str, text: str, version: str) -> Caption:
    """Write the caption of a picture, if its file is still of that version; StateError if it is not."""
    data = text.encode()
    if len(data) > LARGEST or "\0" in text:
        raise UserError(f"a caption is text of at most {LARGEST >> 10} KiB without zero bytes; nothing was saved")
    with dataset.locked():
        there = read(dataset, key)
        if there.version != version:
            raise StateError(f"the caption of {key} has been changed meanwhile; look at it before you save")
        if text == (there.text or "") and not there.problem:
            return there
        name = caption_file(dataset.listing(), key, dataset.settings.caption_ext)
        if there.version == ABSENT and os.path.lexists(dataset.folder / name):
            raise StateError(f"{name} is a link or a folder, and no caption; move it away")
        dataset.history.edit(name, f"Caption of {key}", data)
        return Caption(text, _version(data))


def caption_file(listing: Listing, key: str, ending: str) -> str:
    """The key of a picture's caption file: the one that is there, or the one to write."""
    return listing.caption(key) or f"{listing.stems[key]}.{ending}"


# -------------------------------------------------------------------------------------------------- many at a time


def plan(dataset: Dataset, edit: Edit, keys: Sequence[str] | None = None) -> Plan:
    """What an edit would do to the captions of these pictures, or of all."""
    listing, ending = dataset.listing(), dataset.settings.caption_ext
    chosen = [key for key in keys if key in listing.stems] if keys is not None else listing.pictures
    digest = hashlib.sha256(json.dumps([edit.model_dump(), ending]).encode())
    changes: dict[str, Planned] = {}
    unreadable = []
    for key, caption in read_all(dataset, listing, chosen).items():
        if caption.problem:
            unreadable.append(key)
            continue
        name = caption_file(listing, key, ending)
        missing = isinstance(edit, Add) and edit.make_missing and not os.path.lexists(dataset.folder / name)
        if caption.text is None and not missing:
            continue
        before = caption.text or ""
        after = edit.applied(before)
        if after != before:
            if len(after.encode()) > LARGEST:
                raise UserError(f"the caption of {key} would grow beyond {LARGEST >> 10} KiB; nothing was changed")
            changes[name] = Planned(key, name, before, after)  # pictures may share a file
            digest.update(json.dumps([key, caption.version]).encode())
    return Plan(list(changes.values()), unreadable, digest.hexdigest()[:32])


def apply(dataset: Dataset, edit: Edit, token: str, keys: Sequence[str] | None = None) -> int:
    """Do what a preview showed; returns the number of captions. StateError if something else would be done now."""
    with dataset.locked():
        dataset.history.recover()
        now = plan(dataset, edit, keys)
        if now.token != token:
            raise StateError("captions have been changed since the preview; look at it again")
        with dataset.history.change("bulk", edit.title) as draft:
            for change in now.changes:
                draft.write(change.file, change.after.encode())
    return len(now.changes)


def _short(text: str) -> str:
    return f"“{text if len(text) <= 40 else text[:37] + '...'}”"


# -------------------------------------------------------------------------------------------------------- figures


@dataclass(frozen=True, slots=True)
class Figures:
    """About the captions of a dataset. Lengths are in words."""

    pictures: int
    missing: int
    empty: int
    unreadable: int
    shortest: int
    median: float
    longest: int
    lengths: Sequence[tuple[int, int]]
    """From so many words on, in steps of ten: how many captions."""
    words: Sequence[tuple[str, int]]
    """In how many captions the most common words stand; little ones are left out."""
    tags: Sequence[tuple[str, int]]
    """The same for what stands between commas, where there are any."""


def figures(captions: Mapping[str, Caption]) -> Figures:
    """Count, if they are others than before: 10 000 captions take 0.1 s."""
    return _counted(tuple(captions.values()))


@lru_cache(maxsize=2)
def _counted(captions: tuple[Caption, ...]) -> Figures:
    texts = [caption.text.strip() for caption in captions if caption.text is not None]
    said = [text for text in texts if text]
    lengths = [len(text.split()) for text in said]
    steps = Counter(length // 10 * 10 for length in lengths)
    lowered = [text.lower() for text in said]
    words = Counter(chain.from_iterable(set(_WORD.findall(text)) for text in lowered))
    for word in _SMALL_WORDS:
        del words[word]
    lists = (text.split(",") for text in lowered if "," in text)
    tags = Counter(chain.from_iterable({" ".join(tag.split()) for tag in tags} for tags in lists))
    del tags[""]
    return Figures(
        pictures=len(captions),
        missing=sum(caption.version == ABSENT for caption in captions),
        empty=len(texts) - len(said),
        unreadable=sum(bool(caption.problem) for caption in captions),
        shortest=min(lengths, default=0),
        median=averages.median(lengths) if lengths else 0,
        longest=max(lengths, default=0),
        lengths=sorted(steps.items()),
        words=_most(words),
        tags=_most(tags),
    )


def _most(counted: Counter[str]) -> list[tuple[str, int]]:
    return sorted(counted.items(), key=lambda pair: (-pair[1], pair[0]))[:COMMON]
