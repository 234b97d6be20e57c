"""The datasets of the UI: a folder for each, with its pictures and captions as training reads them.

    FOLDER/datasets/NAME/             pictures and caption files, in subfolders too
    FOLDER/datasets/NAME/.detour/     settings and history
    FOLDER/trash/ID/NAME/             a dataset that was removed
    FOLDER/cache/                     thumbnails and what was found out about pictures; may be deleted at any time

Links are neither shown nor followed: what the server hands out lies in its folder. Whoever changes something holds the
lock of all datasets, across servers on one folder.
"""

from __future__ import annotations

import os
import secrets
import shutil
import threading
import time
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from detour import UserError, files
from detour.data import clips, images
from detour.jobs.states import StateError
from detour.web import dataset_names
from detour.web.dataset_history import PRIVATE, History
from detour.web.errors import MissingError

PATIENCE = 60.0  # seconds that a change waits for another one
SECOND = 1_000_000_000  # ns
CAPTION_ENDINGS = ("txt", "caption", "captions", "tags", "prompt")
Ending = Literal["txt", "caption", "captions", "tags", "prompt"]
UNREAD = images.UNREAD_ENDINGS | clips.VIDEO_ENDINGS | clips.UNREAD_ENDINGS
"""Files that somebody may have meant as pictures."""
LOCK = ".lock"


