"""The health report: what is wrong, or odd, in a dataset, why it matters and what to do. Pure functions, no torch.

Pictures are looked at by `images.check`; here is what follows from that, picture by picture and of all together.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from detour.data.captions import with_trigger
from detour.data.images import LOOK, Facts
from detour.data.scan import BLURRED

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from detour.config.job import DatasetConfig
    from detour.data.scan import Picture, Scan

ODD_ASPECT = 2.5  # long side by short side; models are trained on up to 2 : 1 for the most part
NEARLY_FULL = 0.8  # of the pixels of the resolution; above it a picture counts as large enough
GREY = 6  # most difference between the channels of a look, in grey levels, of a picture without colour: JPEG's noise
_SAYS_GREY = re.compile(r"black|white|gr[ae]y|monochrom|b&w|\bbw\b", re.IGNORECASE)
ALIKE_BITS = 10  # of 63, in which the hashes of pictures that look alike may differ
ALIKE = 0.93  # correlation of the looks of pictures that look alike
ALIKE_TINT = 48.0  # grey levels by which a channel's mean may differ between them

Kind = Literal[
    "unusable", "unread", "shared_name", "missing_caption", "unreadable_caption",
    "misnamed", "converted", "tiny", "small", "blurred", "duplicate", "alike", "aspect", "transparent", "grey",
    "empty_caption", "long_caption", "same_caption", "no_trigger", "lone_caption",
]  # fmt: skip
Severity = Literal["stop", "warning", "note"]
"""A run refuses to start, it will likely be worse for it, or it is worth a look."""


@dataclass(frozen=True, slots=True)
class Rule:
    """What is said of a kind of finding."""

    severity: Severity
    title: str
    why: str
    advice: str


_WORD = "write it into the captions where it reads well, or leave it to trigger_word, which puts it in front"
RULES: Mapping[Kind, Rule] = {
    "unusable": Rule(
        "stop", "pictures that cannot be used", "a run refuses to start with them", "put them right or remove them"
    ),
    "unread": Rule(
        "stop", "files in formats that are not read", "a run refuses to start, since they may be meant as pictures",
        "convert them to PNG, JPEG or WebP, or move them away",
    ),
    "shared_name": Rule(
        "stop", "pictures that share one caption file", "one of them would be trained with the other's caption",
        "rename one of them, with a caption of its own, or remove it",
    ),
    "missing_caption": Rule(
        "stop", "pictures without a caption", "a run refuses to start, unless default_caption is set",
        "write what each shows; whatever a caption does not name becomes part of what is learnt",
    ),
    "unreadable_caption": Rule(
        "stop", "captions that cannot be read", "a run refuses to start with them", "save them again as UTF-8 text"
    ),
    "misnamed": Rule(
        "note", "pictures named for another format than they have",
        "they are read as what they are; other programs may not do so", "rename them",
    ),
    "converted": Rule(
        "note", "pictures that are converted on reading",
        "CMYK loses its colour profile, 16 bits become 8, and a picture whose EXIF data is broken may lie on its side",
        "look at their preview, and save them as 8-bit RGB if it is wrong",
    ),
    "tiny": Rule(
        "warning", "tiny pictures: less than a quarter of the pixels of the resolution",
        "they are trained at their own size, or enlarged with upscale; either way they teach a lack of detail",
        "take larger versions, a lower resolution, or leave them out",
    ),
    "small": Rule(
        "note", f"pictures with less than {NEARLY_FULL:.0%} of the pixels of the resolution",
        "they are trained at their own size, or enlarged with upscale",
        "larger versions are better where there are any",
    ),
    "blurred": Rule(
        "warning", "pictures that seem blurred or enlarged",
        "their finest detail is far weaker than their coarser detail (a third of a sharp edge's share, whatever the "
        "contrast); softness is learnt like everything else",
        "look at them at full size; take sharp ones, or scale enlarged ones back down",
    ),
    "duplicate": Rule(
        "warning", "pictures that are there more than once", "each copy counts, so such a picture is learnt by heart "
        "before the others are learnt", "remove the copies; num_repeats weighs whole sets on purpose",
    ),
    "alike": Rule(
        "warning", "pictures that look alike", "resized, recompressed or slightly cut copies, or shots of one moment, "
        "count several times over", "keep the best of each group",
    ),
    "aspect": Rule(
        "warning", f"pictures with odd proportions: beyond {ODD_ASPECT:g} : 1",
        "models have seldom seen such shapes, and what is trained in them does little for ordinary ones",
        "cut out the part that matters",
    ),
    "transparent": Rule(
        "note", "pictures with transparent parts", "these become white, unless alpha_mask leaves them out of the loss",
        "put them on the background that you want, or set alpha_mask",
    ),
    "grey": Rule(
        "note", "pictures without colour among coloured ones, whose captions do not say so",
        "the model may learn that the subject has none", "say so (\"black and white photo\"), or remove them",
    ),
    "empty_caption": Rule(
        "warning", "empty captions",
        "these pictures are trained without words, as caption_dropout_rate does on purpose", "write what they show",
    ),
    "long_caption": Rule(
        "warning", "captions that are too long", "what comes after the model's last token is cut off unread "
        "(counted as words and signs; tokens are mostly more)", "shorten them, the subject first",
    ),
    "same_caption": Rule(
        "note", "captions that several different pictures share", "what differs between those pictures cannot be told "
        "apart by words", "name the differences",
    ),
    "no_trigger": Rule(
        "note", "captions without the trigger word", "the word may not call up all that is taught", _WORD
    ),
    "lone_caption": Rule(
        "note", "caption files without a picture",
        "they are not used; their picture may be missing or named otherwise",
        "add or rename the picture, or remove them",
    ),
}  # fmt: skip
SAID_BY_SCAN: frozenset[Kind] = frozenset(
    {
        "unusable", "unread", "shared_name", "missing_caption", "unreadable_caption",
        "misnamed", "converted", "tiny", "blurred", "duplicate", "empty_caption", "lone_caption",
    }
)  # fmt: skip
"""What `scan` says of a dataset already, as an error or as a finding of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A picture, as the report sees it."""

    key: str
    facts: Facts | None
    """None where it cannot be used."""
    captions: tuple[str, ...] | None
    """None where there is none."""
    problem: str = ""
    """Why it cannot be used: goes on from its name."""
    caption_problem: str = ""
    """Why its caption cannot be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Aim:
    """What the pictures are meant for."""

    resolution: int
    """Pixels."""
    divisibility: int = 1
    """Sides below it cannot be trained."""
    text_tokens: int | None = None
    """Most tokens of a caption that the model reads."""
    trigger: str | None = None


