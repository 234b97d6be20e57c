"""The order of the data: which pictures, in which batches, with which captions. No torch.

Everything is a pure function of (seed, epoch) and of the data itself. No generator state exists, so position (epoch,
batch) is all that resuming needs, and neither workers nor the number of devices can change what is trained.

Each item has a number made from its name; a draw mixes that number with one made from (seed, epoch, purpose). So a
picture's draws do not depend on which other pictures there are, and shuffling is sorting by such a draw.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count, product

import numpy as np
from numpy.typing import NDArray

from detour import UserError
from detour.config.job import DatasetConfig
from detour.data import buckets, captions
from detour.data.buckets import Bucket
from detour.data.images import ClipPart, Transform
from detour.data.scan import Picture
from detour.seeds import seed_for

_PLACES = {"folder_path", "mask_path", "control_path", "captions_file", "bad_images"}
"""Options of a dataset that do not decide what is trained, or do so by the contents that they lead to."""
Position = tuple[int, int]
"""Epoch and place of a batch in it, both from 0."""
_Numbers = NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Item:
    """A picture at one size, mirrored or not. Drawn `num_repeats` times in each epoch."""

    picture: Picture
    bucket: Bucket
    flip_x: bool
    flip_y: bool
    number: int
    """Made from what it is: dataset, name, resolution, flips."""


@dataclass(frozen=True, slots=True)
class Draw:
    """An item as one batch sees it."""

    item: Item
    crop: int
    """Crop variant."""
    prompt: str


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """A micro-batch: pictures of one size with captions of one length, of the subject or for regularisation."""

    draws: tuple[Draw, ...]
    is_reg: bool
    epoch: int
    after: Position
    """Of the next batch."""


def make_items(pictures: Iterable[Picture], datasets: Sequence[DatasetConfig], divisibility: int) -> list[Item]:
    """Every picture at every resolution and mirrored as asked.

    A picture smaller than several resolutions is there once for each of them at its own size, so that every picture
    counts alike; its latents are shared.
    """
    items = []
    for picture in pictures:
        config = datasets[picture.dataset]
        flips = list(product((False, True)[: 1 + config.flip_x], (False, True)[: 1 + config.flip_y]))
        for resolution, (flip_x, flip_y) in product(config.resolution, flips):
            bucket = buckets.plan(picture.width, picture.height, resolution, divisibility, config.upscale)
            number = seed_for("item", picture.dataset, picture.key, resolution, flip_x, flip_y)
            items.append(Item(picture, bucket, flip_x, flip_y, number))
    return items


def transform_of(item: Item, config: DatasetConfig, crop: int) -> Transform:
    """What is done to the item's pixels for one crop variant."""
    bucket = item.bucket
    left, top = buckets.crop(bucket, config.crop, item.picture.sha256, crop)
    return Transform(
        scaled_w=bucket.scaled_w,
        scaled_h=bucket.scaled_h,
        left=left,
        top=top,
        width=bucket.width,
        height=bucket.height,
        flip_x=item.flip_x,
        flip_y=item.flip_y,
        flatten=item.picture.alpha and not config.alpha_mask,
        clip=_clip_part(item.picture, config, crop),
    )


def _clip_part(picture: Picture, config: DatasetConfig, crop: int) -> ClipPart | None:
    if config.num_frames == 1:
        return None
    first = buckets.first_frame(picture.frames, config.num_frames, config.clip_part, picture.sha256, crop)
    return ClipPart(first, config.num_frames, config.fps)


def trigger_of(config: DatasetConfig, default: str | None) -> str | None:
    """The trigger word of a dataset's captions."""
    if config.is_reg:
        return None
    return config.trigger_word if config.trigger_word is not None else default


def crop_variants(config: DatasetConfig) -> int:
    """Number of different crops of each item."""
    return config.crop_variants if "random" in (config.crop, config.clip_part) else 1


