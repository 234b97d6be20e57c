"""Looks at the pictures of a dataset in the background, once each, for the health report and the buckets.

What was found out about a picture is kept in `cache/health/NAME.json` and counts until the file's size or time changes.
"""

from __future__ import annotations

import base64
import contextlib
import json
import threading
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from detour import UserError, archs, files
from detour.data import buckets, health, images
from detour.data.health import Aim, Finding, Item, Subject
from detour.data.images import BadPictureError, Facts
from detour.web import captions_edit

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from detour.archs.base import ArchSpec
    from detour.config.job import ModelArch
    from detour.web.datasets import Dataset, Library, Listing, Settings
    from detour.web.thumbnails import Cut

THREADS = 2
REMEMBERED = 4  # datasets whose pictures' facts are held: 1 KB for each picture
SAVED_EVERY = 30.0  # seconds; 10 000 pictures are 13 MB
VERSION = 1  # of what is kept; others are passed over
_BUDGET = images.Budget(64_000_000)

State = Literal["none", "running", "done", "failed"]


@dataclass(frozen=True, slots=True)
class Seen:
    """What is known about a picture."""

    size: int
    mtime_ns: int
    resolution: int
    """For which its sharpness was measured."""
    facts: Facts | None
    problem: str
    """Why it cannot be used, where there are no facts."""


@dataclass
class Work:
    """The pictures of one dataset being looked at."""

    aim: Aim
    state: State = "running"
    done: int = 0
    total: int = 0
    problem: str = ""
    seen: dict[str, Seen] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    pictures: int = 0
    at: float = 0.0
    """When it was done, in Unix seconds."""
    dropped: bool = False
    """Somebody wants something else by now."""


class Health:
    """The reports on all datasets of a server."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._works: dict[str, Work] = {}
        self._lock = threading.Lock()

    def look(self, name: str) -> Work | None:
        """How far the report on a dataset is; None if nobody has asked for it."""
        return self._works.get(name)

    def start(self, dataset: Dataset, aim: Aim) -> Work:
        """Make the report, unless the very same is being made. What is known of pictures is not found out again."""
        with self._lock:
            running = self._works.get(dataset.name)
            if running is not None and running.state == "running" and running.aim == aim:
                return running
            if running is not None:
                running.dropped = True
            work = Work(aim, seen=dict(running.seen) if running is not None else {})
            self._works.pop(dataset.name, None)
            self._works[dataset.name] = work
            for name in list(self._works)[:-REMEMBERED]:
                if self._works[name].state != "running":
                    del self._works[name]
        threading.Thread(target=self._run, args=(dataset, work), name="dataset health", daemon=True).start()
        return work

    def seen(self, dataset: Dataset, listing: Listing) -> dict[str, Seen]:
        """What was found out about its pictures when they were looked at last."""
        work = self._works.get(dataset.name)
        known = work.seen if work is not None and work.seen else _kept(self._file(dataset.name))
        return {key: known[key] for key in listing.pictures if key in known}

    def renamed(self, old: str, new: str) -> None:
        """What is known stays known."""
        with self._lock:
            if old in self._works:
                self._works[old].dropped = True
                del self._works[old]
            if self._file(old).exists():
                self._file(old).replace(self._file(new))

    def _file(self, name: str) -> Path:
        return self._library.cache / "health" / f"{name}.json"

    def _run(self, dataset: Dataset, work: Work) -> None:
        try:
            self._make(dataset, work)
            work.state = "done"
        except UserError as error:
            work.problem = str(error)
        finally:
            if work.state != "done":
                work.problem = work.problem or "this failed unexpectedly; the server's terminal shows where"
                work.state = "failed"

    def _make(self, dataset: Dataset, work: Work) -> None:
        file, listing = self._file(dataset.name), dataset.listing()
        known = _kept(file) | work.seen
        work.seen = {}
        todo = []
        for key in listing.pictures:
            seen = _current(dataset.folder / key, known.get(key))
            if seen is not None and (seen.facts is None or seen.resolution == work.aim.resolution):
                work.seen[key] = seen
            else:
                todo.append(key)
        work.total, work.done = len(listing.pictures), len(work.seen)
        _look_at(dataset.folder, todo, work, file)
        captions = captions_edit.read_all(dataset, listing)
        subjects = [_subject(key, work.seen.get(key), captions[key]) for key in listing.pictures]
        work.findings = health.findings(
            [subject for subject in subjects if subject is not None], work.aim, others=_others(listing)
        )
        work.pictures, work.at = len(listing.pictures), time.time()


def aim_of(settings: Settings) -> Aim:
    """What a dataset is meant for, as its page says."""
    spec = spec_of(settings)
    return Aim(
        resolution=settings.resolution,
        divisibility=spec.bucket_divisibility,
        text_tokens=spec.default.text_tokens or spec.text_tokens,
        trigger=settings.trigger_word.strip() or None,
    )


def spec_of(settings: Settings) -> ArchSpec:
    """The architecture that a dataset's page shows things for."""
    return archs.spec(archs.name_of(settings.arch) if settings.arch else default_arch())