@dataclass(frozen=True, slots=True)
class Item:
    """One instance of a finding."""

    keys: tuple[str, ...]
    """The file, or the files of a group."""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found, with all its instances."""

    kind: Kind
    items: tuple[Item, ...]

    @property
    def rule(self) -> Rule:
        """What is to be said of it."""
        return RULES[self.kind]


def findings(
    subjects: Sequence[Subject],
    aim: Aim,
    *,
    others: Mapping[Kind, Sequence[Item]] | None = None,
    without: Collection[Kind] = (),
) -> list[Finding]:
    """The report, the worst first. `others` is what can only be seen in the folder: files that are no pictures."""
    found: dict[Kind, list[Item]] = defaultdict(list)
    for kind, items in (others or {}).items():
        found[kind] += items
    for subject in subjects:
        for kind, note in _of_one(subject, aim):
            found[kind].append(Item((subject.key,), note))
    for kind, group in _of_all(subjects, without):
        found[kind].append(group)
    order = sorted(RULES, key=lambda kind: ("stop", "warning", "note").index(RULES[kind].severity))
    return [Finding(kind, tuple(found[kind])) for kind in order if found[kind] and kind not in without]


def beyond_scan(
    found: Scan, datasets: Sequence[DatasetConfig], *, text_tokens: int, trigger: str | None
) -> Iterator[tuple[DatasetConfig, Finding]]:
    """What the report adds to the findings of a scan, dataset by dataset."""
    for index, config in enumerate(datasets):
        subjects = [
            Subject(key=picture.key, captions=picture.captions, facts=_facts(picture, found.looks[picture.path]))
            for picture in found.pictures
            if picture.dataset == index
        ]
        word = None if config.is_reg else config.trigger_word or trigger
        aim = Aim(resolution=min(config.resolution), text_tokens=text_tokens, trigger=word)
        known: set[Kind] = {*SAID_BY_SCAN, "no_trigger"}  # the word is put in front
        if config.alpha_mask:
            known.add("transparent")
        for finding in findings(subjects, aim, without=known):
            yield config, finding


def _facts(picture: Picture, look: bytes) -> Facts:
    return Facts(
        picture.sha256, picture.width, picture.height, kind="", alpha=picture.alpha, sharpness=math.inf, notes=(),
        look=look,
    )  # fmt: skip


def about_tokens(text: str) -> int:
    """Tokens that a text has at least, roughly: words, groups of signs, and single Chinese, Japanese, Korean ones."""
    return len(re.findall(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\w+|[^\w\s]+", text))


# ----------------------------------------------------------------------------------------------------- one by one


def _of_one(subject: Subject, aim: Aim) -> Iterator[tuple[Kind, str]]:
    if subject.facts is None:
        yield "unusable", subject.problem
    else:
        yield from _of_pixels(subject.facts, aim)
    if subject.caption_problem:
        yield "unreadable_caption", subject.caption_problem
    elif subject.captions is None:
        yield "missing_caption", ""
    elif not all(text.strip() for text in subject.captions):
        yield "empty_caption", ""
    else:
        yield from _of_words(subject.captions, aim)


def _of_pixels(facts: Facts, aim: Aim) -> Iterator[tuple[Kind, str]]:
    width, height = facts.width, facts.height
    size, area = f"{width} x {height}", width * height / aim.resolution**2
    if min(width, height) < aim.divisibility:
        yield "unusable", f"is too small ({size}): both sides must have {aim.divisibility} pixels"
    elif area < 0.25:
        yield "tiny", size
    elif area < NEARLY_FULL:
        yield "small", size
    if facts.sharpness < BLURRED:
        yield "blurred", f"sharpness {facts.sharpness:.2f}, sharp from {BLURRED:g}"
    if max(width, height) > ODD_ASPECT * min(width, height):
        yield "aspect", f"{size}, {max(width, height) / min(width, height):.1f} : 1"
    if facts.alpha:
        yield "transparent", ""
    if "ending" in facts.notes:
        yield "misnamed", f"is {facts.kind}"
    converted = {"cmyk": "CMYK", "deep": "16 bits a channel", "exif": "unreadable EXIF data"}
    if named := [converted[note] for note in facts.notes if note in converted]:
        yield "converted", ", ".join(named)


def _of_words(captions: Sequence[str], aim: Aim) -> Iterator[tuple[Kind, str]]:
    longest = max(about_tokens(with_trigger(text, aim.trigger)) for text in captions)
    if aim.text_tokens is not None and longest > aim.text_tokens:
        yield "long_caption", f"at least {longest} tokens, {aim.text_tokens} are read"
    if aim.trigger and any(with_trigger(text, aim.trigger) != text for text in captions):
        yield "no_trigger", ""


# --------------------------------------------------------------------------------------------------- all together


def _of_all(subjects: Sequence[Subject], without: Collection[Kind]) -> Iterator[tuple[Kind, Item]]:
    contents: dict[str, list[Subject]] = defaultdict(list)
    for subject in subjects:
        if subject.facts is not None:
            contents[subject.facts.sha256].append(subject)
    for same in contents.values():
        if len(same) > 1:
            yield "duplicate", Item(tuple(subject.key for subject in same))
    different = [(same[0], facts.look) for same in contents.values() if (facts := same[0].facts) and facts.look]
    looks = np.frombuffer(b"".join(look for _, look in different), np.uint8).reshape(-1, LOOK, LOOK, 3)
    if "alike" not in without:
        for group in look_alikes(looks):
            yield "alike", Item(tuple(different[place][0].key for place in group))
    for place in _grey_among_colour(looks):
        if not any(_SAYS_GREY.search(text) for text in different[place][0].captions or ()):
            yield "grey", Item((different[place][0].key,))
    yield from _same_words(contents.values())


def _grey_among_colour(looks: NDArray[np.uint8]) -> list[int]:
    """Pictures without colour, where they are the fewer."""
    channels = looks.reshape(-1, LOOK * LOOK, 3).astype(np.int16)
    grey = (channels.max(axis=2) - channels.min(axis=2)).max(axis=1, initial=0) <= GREY
    return np.flatnonzero(grey).tolist() if grey.sum() * 2 < len(grey) else []


def _same_words(contents: Iterable[Sequence[Subject]]) -> Iterator[tuple[Kind, Item]]:
    """Captions of different pictures. Copies of a picture may well share theirs."""
    texts: dict[str, list[str]] = defaultdict(list)
    for same in contents:
        said = {text.strip() for subject in same for text in subject.captions or ()}
        for text in said - {""}:
            texts[text].append(same[0].key)
    for text, keys in texts.items():
        if len(keys) > 1:
            yield "same_caption", Item(tuple(keys), text if len(text) <= 80 else text[:77] + "...")


_DCT = np.array([[np.cos(np.pi * (2 * x + 1) * u / (2 * LOOK)) for x in range(LOOK)] for u in range(8)], np.float32)
_BRIGHTNESS = np.array([0.299, 0.587, 0.114], np.float32)


def hashes(looks_N: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """A perceptual hash of each look (shape N x LOOK x LOOK x 3): which of its 63 lowest cosine frequencies, in
    brightness, are above their median. Scaling, compression and contrast change few of the bits."""
    grey = looks_N.astype(np.float32) @ _BRIGHTNESS
    frequencies = np.einsum("ux,nxy,vy->nuv", _DCT, grey, _DCT, optimize=True).reshape(-1, 64)
    frequencies = np.round(frequencies)  # of 256 cells: less than 1 is no structure
    bits = frequencies > np.median(frequencies[:, 1:], axis=1, keepdims=True)
    bits[:, 0] = False  # the mean
    found: NDArray[np.uint64] = np.packbits(bits, axis=1).view(np.uint64)[:, 0]
    return found


def look_alikes(looks_N: NDArray[np.uint8]) -> list[list[int]]:
    """Groups of pictures that look alike, by their looks (shape N x LOOK x LOOK x 3).

    Two look alike whose hashes differ in at most `ALIKE_BITS`, and whose looks correlate by `ALIKE` and have much the
    same colour. Hashes alone would take drawings that differ in colour only for the same. Measured: copies of
    photographs at half their size, as JPEG of quality 30, 15 % brighter, or cut by 1 % at each side gave 0.95 and
    more (a field of stars 0.86), different photographs at most 0.84, and that two views of one thing.
    """
    count = len(looks_N)
    if count < 2:
        return []
    hashed = hashes(looks_N)
    flat = looks_N.reshape(count, -1, 3).astype(np.float32)
    tint = flat.mean(axis=1)
    centred = (flat - tint[:, None]).reshape(count, -1)
    spread = np.sqrt((centred**2).mean(axis=1))
    centred /= np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-6)
    groups = _Groups(count)
    for start in range(0, count, 256):  # 256 x 10 000 hashes are 20 MB
        distance = np.bitwise_count(hashed[start : start + 256, None] ^ hashed[None, start:])
        near = np.argwhere(np.triu(distance <= ALIKE_BITS, 1)) + start
        for place in range(0, len(near), 4096):  # 4096 pairs of looks are 25 MB
            pairs = near[place : place + 4096]
            pairs = pairs[groups.labels[pairs[:, 0]] != groups.labels[pairs[:, 1]]]
            a, b = pairs[:, 0], pairs[:, 1]
            alike = np.einsum("nk,nk->n", centred[a], centred[b]) >= ALIKE
            alike |= (spread[a] < 2) & (spread[b] < 2)  # nothing to be seen but a colour
            alike &= np.abs(tint[a] - tint[b]).max(axis=1, initial=0) <= np.where(spread[a] < 2, 6, ALIKE_TINT)
            groups.join(pairs[alike])
    return groups.found()


class _Groups:
    """Numbers that belong together (union-find)."""

    def __init__(self, count: int) -> None:
        self._parents = list(range(count))
        self.labels = np.arange(count)
        """Equal for those that belong together."""

    def _root(self, number: int) -> int:
        while self._parents[number] != number:
            self._parents[number] = self._parents[self._parents[number]]
            number = self._parents[number]
        return number

    def join(self, pairs_N2: NDArray[np.int64]) -> None:
        """Both of each pair belong together."""
        for a, b in pairs_N2.tolist():
            first, second = sorted((self._root(a), self._root(b)))
            self._parents[second] = first
        if len(pairs_N2):
            self.labels = np.array([self._root(number) for number in range(len(self._parents))])

    def found(self) -> list[list[int]]:
        """The groups of more than one."""
        members: dict[int, list[int]] = defaultdict(list)
        for number, label in enumerate(self.labels.tolist()):
            members[label].append(number)
        return [group for group in members.values() if len(group) > 1]
