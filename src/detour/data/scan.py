"""Reads the datasets: finds pictures, captions and masks, checks every one in full, and reports all problems at once.

A problem makes a picture unusable; the dataset's `bad_images` says whether that refuses the job or leaves the picture
out. A finding is something the user should know about a picture that is used. No torch, so that `detour check` is
instant; pixels are looked at once and never kept.
"""

from __future__ import annotations

import difflib
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from detour import RefusedError, UserError
from detour.config.job import DatasetConfig
from detour.data import caption_files, clips, companions, images
from detour.data.captions import PLACEHOLDER
from detour.data.companions import parallel, stem_of

LISTED = 20  # problems named in an error; the rest is counted
BLURRED = 0.35  # see `images._sharpness`
Progress = Callable[[int, int], None]
"""Called with the pictures checked so far, and all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A picture that can be used."""

    path: Path
    key: str
    """Name relative to its dataset's folder, with forward slashes."""
    dataset: int
    """Place of its dataset in the list."""
    sha256: str
    """Of the file's bytes."""
    width: int
    """Upright, in pixels."""
    height: int
    captions: tuple[str, ...]
    """As written, at least one; empty text is possible."""
    mask: Path | None = None
    mask_sha256: str | None = None
    control: Path | None = None
    control_sha256: str | None = None
    alpha: bool = False
    """Something in it is transparent."""
    frames: int = 1
    """Of a clip: see `images.Facts`. A clip is called a picture here; its key may be that of a folder of frames."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A picture that cannot be used."""

    path: Path
    reason: str
    """Goes on from the file's name: what is wrong and what to do."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something worth knowing about pictures that are used."""

    message: str
    details: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Scan:
    """What the datasets hold."""

    pictures: list[Picture]
    """By dataset, then by key."""
    skipped: list[Problem]
    """Left out, as `bad_images: skip` asks."""
    findings: list[Finding]
    looks: dict[Path, bytes] = field(default_factory=dict)
    """Of each picture; see `images.Facts`. Not held by the pictures, which stay in memory for the whole run."""


@dataclass(slots=True)
class _Draft:
    """A dataset while it is being read. Files go by their keys."""

    index: int
    config: DatasetConfig
    folder: Path
    keys: list[str] = field(default_factory=list)
    """The pictures, or the clips."""
    folders: frozenset[str] = frozenset()
    """Those of `keys` that are folders of frames."""
    texts: dict[str, str] = field(default_factory=dict)
    """The caption files, by their keys without the ending."""
    captions: dict[str, tuple[str, ...]] = field(default_factory=dict)
    masks: dict[str, companions.File] = field(default_factory=dict)
    controls: dict[str, companions.File] = field(default_factory=dict)
    facts: dict[str, images.Facts] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    """What is wrong with the dataset as a whole."""
    problems: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    findings: list[Finding] = field(default_factory=list)

    def reject(self, key: str, reason: str) -> None:
        self.problems[key].append(reason)

    def stem(self, key: str) -> str:
        """What the key shares with its caption and its mask."""
        return key if key in self.folders else stem_of(key)

    def note(self, message: str, names: Sequence[str]) -> None:
        """A finding about files, if there are any."""
        if names:
            self.findings.append(Finding(f"{self.folder}: {message}: {len(names)}", tuple(names)))

    @property
    def usable(self) -> list[str]:
        return [key for key in self.keys if key not in self.problems]


def scan(
    datasets: Sequence[DatasetConfig],
    *,
    trigger: str | None,
    divisibility: int,
    progress: Progress | None = None,
) -> Scan:
    """Read the datasets and check every picture in full.

    Raises one UserError with everything that is wrong; it is a RefusedError where the job file is right and only
    pictures are not.
    """
    drafts: list[_Draft] = []
    errors: list[str] = []
    for index, config in enumerate(datasets):
        try:
            drafts.append(_read_folder(index, config))
        except UserError as error:
            errors.append(f"datasets[{index}]: {error}")
    total, done = sum(len(draft.keys) for draft in drafts), 0
    for draft in drafts:
        companions.attach_masks(draft)
        companions.attach_controls(draft)
        for count in _check_pictures(draft, divisibility):
            if progress is not None:
                progress(done + count, total)
        done += len(draft.keys)
        _find_health(draft)
        _check_whole(draft, trigger)
        errors += [f"datasets[{draft.index}]: {text}" for text in draft.errors]
    fatal = [problem for draft in drafts if draft.config.bad_images == "error" for problem in _problems(draft)]
    if errors or fatal:
        raise _error(errors, fatal)
    skipped = [problem for draft in drafts for problem in _problems(draft)]
    pictures = [_picture(draft, key) for draft in drafts for key in draft.usable]
    looks = {draft.folder / key: draft.facts[key].look for draft in drafts for key in draft.usable}
    return Scan(pictures, skipped, [finding for draft in drafts for finding in draft.findings], looks)