def default_arch() -> ModelArch:
    """The first that is distilled, which is what Detour is for."""
    return next(name for name in archs.built() if archs.spec(name).default.distilled)


# -------------------------------------------------------------------------------------------------------- looking


def _look_at(folder: Path, keys: Sequence[str], work: Work, file: Path) -> None:
    """Look at pictures in a few threads. They end by themselves with the server: nothing is lost that was kept."""
    waiting, lock = iter(keys), threading.Lock()
    saved = time.monotonic()

    def look() -> None:
        nonlocal saved
        while not work.dropped:
            with lock:
                key = next(waiting, None)
            if key is None:
                return
            seen = _look(folder / key, work.aim.resolution)
            with lock:
                work.done += 1
                if seen is not None:
                    work.seen[key] = seen
                if time.monotonic() - saved > SAVED_EVERY:
                    with contextlib.suppress(UserError):  # said at the end, if it is still so
                        _keep(file, work.seen)
                    saved = time.monotonic()

    threads = [threading.Thread(target=look, daemon=True) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if work.dropped:
        raise UserError("something else has been asked for since")
    if work.done < work.total:
        raise RuntimeError(f"{work.total - work.done} pictures were not looked at")
    _keep(file, work.seen)


def _look(path: Path, resolution: int) -> Seen | None:
    """None for what has gone."""
    try:
        found = path.stat()
    except OSError:
        return None
    try:
        facts, problem = images.check(path, _BUDGET, resolution), ""
    except BadPictureError as error:
        facts, problem = None, str(error)
    return Seen(found.st_size, found.st_mtime_ns, resolution, facts, problem)


def _current(path: Path, seen: Seen | None) -> Seen | None:
    """What is known, if the file is still as it was."""
    if seen is None:
        return None
    try:
        found = path.stat()
    except OSError:
        return None
    return seen if (found.st_size, found.st_mtime_ns) == (seen.size, seen.mtime_ns) else None


def _subject(key: str, seen: Seen | None, caption: captions_edit.Caption) -> Subject | None:
    if seen is None:
        return None
    text = None if caption.text is None else (caption.text.strip(),)
    return Subject(key=key, facts=seen.facts, problem=seen.problem, captions=text, caption_problem=caption.problem)


def _others(listing: Listing) -> dict[health.Kind, list[Item]]:
    return {
        "unread": [Item((key,)) for key in listing.unread],
        "lone_caption": [Item((key,)) for key in listing.lone],
        "shared_name": [Item(keys) for keys in listing.shared.values()],
    }


# --------------------------------------------------------------------------------------------------------- keeping


def _keep(file: Path, seen: Mapping[str, Seen]) -> None:
    plain = {key: _plain(one) for key, one in list(seen.items())}
    files.write_bytes(file, json.dumps({"version": VERSION, "pictures": plain}))


def _plain(seen: Seen) -> list[Any]:
    facts = None if seen.facts is None else asdict(seen.facts) | {"look": base64.b64encode(seen.facts.look).decode()}
    return [seen.size, seen.mtime_ns, seen.resolution, facts, seen.problem]


def _kept(file: Path) -> dict[str, Seen]:
    """What was kept. A cache: if it cannot be read, it is made again."""
    try:
        content = json.loads(file.read_bytes())
        if content["version"] != VERSION:
            return {}
        return {key: _seen(plain) for key, plain in content["pictures"].items()}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _seen(plain: list[Any]) -> Seen:
    size, mtime_ns, resolution, facts, problem = plain
    if facts is not None:
        facts = Facts(**facts | {"look": base64.b64decode(facts["look"]), "notes": tuple(facts["notes"])})
    return Seen(size, mtime_ns, resolution, facts, problem)


# --------------------------------------------------------------------------------------------------------- buckets


@dataclass(frozen=True, slots=True)
class Filled:
    """A bucket with what falls into it."""

    width: int
    height: int
    keys: tuple[str, ...]
    kept: float
    """Share of its pictures' area that is seen, on average."""


def filled(seen: Mapping[str, Seen], cut: Cut) -> list[Filled]:
    """The buckets that these pictures fall into, the fullest first. Sides below the divisibility fall into none."""
    found: dict[tuple[int, int], list[tuple[str, float]]] = {}
    for key, one in seen.items():
        if one.facts is None or (min(one.facts.width, one.facts.height) < cut.divisibility and not cut.upscale):
            continue
        bucket = buckets.plan(one.facts.width, one.facts.height, cut.resolution, cut.divisibility, cut.upscale)
        kept = bucket.width * bucket.height / (bucket.scaled_w * bucket.scaled_h)
        found.setdefault((bucket.width, bucket.height), []).append((key, kept))
    made = [
        Filled(width, height, tuple(key for key, _ in pairs), sum(kept for _, kept in pairs) / len(pairs))
        for (width, height), pairs in found.items()
    ]
    return sorted(made, key=lambda bucket: (-len(bucket.keys), bucket.width))