@dataclass(frozen=True)
class Order:
    """The order of a set of items, epoch by epoch.

    Batches of regularisation sets take every second place: main, reg, main, reg, ... The main sets give an epoch its
    length. A smaller regularisation set goes round again (in a new order, with new captions); a larger one gives each
    epoch a different part of itself.
    """

    items: Sequence[Item]
    datasets: Sequence[DatasetConfig]
    trigger: str | None
    """Of datasets that name none."""
    seed: int
    batch_size: int
    text_multiple: int = 1
    """Captions whose lengths round up to the same multiple may share a batch."""
    lengths: Mapping[str, int] | None = None
    """Tokens of every prompt. None: all alike, which gives the fewest batches that an epoch can have."""

    def __post_init__(self) -> None:
        if not any(not self.datasets[item.picture.dataset].is_reg for item in self.items):
            raise UserError("no pictures are left to train on; at least one must be in a dataset without is_reg")

    def epoch(self, epoch: int) -> list[BatchPlan]:
        """The batches of an epoch. Every item of the main sets is drawn exactly `num_repeats` times."""
        main = self._shuffled(epoch, self._main, 0)
        if not self._reg.rows:
            return _placed([(draws, False) for draws in main], epoch)
        reg: list[tuple[Draw, ...]] = []
        for turn in count():
            if len(reg) >= len(main):
                break
            reg += self._shuffled(epoch, self._reg, turn)
        pairs = zip(main, reg[: len(main)], strict=True)
        return _placed([batch for first, second in pairs for batch in ((first, False), (second, True))], epoch)

    def count(self, epoch: int) -> int:
        """Number of batches in an epoch."""
        groups = self._groups(self._main, self._prompts(epoch, self._main, 0))
        sizes = np.bincount(groups)
        batches = int(np.sum(-(-sizes // self.batch_size)))
        return 2 * batches if self._reg.rows else batches

    def prompts(self, epochs: Iterable[int]) -> list[str]:
        """Every prompt that these epochs can ask for, sorted. Only shuffled captions depend on the epochs."""
        found = set(self._table)
        if not any(config.shuffle_tokens for config in self.datasets):
            return sorted(found)
        # A regularisation set goes round more often where the main captions' lengths, not known yet, make more batches.
        turns = -(-len(self._main.rows) // -(-len(self._reg.rows) // self.batch_size)) if self._reg.rows else 0
        for epoch in epochs:
            found.update(self._prompts(epoch, self._main, 0))
            for turn in range(turns):
                found.update(self._prompts(epoch, self._reg, turn))
        return sorted(found)

    def most_epochs(self, batches: int) -> int:
        """No run of so many batches touches more epochs than this, whatever the captions' lengths."""
        least = replace(self, lengths=None).count(0)
        return -(-batches // least) + 1  # loaders read ahead, into the next epoch

    @property
    def fingerprint(self) -> str:
        """Sha256 over all that decides what is trained: contents, captions, transforms, settings. Not where it lies."""
        digest = hashlib.sha256()
        for config in self.datasets:
            chosen = config.model_dump(mode="json", exclude=_PLACES)
            digest.update(json.dumps([chosen, trigger_of(config, self.trigger)], sort_keys=True).encode() + b"\n")
        for item in self.items:
            picture, bucket = item.picture, item.bucket
            what = [picture.dataset, picture.key, picture.sha256, picture.mask_sha256, picture.captions]
            what += [picture.control_sha256] if picture.control_sha256 is not None else []
            size = [bucket.width, bucket.height, bucket.scaled_w, bucket.scaled_h, item.flip_x, item.flip_y]
            digest.update(json.dumps([what, size]).encode() + b"\n")
        return digest.hexdigest()

    def variants(self, item: Item) -> tuple[str, ...]:
        """The item's captions with trigger word, as long as nothing is shuffled or dropped."""
        return captions.variants(item.picture.captions, trigger_of(self.datasets[item.picture.dataset], self.trigger))

    # ------------------------------------------------------------------------------------------------ tables

    @cached_property
    def _table(self) -> set[str]:
        """Every prompt but the shuffled captions."""
        found: set[str] = set()
        for item in self.items:
            config = self.datasets[item.picture.dataset]
            if not config.shuffle_tokens:
                found.update(self.variants(item))
            if config.caption_dropout_rate:
                found.add("")
        return found

    @cached_property
    def _main(self) -> _Deck:
        return _Deck(self, is_reg=False)

    @cached_property
    def _reg(self) -> _Deck:
        return _Deck(self, is_reg=True)

    # ----------------------------------------------------------------------------------------------- an epoch

    def _salt(self, purpose: str, epoch: int, turn: int) -> int:
        return seed_for(self.seed, purpose, epoch, turn)

    def _prompts(self, epoch: int, deck: _Deck, turn: int) -> list[str]:
        """The prompt of every draw."""
        choice = _mixed(deck.numbers, self._salt("caption", epoch, turn)) % deck.choices
        prompts = [options[k] for options, k in zip(deck.options, choice.tolist(), strict=True)]
        if deck.shuffles:
            numbers = _mixed(deck.numbers, self._salt("shuffle", epoch, turn)).tolist()
            for place in deck.shuffles:
                prompts[place] = self._shuffled_caption(deck, place, prompts[place], numbers[place])
        dropped = _fraction(_mixed(deck.numbers, self._salt("dropout", epoch, turn))) < deck.dropout
        for place in np.flatnonzero(dropped).tolist():
            prompts[place] = ""
        return prompts

    def _shuffled_caption(self, deck: _Deck, place: int, caption: str, number: int) -> str:
        config = self.datasets[self.items[deck.rows[place]].picture.dataset]
        shuffled = captions.shuffled(caption, config.keep_tokens, number)
        return captions.with_trigger(shuffled, trigger_of(config, self.trigger))

    def _groups(self, deck: _Deck, prompts: Sequence[str]) -> NDArray[np.int64]:
        """Number of the group (size and rounded caption length) of every draw."""
        if self.lengths is None:
            return deck.sizes
        known = {prompt: -(-self.lengths[prompt] // self.text_multiple) for prompt in set(prompts)}
        rounded = np.fromiter((known[prompt] for prompt in prompts), np.int64, len(prompts))
        both = deck.sizes * (int(rounded.max(initial=0)) + 1) + rounded
        groups: NDArray[np.int64] = np.unique(both, return_inverse=True)[1]
        return groups

    def _shuffled(self, epoch: int, deck: _Deck, turn: int) -> list[tuple[Draw, ...]]:
        """The deck in batches, shuffled within the groups and between them. The last batch of a group may be short."""
        prompts = self._prompts(epoch, deck, turn)
        groups = self._groups(deck, prompts)
        places = np.lexsort((_mixed(deck.numbers, self._salt("order", epoch, turn)), groups))
        starts = _batch_starts(groups[places], self.batch_size)
        ends = np.append(starts[1:], len(places))
        sequence = np.argsort(_mixed(deck.numbers[places[starts]], self._salt("batch", epoch, turn)), kind="stable")
        crops = ((epoch * deck.repeats_each + deck.repeats) % deck.crops).tolist()
        draws = [Draw(self.items[deck.rows[place]], crops[place], prompts[place]) for place in places.tolist()]
        spans = zip(starts[sequence].tolist(), ends[sequence].tolist(), strict=True)
        return [tuple(draws[start:end]) for start, end in spans]


class _Deck:
    """The draws of the main sets, or of the regularisation sets, as arrays with one place for each."""

    def __init__(self, order: Order, is_reg: bool) -> None:
        rows: list[int] = []
        repeats: list[int] = []
        for row, item in enumerate(order.items):
            config = order.datasets[item.picture.dataset]
            if config.is_reg == is_reg:
                rows += [row] * config.num_repeats
                repeats += range(config.num_repeats)
        items = [order.items[row] for row in rows]
        configs = [order.datasets[item.picture.dataset] for item in items]
        self.rows = rows
        self.repeats = np.array(repeats, np.int64)
        self.numbers = _mixed(np.array([item.number for item in items], np.uint64) + self.repeats.astype(np.uint64), 0)
        # Captions that are shuffled get their trigger word afterwards, in front.
        triggers = [None if config.shuffle_tokens else trigger_of(config, order.trigger) for config in configs]
        pairs = zip(items, triggers, strict=True)
        self.options = [captions.variants(item.picture.captions, trigger) for item, trigger in pairs]
        self.choices = np.array([len(options) for options in self.options], np.uint64)
        self.shuffles = [place for place, config in enumerate(configs) if config.shuffle_tokens]
        self.dropout = np.array([config.caption_dropout_rate for config in configs], np.float64)
        self.repeats_each = np.array([config.num_repeats for config in configs], np.int64)
        self.crops = np.array([crop_variants(config) for config in configs], np.int64)
        cut = [item.bucket for item in items]
        sides = [[b.width, b.height, config.num_frames] for b, config in zip(cut, configs, strict=True)]
        sizes = np.array(sides, np.int64).reshape(-1, 3)
        self.sizes: NDArray[np.int64] = np.unique(sizes, axis=0, return_inverse=True)[1].reshape(-1)
        """Number of the bucket's size, frames included."""


def _mixed(values: _Numbers, salt: int) -> _Numbers:
    """Numbers that look random, from numbers and a salt: the finaliser of splitmix64 (Steele et al. 2014)."""
    x = values + np.array([salt], np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.array([0xBF58476D1CE4E5B9], np.uint64)
    x = (x ^ (x >> np.uint64(27))) * np.array([0x94D049BB133111EB], np.uint64)
    return x ^ (x >> np.uint64(31))


def _fraction(values: _Numbers) -> NDArray[np.float64]:
    """In [0, 1), from the upper 53 bits."""
    return (values >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _batch_starts(groups: NDArray[np.int64], batch_size: int) -> NDArray[np.int64]:
    """Where batches begin in draws sorted by group."""
    places = np.arange(len(groups))
    first = np.flatnonzero(np.diff(groups, prepend=groups[:1] - 1))
    within = places - np.repeat(first, np.diff(np.append(first, len(groups))))
    return np.flatnonzero(within % batch_size == 0)


def _placed(batches: Sequence[tuple[tuple[Draw, ...], bool]], epoch: int) -> list[BatchPlan]:
    last = len(batches) - 1
    return [
        BatchPlan(draws, is_reg, epoch, (epoch, index + 1) if index < last else (epoch + 1, 0))
        for index, (draws, is_reg) in enumerate(batches)
    ]


# ----------------------------------------------------------------------------------------------------- validation


def hold_out(
    pictures: Sequence[Picture], datasets: Sequence[DatasetConfig], share: float, seed: int
) -> tuple[list[Picture], list[Picture]]:
    """Split into pictures to train on and pictures to validate on, by content and seed: copies stay together.

    At least one of the subject's contents lands on each side; regularisation sets are only trained on.
    """
    contents = {picture.sha256 for picture in pictures if not datasets[picture.dataset].is_reg}
    if len(contents) < 2:
        raise UserError("validation.holdout needs at least two different pictures; use validation.dataset instead")
    count = min(max(1, round(share * len(contents))), len(contents) - 1)
    chosen = set(sorted(contents, key=lambda content: seed_for(seed, "holdout", content))[:count])
    held = [p for p in pictures if p.sha256 in chosen and not datasets[p.dataset].is_reg]
    return [p for p in pictures if p.sha256 not in chosen], held


def validation_order(
    pictures: Sequence[Picture],
    datasets: Sequence[DatasetConfig],
    trigger: str | None,
    *,
    seed: int,
    batch_size: int,
    max_images: int,
    divisibility: int,
) -> Order:
    """An order of at most so many pictures as they are: nothing dropped, shuffled, mirrored or repeated.

    Which pictures are taken depends on their content and the seed alone. Epoch 0 has all there is.
    """
    chosen = sorted(pictures, key=lambda picture: (seed_for(seed, "validation", picture.sha256), picture.key))
    first = [replace(picture, captions=picture.captions[:1]) for picture in chosen[:max_images]]
    plain = {
        "caption_dropout_rate": 0.0,
        "shuffle_tokens": False,
        "num_repeats": 1,
        "flip_x": False,
        "flip_y": False,
        "crop": "center",
        "clip_part": "start",
        "is_reg": False,
    }
    calm = [config.model_copy(update=plain) for config in datasets]
    return Order(make_items(first, calm, divisibility), calm, trigger, seed, batch_size)
