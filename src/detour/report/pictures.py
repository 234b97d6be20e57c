"""The previews of a run as a table, prompt by step, each embedded as a small JPEG.

The page stays below `page.LIMIT`: at most `page.PICTURES`, each of at most `BYTES` bytes. JPEG, since it is written ten
times as fast as WebP, and everything shows it.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, TypeVar

from PIL import Image

from detour.data.images import DECODING, MAX_PIXELS
from detour.report import words

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from detour.report.history import History

_Item = TypeVar("_Item")
ROWS = 30
"""Prompts that are shown at most."""
BYTES = 80_000
"""Of a picture's JPEG; in the page it takes a third more."""
TRIES = ((512, 82), (512, 65), (384, 65), (256, 60), (192, 40), (96, 30))
"""Longest side in pixels and JPEG quality: the first that fits `BYTES` is taken. The last one always does."""


@dataclass(frozen=True)
class Cell:
    """A preview, or why it is not shown."""

    step: int
    source: str | None
    """A data address."""
    problem: str = ""
    size: tuple[int, int] = (0, 0)
    """Pixels as it is embedded."""


@dataclass(frozen=True)
class Row:
    """The previews of a prompt, one for each step of the table."""

    prompt: str
    seed: int
    cells: list[Cell | None]


@dataclass(frozen=True)
class Matrix:
    """All previews that are shown."""

    steps: list[int]
    rows: list[Row]
    steps_left_out: list[int]
    prompts_left_out: int


def matrix(history: History, folder: Path, most: int) -> Matrix:
    """At most so many (at least 2) of the previews in `folder`, the run's `samples`.

    Of too many steps an even choice, with the first and the last.
    """
    found: dict[tuple[int, str, int], dict[int, str]] = {}
    for record in history.samples:
        key = (int(record["index"]), str(record["prompt"]), int(record["seed"]))
        found.setdefault(key, {})[int(record["step"])] = str(record["path"])
    shown = dict(sorted(found.items())[: min(ROWS, most // 2)])
    steps = sorted({step for paths in shown.values() for step in paths})
    chosen = spread(steps, most // max(len(shown), 1))
    rows = [
        Row(prompt, seed, [cell(folder, step, paths[step]) if step in paths else None for step in chosen])
        for (_, prompt, seed), paths in shown.items()
    ]
    return Matrix(chosen, rows, [step for step in steps if step not in set(chosen)], len(found) - len(shown))


def spread(items: Sequence[_Item], most: int) -> list[_Item]:
    """At most so many (at least 2) of the items, evenly, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(number * (len(items) - 1) / (most - 1))] for number in range(most)]


def cell(folder: Path, step: int, path: str) -> Cell:
    """One of the run's `samples`. Only the name of the recorded path counts: the folder may have been moved."""
    file = folder / words.last_part(path)
    if not file.is_file():
        return Cell(step, None, "the file is gone")
    try:
        with Image.open(file, formats=("PNG",)) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                return Cell(step, None, "the file is too large")
            data, size = _small(picture)
    except (*DECODING, Image.DecompressionBombError):
        return Cell(step, None, "the file cannot be read")
    return Cell(step, f"data:image/jpeg;base64,{base64.b64encode(data).decode()}", size=size)


def _small(picture: Image.Image) -> tuple[bytes, tuple[int, int]]:
    """A JPEG of the picture; of a clip, of its first frame. Small pictures keep their size."""
    whole = picture.convert("RGB")
    data = b""
    for side, quality in TRIES:
        small = whole.copy()
        small.thumbnail((side, side), Image.Resampling.LANCZOS)
        buffer = BytesIO()
        small.save(buffer, format="JPEG", quality=quality)
        if len(data := buffer.getvalue()) <= BYTES:
            break
    return data, small.size
