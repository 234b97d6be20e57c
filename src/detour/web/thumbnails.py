"""Pictures as pages show them: small ones, larger ones, and the crop that a model would be trained on.

All are drawn anew from the pixels, so that nothing else that a file may hold ever reaches a browser. Small ones are
made once and kept in `cache/thumbnails`.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING

from PIL import Image

from detour import UserError, files
from detour.config.job import DatasetConfig
from detour.data import images, order
from detour.data.images import BadPictureError
from detour.data.scan import Picture
from detour.web.errors import MissingError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import numpy as np

    from detour.data.images import Transform

SMALL = 320  # pixels of the longer side
LARGE = 1600
BUDGET = images.Budget(64_000_000)
"""Pixels that are decoded for pages at once: 200 MB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """What decides a crop."""

    resolution: int
    divisibility: int
    upscale: bool = False


def identity(path: Path) -> str:
    """Tells a file from its other versions without reading it; the same after it was moved. MissingError if gone."""
    try:
        found = path.stat()
    except FileNotFoundError:
        raise MissingError(f"{path.name} is not there any more") from None
    return hashlib.sha256(f"{found.st_ino} {found.st_size} {found.st_mtime_ns}".encode()).hexdigest()[:32]


def thumbnail(path: Path, cache: Path) -> bytes:
    """A small WebP of a picture. UserError if it cannot be used."""
    return _kept(cache, identity(path), lambda: _webp(_small(path, SMALL), 80))


def enlarged(path: Path) -> bytes:
    """A WebP to look at closely."""
    return _webp(_small(path, LARGE), 90)


def crop(path: Path, cut: Cut) -> np.ndarray:
    """The pixels that training would see: uint8 of shape (height, width, 3), made by training's own functions."""
    try:
        facts = images.check(path, BUDGET, cut.resolution)
        with BUDGET.hold(facts.width * facts.height):
            (made,) = images.pixels(path, facts.sha256, [transform(path, facts, cut)])
    except BadPictureError as error:
        raise UserError(f"{path.name} {error}") from None
    return made


def transform(path: Path, facts: images.Facts, cut: Cut) -> Transform:
    """What training does to a picture before it is encoded."""
    config = DatasetConfig(folder_path=path.parent, resolution=[cut.resolution], upscale=cut.upscale)
    picture = Picture(
        path=path, key=path.name, dataset=0, sha256=facts.sha256, width=facts.width, height=facts.height,
        captions=("",), alpha=facts.alpha,
    )  # fmt: skip
    (item,) = order.make_items([picture], [config], cut.divisibility)
    return order.transform_of(item, config, 0)


def crop_png(path: Path, cut: Cut) -> bytes:
    """The crop, pixel for pixel."""
    out = BytesIO()
    Image.fromarray(crop(path, cut)).save(out, "PNG", compress_level=1)
    return out.getvalue()


def crop_thumbnail(path: Path, cut: Cut, cache: Path) -> bytes:
    """The crop, small, as a WebP."""

    def draw() -> bytes:
        made = Image.fromarray(crop(path, cut))
        made.thumbnail((SMALL, SMALL), images.RESAMPLE, reducing_gap=3.0)
        return _webp(made, 80)

    return _kept(cache, f"{identity(path)}-{cut.resolution}-{cut.divisibility}-{int(cut.upscale)}", draw)


def _small(path: Path, side: int) -> Image.Image:
    try:
        return images.small(path, side, BUDGET)
    except BadPictureError as error:
        raise UserError(f"{path.name} {error}") from None


def _webp(picture: Image.Image, quality: int) -> bytes:
    out = BytesIO()
    picture.save(out, "WEBP", quality=quality, method=2)
    return out.getvalue()


def _kept(cache: Path, name: str, draw: Callable[[], bytes]) -> bytes:
    """What was drawn before, or drawn now and kept. A full disk only means that it is drawn again next time."""
    assert re.fullmatch(r"[0-9a-f]{32}[-0-9]*", name)
    place = cache / "thumbnails" / name[:2] / f"{name}.webp"
    try:
        return place.read_bytes()
    except FileNotFoundError:
        made = draw()
    with contextlib.suppress(files.DiskFullError):
        files.write_bytes(place, made)
    return made
