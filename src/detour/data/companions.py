"""What lies beside pictures in folders of its own, under the same names: masks and control pictures."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, TypeVar

from detour.data import images

if TYPE_CHECKING:
    from detour.data.scan import _Draft

_CHUNK = 128  # pictures handed to the threads at a time

_Result = TypeVar("_Result")
File = tuple[Path, str, int, int]
"""Path, sha256, width and height."""


def attach_masks(draft: _Draft) -> None:
    """Find and check the mask of each picture."""
    if draft.config.mask_path is None:
        return
    wanted = _beside(draft, draft.config.mask_path.expanduser(), "mask")
    budget = images.Budget()
    for key, mask in parallel(lambda path: images.check_mask(path, budget), wanted):
        if isinstance(mask, images.BadPictureError):
            draft.reject(key, f"has a mask that cannot be used: {wanted[key]} {mask}")
        elif mask[3] == 0 and draft.config.mask_min_value == 0:
            draft.reject(key, f"would never count: its mask {wanted[key]} is black and mask_min_value is 0")
        else:
            draft.masks[key] = (wanted[key], mask[0], mask[1], mask[2])


def attach_controls(draft: _Draft) -> None:
    """Find and check the control picture of each picture."""
    if draft.config.control_path is None:
        return
    wanted = _beside(draft, draft.config.control_path.expanduser(), "control picture")
    budget, resolution = images.Budget(), max(draft.config.resolution)
    for key, facts in parallel(lambda path: images.check(path, budget, resolution), wanted):
        if isinstance(facts, images.BadPictureError):
            draft.reject(key, f"has a control picture that cannot be used: {wanted[key]} {facts}")
        else:
            draft.controls[key] = (wanted[key], facts.sha256, facts.width, facts.height)


def mismatch(facts: images.Facts, beside: File, what: str) -> str | None:
    """What to say of a companion that has other proportions than its picture; None where they are alike.

    It is scaled as the picture is: a rounded pixel may differ, the proportions may not.
    """
    path, _, width, height = beside
    expected = facts.height * width / facts.width
    if abs(expected - height) <= max(1.0, 0.01 * expected):
        return None
    found = f"{width} x {height}, the picture {facts.width} x {facts.height}"
    return f"and its {what} {path} have different proportions ({found}); draw the {what} over the picture"


def stem_of(key: str) -> str:
    """The name without its ending, by which things belong together."""
    return PurePosixPath(key).with_suffix("").as_posix()


def _beside(draft: _Draft, folder: Path, what: str) -> dict[str, Path]:
    """The file in `folder` that belongs to each picture; a picture that has none, or several, is rejected."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in sorted(folder.rglob("*") if draft.config.recursive else folder.iterdir()):
        if path.suffix.lower() in images.ENDINGS and not path.name.startswith("."):
            name = path.relative_to(folder).as_posix()
            found[stem_of(name)].append(name)
    wanted: dict[str, Path] = {}
    for key in draft.keys:
        names = found.pop(draft.stem(key), [])
        if len(names) == 1:
            wanted[key] = folder / names[0]
        elif names:
            draft.reject(key, f"has several {what}s ({', '.join(names)}); keep one")
        else:
            draft.reject(key, f"has no {what}: {folder} has no picture of that name; add one")
    draft.note(f"{what}s without a picture", [name for names in found.values() for name in names])
    return wanted


def parallel(
    work: Callable[[Path], _Result], paths: dict[str, Path]
) -> Iterator[tuple[str, _Result | images.BadPictureError]]:
    """Do the work in threads (decoding and hashing release the lock), in order, with a bounded number under way."""

    def guarded(path: Path) -> _Result | images.BadPictureError:
        try:
            return work(path)
        except images.BadPictureError as error:
            return error

    keys = list(paths)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(keys), _CHUNK):
            part = keys[start : start + _CHUNK]
            yield from zip(part, pool.map(guarded, [paths[key] for key in part]), strict=True)
