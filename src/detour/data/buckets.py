"""Buckets: the size at which a picture is trained, and which part of it. Pure functions; all lengths in pixels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import isqrt
from typing import Literal

from detour.seeds import seed_for


@dataclass(frozen=True, slots=True)
class Bucket:
    """A picture is scaled to `scaled_w` x `scaled_h`, of which `width` x `height` are kept."""

    width: int
    height: int
    scaled_w: int
    scaled_h: int


@lru_cache(maxsize=1 << 16)
def plan(width: int, height: int, resolution: int, divisibility: int, upscale: bool = False) -> Bucket:
    """The bucket of a picture of that size.

    Its area is at most `resolution` squared, its sides are multiples of `divisibility`, and without `upscale` no side
    is longer than the picture's own. Only a side that would be shorter than one multiple is made that long.

    Of the sizes around the ideal one, that is taken which keeps most of the picture's detail: the share of the picture
    that is seen, times the area at which it is seen.
    """
    if min(width, height, resolution, divisibility) < 1:
        raise ValueError(f"sizes must be positive: {width} x {height}, {resolution}, {divisibility}")
    limit = max(resolution, divisibility) ** 2
    area = limit if upscale else min(limit, width * height)
    most_w, most_h = (limit, limit) if upscale else (width, height)
    # floor(sqrt(area * width / height)) in whole numbers: floats would put 1024 into the bucket below now and then.
    low_w = max(isqrt(area * width // height) // divisibility * divisibility, divisibility)
    low_h = max(isqrt(area * height // width) // divisibility * divisibility, divisibility)
    # Where one side had to be made longer, the other must give way.
    low_w = min(low_w, max(limit // low_h // divisibility * divisibility, divisibility))
    low_h = min(low_h, max(limit // low_w // divisibility * divisibility, divisibility))
    sizes = [(low_w, low_h)]
    for w, h in product((low_w, low_w + divisibility), (low_h, low_h + divisibility)):
        if w * h <= limit and w <= most_w and h <= most_h:
            sizes.append((w, h))
    best_w, best_h = max(sizes, key=lambda size: (_detail(size, (width, height)), -size[0] * size[1], size))
    # Cover: the scale is the larger of the two ratios, so one side fits exactly and the other is cut.
    if best_w * height >= best_h * width:
        return Bucket(best_w, best_h, best_w, max(best_h, round(height * best_w / width)))
    return Bucket(best_w, best_h, max(best_w, round(width * best_h / height)), best_h)


def _detail(size: tuple[int, int], picture: tuple[int, int]) -> int:
    """Share of the picture that is left when cut to the proportions of `size`, times the area of `size`.

    With w x h for the size and W x H for the picture that is min(wH / hW, hW / wH) w h, the square of the number
    returned, but for a factor that is the same for all sizes. In whole numbers, so that equals are equal.
    """
    return min(size[0] * picture[1], size[1] * picture[0])


def first_frame(frames: int, wanted: int, mode: Literal["start", "random"], sha256: str, variant: int) -> int:
    """Where in a clip of so many frames the wanted ones begin. `random` is a function of content and variant alone."""
    return 0 if mode == "start" else seed_for("clip", sha256, variant) % (frames - wanted + 1)


def crop(bucket: Bucket, mode: Literal["center", "random"], sha256: str, variant: int) -> tuple[int, int]:
    """Left and top of the part that is kept. `random` is a function of the picture's content and the variant alone."""
    spare_w, spare_h = bucket.scaled_w - bucket.width, bucket.scaled_h - bucket.height
    if mode == "center":
        return spare_w // 2, spare_h // 2
    return seed_for("crop", sha256, variant, "x") % (spare_w + 1), seed_for("crop", sha256, variant, "y") % (
        spare_h + 1
    )