def _problems(draft: _Draft) -> list[Problem]:
    return [
        Problem(draft.folder / key, reason) for key, reasons in sorted(draft.problems.items()) for reason in reasons
    ]


def _error(errors: list[str], fatal: list[Problem]) -> UserError:
    lines = errors + [f"{problem.path} {problem.reason}" for problem in fatal]
    count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
    listed = "".join(f"\n  {line}" for line in lines[:LISTED])
    more = f"\n  and {len(lines) - LISTED} more" if len(lines) > LISTED else ""
    advice = "\nPut them right, or leave such pictures out with `bad_images: skip` in the dataset." if fatal else ""
    kind = UserError if errors else RefusedError
    return kind(f"The datasets cannot be used as they are: {count}{listed}{more}{advice}")


def _picture(draft: _Draft, key: str) -> Picture:
    facts, mask, control = draft.facts[key], draft.masks.get(key), draft.controls.get(key)
    return Picture(
        path=draft.folder / key,
        key=key,
        dataset=draft.index,
        sha256=facts.sha256,
        width=facts.width,
        height=facts.height,
        captions=draft.captions[key],
        mask=mask[0] if mask else None,
        mask_sha256=mask[1] if mask else None,
        control=control[0] if control else None,
        control_sha256=control[1] if control else None,
        alpha=facts.alpha,
        frames=facts.frames,
    )


# ---------------------------------------------------------------------------------------------- files and captions


def _read_folder(index: int, config: DatasetConfig) -> _Draft:
    """The files of a dataset and their captions. UserError where there is nothing to go on with."""
    draft = _Draft(index, config, config.folder_path.expanduser())
    _require_folder(draft.folder, "folder_path")
    if config.mask_path is not None:
        _require_folder(config.mask_path.expanduser(), "mask_path")
        if config.alpha_mask:
            raise UserError("mask_path and alpha_mask exclude each other; keep one")
    if config.control_path is not None:
        _require_folder(config.control_path.expanduser(), "control_path")
    _sort_files(draft)
    if config.captions_file is not None:
        _captions_from_table(draft, draft.folder / config.captions_file.expanduser())
    else:
        _captions_from_files(draft)
    if config.captions_file is None or config.mask_path is not None or config.control_path is not None:
        _reject_shared_stems(draft)
    return draft


def _require_folder(folder: Path, option: str) -> None:
    if folder.is_dir():
        return
    if folder.exists():
        raise UserError(f"{option}: {folder} is a file; give the folder that holds the pictures")
    there = next(parent for parent in folder.absolute().parents if parent.is_dir())
    absent = folder.absolute().relative_to(there).parts[0]
    names = sorted(entry.name for entry in there.iterdir() if entry.is_dir())
    near = difflib.get_close_matches(absent, names, n=1)
    hint = f"did you mean {there / near[0]}?" if near else f"{there} exists but has no {absent!r}"
    raise UserError(f"{option}: {folder} does not exist; {hint}")


def _sort_files(draft: _Draft) -> None:
    """Which files are pictures (or clips) and which are captions; others are none of our business."""
    ending = "." + draft.config.caption_ext.lower().lstrip(".")
    there = _walk(draft)
    draft.texts = {key[: -len(ending)]: key for key in there if key.lower().endswith(ending)}
    if draft.config.num_frames > 1:
        kind, formats = "clips", clips.DESCRIPTION
        found = clips.sort(draft.folder, there)
        draft.keys, draft.folders, unread = found.clips, found.folders, found.misplaced
        if (problem := clips.decoder_problem(draft.keys)) is not None:
            raise UserError(f"folder_path: {draft.folder}: {problem}")
    else:
        kind, formats = "pictures", ", ".join(images.ENDINGS)
        draft.keys = [key for key in there if PurePosixPath(key).suffix.lower() in images.ENDINGS]
        unread = {key: reason for key in there if (reason := _why_unread(PurePosixPath(key).suffix.lower()))}
    for key, reason in unread.items():
        draft.reject(key, reason)
    if not draft.keys:
        deeper = "" if draft.config.recursive else " (recursive: false, subfolders were not read)"
        first = min(unread, default="")
        passed = f"; {len(unread)} files cannot be used: {first} {unread[first]}" if unread else ""
        raise UserError(f"folder_path: no {kind} ({formats}) in {draft.folder}{deeper}{passed}")