class Settings(BaseModel):
    """What is remembered of a dataset besides its files."""

    model_config = ConfigDict(extra="ignore")
    caption_ext: Ending = "txt"
    """Ending of the caption file beside each picture; `caption_ext` in the job file."""
    trigger_word: Annotated[str, Field(max_length=100)] = ""
    arch: Annotated[str, Field(max_length=40)] = ""
    """The architecture that the page last showed buckets and health for; empty: the default."""
    resolution: Annotated[int, Field(ge=64, le=4096)] = 1024


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of a dataset, by their keys: relative names with forward slashes, sorted."""

    pictures: tuple[str, ...]
    texts: Mapping[str, str]
    """The caption files, by their keys without the ending."""
    unread: tuple[str, ...]
    """In formats that are not read."""
    others: tuple[str, ...]
    shared: Mapping[str, tuple[str, ...]]
    """Pictures that would take one caption file, by its key without the ending."""
    stems: Mapping[str, str]
    """Of each picture its key without the ending."""

    def caption(self, key: str) -> str | None:
        """The caption file of a picture, or None where there is none."""
        return self.texts.get(self.stems[key])

    @property
    def lone(self) -> list[str]:
        """Caption files without a picture."""
        stems = set(self.stems.values())
        return sorted(name for stem, name in self.texts.items() if stem not in stems)

    @property
    def captioned(self) -> int:
        """Pictures that have a caption file."""
        return sum(stem in self.texts for stem in self.stems.values())


@dataclass(frozen=True, slots=True)
class Trashed:
    """A dataset that was removed."""

    id: str
    name: str
    at: float
    """Unix seconds."""


class Dataset:
    """One dataset."""

    def __init__(self, library: Library, name: str) -> None:
        self.library = library
        self.name = name
        self.folder = library.root / name
        self.private = self.folder / PRIVATE
        self.history = History(self.folder)

    @property
    def settings(self) -> Settings:
        """As they were set last."""
        path = self.private / "settings.json"
        try:
            return Settings.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return Settings()
        except ValidationError:
            raise UserError(f"{path} is damaged; remove it to begin with the defaults") from None

    def set(self, settings: Settings) -> None:
        """Keep other settings."""
        with self.locked():
            files.write_bytes(self.private / "settings.json", settings.model_dump_json(indent=2) + "\n")

    def listing(self) -> Listing:
        """Its files, as they are now."""
        return self.library.listing(self.folder, self.settings.caption_ext)

    def picture(self, key: str) -> Path:
        """The file of a picture. MissingError for anything that is not one of this dataset's pictures."""
        if key not in self.listing().stems:
            raise MissingError(f"there is no picture {key!r} in {self.name!r}")
        return self.folder / key

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else changes any dataset meanwhile."""
        with self.library.locked():
            if not self.folder.is_dir():
                raise MissingError(f"there is no dataset {self.name!r} any more")
            yield


@dataclass(slots=True)
class _Remembered:
    """A listing, and how its folders were when it was made."""

    listing: Listing
    times: dict[Path, int]
    taken: int
    """ns"""


@dataclass
class Library:
    """All datasets in the folder of a UI. Shared by the server's threads."""

    folder: Path
    _listings: OrderedDict[tuple[Path, str], _Remembered] = field(default_factory=OrderedDict)
    _guard: threading.Lock = field(default_factory=threading.Lock)

    @property
    def root(self) -> Path:
        """Where the datasets lie."""
        return self.folder / "datasets"

    @property
    def trash(self) -> Path:
        """Where removed ones lie."""
        return self.folder / "trash"

    @property
    def cache(self) -> Path:
        """What can be made again."""
        return self.folder / "cache"

    # --- reading --------------------------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """The datasets, sorted as people sort."""
        if not self.root.is_dir():
            return []
        with os.scandir(self.root) as entries:
            found = [entry.name for entry in entries if _is_shown(entry) and entry.is_dir(follow_symlinks=False)]
        return sorted(found, key=lambda name: (dataset_names.folded(name), name))

    def dataset(self, name: str) -> Dataset:
        """The dataset by that name. MissingError if there is none."""
        if name not in self.names():
            raise MissingError(f"there is no dataset {name!r}")
        return Dataset(self, name)

    def trashed(self) -> list[Trashed]:
        """What can be brought back, the latest first."""
        found = []
        for place in self.trash.iterdir() if self.trash.is_dir() else []:
            names = [path.name for path in place.iterdir() if path.is_dir()] if _is_trash(place) else []
            if len(names) == 1:
                found.append(Trashed(place.name, names[0], int(place.name.split("-")[0]) / 1000))
        return sorted(found, key=lambda trashed: trashed.id, reverse=True)

    def listing(self, folder: Path, ending: str) -> Listing:
        """The files in a folder. It is read again only where the time of one of its folders says so."""
        with self._guard:
            known = self._listings.get((folder, ending))
        if known is not None and _still_so(known):
            return known.listing
        taken = time.time_ns()
        times, keys = _walk(folder)
        made = _sorted_out(keys, ending)
        with self._guard:
            self._listings[folder, ending] = _Remembered(made, times, taken)
            while len(self._listings) > 32:
                self._listings.popitem(last=False)
        return made

    # --- changing -------------------------------------------------------------------------------------------------

    @contextmanager
    def locked(self, patience: float = PATIENCE) -> Iterator[None]:
        """Nobody else changes any dataset meanwhile. StateError if another change takes too long."""
        try:
            with files.explained(self.root), FileLock(self.root / LOCK, timeout=patience):
                yield
        except Timeout:
            raise StateError("another change is still being made; try again in a moment") from None

    def create(self, name: str) -> Dataset:
        """An empty dataset. StateError if there is one whose name a file system could take for the same."""
        name = dataset_names.checked(name)
        files.make_folder(self.root)
        with self.locked():
            self._require_free(name)
            with files.explained(self.root / name):
                (self.root / name).mkdir()
            files.make_folder(self.root / name / PRIVATE)
        return Dataset(self, name)

    def rename(self, old: str, new: str) -> Dataset:
        """Give a dataset another name."""
        new = dataset_names.checked(new)
        with self.locked():
            self.dataset(old)
            if new != old:
                self._require_free(new, old)
                files.move([(self.root / old, self.root / new)])
        return Dataset(self, new)

    def remove(self, name: str) -> Trashed:
        """Move a dataset to the trash, whole."""
        now = int(time.time() * 1000)
        with self.locked():
            self.dataset(name)
            place = self.trash / f"{now}-{secrets.token_hex(4)}"
            files.move([(self.root / name, place / name)])
        return Trashed(place.name, name, now / 1000)

    def restore(self, id: str) -> Dataset:
        """Bring a dataset back from the trash. StateError if its name has been given to another."""
        trashed = self._trashed(id)
        files.make_folder(self.root)
        with self.locked():
            self._require_free(trashed.name)
            files.move([(self.trash / trashed.id / trashed.name, self.root / trashed.name)])
            shutil.rmtree(self.trash / trashed.id, ignore_errors=True)
        return Dataset(self, trashed.name)

    def destroy(self, id: str) -> None:
        """Delete a dataset in the trash for good."""
        files.remove_directory(self.trash / self._trashed(id).id)

    def recover(self) -> None:
        """Go on with what a server that died was doing; left to it if another server is at work."""
        if not self.root.is_dir():
            return
        try:
            with self.locked(patience=0):
                for name in self.names():
                    if (self.root / name / PRIVATE).is_dir():
                        History(self.root / name).recover(thorough=True)
        except StateError:
            return

    def _trashed(self, id: str) -> Trashed:
        found = next((trashed for trashed in self.trashed() if trashed.id == id), None)
        if found is None:
            raise MissingError("this is not in the trash any more")
        return found

    def _require_free(self, name: str, but: str | None = None) -> None:
        wanted = dataset_names.folded(name)
        for path in self.root.iterdir():
            if dataset_names.folded(path.name) == wanted and path.name != but:
                raise StateError(f"there is a dataset {path.name!r} already; choose another name")