def _why_unread(suffix: str) -> str | None:
    """Why a file among pictures cannot be used that somebody might have meant to; None for others."""
    if suffix in clips.VIDEO_ENDINGS | clips.UNREAD_ENDINGS:
        return "is a video among pictures; models of video take clips (set num_frames), others know pictures only"
    if suffix in images.UNREAD_ENDINGS:
        return "is in a format that is not read; convert it to PNG, JPEG or WebP, or move it away"
    return None


def _walk(draft: _Draft) -> list[str]:
    """Keys of all files, sorted. Hidden files and folders are not the user's pictures, and masks are not pictures."""
    folder, beside = draft.folder, (draft.config.mask_path, draft.config.control_path)
    not_pictures = {path.expanduser().resolve() for path in beside if path is not None}
    keys: list[str] = []

    def unreadable(error: OSError) -> None:
        name = Path(str(error.filename)).relative_to(folder).as_posix()
        draft.reject(name, f"is a folder that cannot be read: {(error.strerror or 'unknown reason').lower()}")

    for place, folders, files in os.walk(folder, onerror=unreadable, followlinks=True):
        here = Path(place)
        real = here.resolve()
        if real in not_pictures or any(real == parent.resolve() for parent in here.parents):
            folders.clear()  # a link that leads back up would never end
            continue
        folders[:] = sorted(name for name in folders if not name.startswith(".")) if draft.config.recursive else []
        prefix = "" if here == folder else here.relative_to(folder).as_posix() + "/"
        keys += [prefix + name for name in files if not name.startswith(".")]
    return sorted(key for key in keys if _is_well_named(draft, key))


def _is_well_named(draft: _Draft, key: str) -> bool:
    """Names that are not UTF-8 can be neither printed nor hashed."""
    plain = key.encode(errors="backslashreplace").decode()
    if plain != key:
        draft.reject(plain, "has a name that is not UTF-8; rename it")
    return plain == key


def _captions_from_files(draft: _Draft) -> None:
    used: set[str] = set()
    empty: list[str] = []
    for key in draft.keys:
        stem = draft.stem(key)
        name = draft.texts.get(stem)
        used.add(stem)
        if name is None:
            absent = f"{PurePosixPath(stem).name}.{draft.config.caption_ext.lstrip('.')}"
            _caption_or_default(draft, key, f"has no caption: {absent} is missing")
            continue
        try:
            text = caption_files.read_caption(draft.folder / name)
        except UserError as error:
            draft.reject(key, f"has no usable caption: {error}")
            continue
        if not text:
            empty.append(name)
        draft.captions[key] = (text or draft.config.default_caption or "",)
    filled = "the default caption is used" if draft.config.default_caption else "trained without a caption"
    draft.note(f"empty caption files ({filled})", empty)
    draft.note(
        "caption files without a picture", sorted(name for stem, name in draft.texts.items() if stem not in used)
    )


def _captions_from_table(draft: _Draft, path: Path) -> None:
    try:
        table = caption_files.read_table(path, draft.folder, draft.keys)
    except UserError as error:
        draft.errors.append(f"captions_file: {error}")
        draft.captions = dict.fromkeys(draft.keys, ("",))
        return
    draft.captions |= table.captions
    for name, line in table.missing.items():
        draft.reject(name, f"does not exist, but line {line} of {path.name} names it; correct or remove that line")
    for key in draft.keys:
        if key not in table.captions:
            _caption_or_default(draft, key, f"has no caption: {path.name} has no row for {key!r}")
    empty = [key for key, texts in table.captions.items() if not all(texts)]
    draft.note("pictures with an empty caption (trained without one)", empty)


def _caption_or_default(draft: _Draft, key: str, reason: str) -> None:
    if draft.config.default_caption is None:
        draft.reject(key, f"{reason}; write one, or set default_caption")
    else:
        draft.captions[key] = (draft.config.default_caption,)


def _reject_shared_stems(draft: _Draft) -> None:
    """`a.jpg` and `a.png` would both take `a.txt`, and one of them is likely a mistake."""
    stems: dict[str, list[str]] = defaultdict(list)
    for key in draft.keys:
        stems[draft.stem(key)].append(key)
    for keys in stems.values():
        for key in keys if len(keys) > 1 else []:
            others = " and ".join(PurePosixPath(other).name for other in keys if other != key)
            draft.reject(key, f"shares its caption or mask with {others}; rename or remove one of them")


def _check_whole(draft: _Draft, trigger: str | None) -> None:
    """Something must be left, and a placeholder that nothing replaces would be trained as a word."""
    if not draft.usable and draft.config.bad_images == "skip":
        draft.errors.append(f"no picture is left in {draft.folder}: all {len(draft.keys)} have problems")
    word = draft.config.trigger_word if draft.config.trigger_word is not None else trigger
    named = [key for key in draft.usable if any(PLACEHOLDER in text for text in draft.captions[key])]
    if named and (not word or draft.config.is_reg):
        why = "a regularisation set gets no trigger word" if draft.config.is_reg else "there is no trigger_word"
        first = draft.folder / named[0]
        draft.errors.append(f"captions contain {PLACEHOLDER}, but {why}: {len(named)} pictures, the first is {first}")


# ------------------------------------------------------------------------------------------------------- pictures


def _check_pictures(draft: _Draft, divisibility: int) -> Iterator[int]:
    """Check the pictures; yields the number done, now and then."""
    budget, config = images.Budget(), draft.config

    def work(path: Path) -> images.Facts:
        if config.num_frames > 1:
            return clips.check(path, config.num_frames, config.fps, whole=config.clip_part == "random")
        return images.check(path, budget, max(config.resolution))

    paths = {key: draft.folder / key for key in draft.keys}
    for count, (key, facts) in enumerate(parallel(work, paths), 1):
        if isinstance(facts, images.BadPictureError):
            draft.reject(key, str(facts))
        else:
            draft.facts[key] = facts
            _check_sizes(draft, key, divisibility)
        if count % 100 == 0 or count == len(draft.keys):
            yield count


def _check_sizes(draft: _Draft, key: str, divisibility: int) -> None:
    facts, mask = draft.facts[key], draft.masks.get(key)
    size = f"{facts.width} x {facts.height}"
    if min(facts.width, facts.height) < divisibility and not draft.config.upscale:
        advice = "use a larger one, or set upscale: true"
        draft.reject(key, f"is too small ({size}): both sides must have {divisibility} pixels; {advice}")
    for what, beside in (("mask", mask), ("control picture", draft.controls.get(key))):
        if beside is not None and (problem := companions.mismatch(facts, beside, what)) is not None:
            draft.reject(key, problem)


def _find_health(draft: _Draft) -> None:
    """What the user should know about the pictures that are used."""
    facts = {key: draft.facts[key] for key in draft.usable}
    misnamed = [f"{key} ({fact.kind})" for key, fact in facts.items() if "ending" in fact.notes]
    draft.note("pictures named for another format than they have (used as what they are)", misnamed)
    texts: dict[images.Note, str] = {
        "cmyk": "pictures in CMYK, for print (converted to RGB without a colour profile; look whether they are right)",
        "deep": "pictures with 16 bits a channel (scaled to 8)",
        "exif": "pictures with unreadable EXIF data (taken as upright)",
    }
    for note, message in texts.items():
        draft.note(message, [key for key, fact in facts.items() if note in fact.notes])
    same: dict[str, list[str]] = defaultdict(list)
    for key, fact in facts.items():
        same[fact.sha256].append(key)
    draft.note("pictures that are there more than once", [" = ".join(keys) for keys in same.values() if len(keys) > 1])
    smallest, largest = min(draft.config.resolution), max(draft.config.resolution)
    tiny = [key for key, fact in facts.items() if fact.width * fact.height * 4 < smallest**2]
    sizes = [f"{key} ({facts[key].width} x {facts[key].height})" for key in tiny]
    draft.note(f"pictures with less than a quarter of the pixels of resolution {smallest}", sizes)
    soft = [key for key, fact in facts.items() if fact.sharpness < BLURRED]
    draft.note(f"pictures that seem blurred or enlarged (at resolution {largest} no more to see than at half)", soft)
    if draft.config.alpha_mask:
        opaque = [key for key, fact in facts.items() if not fact.alpha]
        draft.note("pictures without transparency to take a mask from (they count in full)", opaque)