@lru_cache(maxsize=8)
def library(folder: Path) -> Library:
    """The library in the folder of a UI: one, so that what it remembers is shared."""
    return Library(folder)


def _is_shown(entry: os.DirEntry[str]) -> bool:
    """Hidden files are not the user's, and names that are not UTF-8 cannot be shown."""
    return not entry.name.startswith(".") and entry.name.encode(errors="replace").decode() == entry.name


def _is_trash(place: Path) -> bool:
    first, _, rest = place.name.partition("-")
    return first.isdecimal() and bool(rest) and not files.is_temporary(place) and place.is_dir()


def _still_so(known: _Remembered) -> bool:
    try:
        times = {place: place.stat().st_mtime_ns for place in known.times}
    except OSError:
        return False
    return times == known.times and all(_settled(value, known.taken) for value in times.values())


def _settled(changed: int, taken: int) -> bool:
    """Would every change after `taken` show in the time of the folder? Clocks of file systems tick in 4 ms, or 2 s."""
    return changed < taken - (2 * SECOND if changed % SECOND == 0 else SECOND // 20)


def _walk(folder: Path) -> tuple[dict[Path, int], list[str]]:
    """The folders with their times, and the keys of all files."""
    times: dict[Path, int] = {}
    keys: list[str] = []
    waiting = [""]
    while waiting:
        prefix = waiting.pop()
        place = folder / prefix
        try:
            times[place] = place.stat().st_mtime_ns
            with os.scandir(place) as entries:
                for entry in filter(_is_shown, entries):
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(f"{prefix}{entry.name}/")
                    elif entry.is_file(follow_symlinks=False):
                        keys.append(prefix + entry.name)
        except FileNotFoundError:
            if not prefix:
                raise MissingError(f"there is no dataset {folder.name!r} any more") from None
    return times, sorted(keys)


def _sorted_out(keys: list[str], ending: str) -> Listing:
    """What is what, by the endings. Plain text work: 20 000 files are to take 50 ms."""
    pictures, unread, others = [], [], []
    texts: dict[str, str] = {}
    stems: dict[str, list[str]] = defaultdict(list)
    for key in keys:
        stem, suffix = stem_and_suffix(key)
        if suffix == f".{ending}":
            texts[stem] = key
        elif suffix in images.ENDINGS:
            pictures.append(key)
            stems[stem].append(key)
        elif suffix in UNREAD:
            unread.append(key)
        elif not files.is_temporary(Path(key)):
            others.append(key)
    shared = {stem: tuple(names) for stem, names in stems.items() if len(names) > 1}
    return Listing(
        pictures=tuple(pictures),
        texts=texts,
        unread=tuple(unread),
        others=tuple(others),
        shared=shared,
        stems={key: stem for stem, names in stems.items() for key in names},
    )


def stem_and_suffix(key: str) -> tuple[str, str]:
    """A key without its ending, and the ending in small letters; as `stem_of`, without the cost of a path."""
    stem, dot, suffix = key.rpartition(".")
    if not dot or "/" in suffix or not stem or stem.endswith("/"):
        return key, ""
    return stem, f".{suffix.lower()}"
