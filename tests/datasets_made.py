"""Datasets for the tests of their pages: drawn pictures, and a snapshot of everything in a folder."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import web_client


def png(seed: int = 0, size: tuple[int, int] = (64, 48), **save: Any) -> bytes:
    """A sharp picture that looks like no other."""
    cells = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(cells).resize(size, Image.Resampling.NEAREST).save(out, **{"format": "PNG"} | save)
    return out.getvalue()


def fill(folder: Path, count: int = 3, name: str = "zig") -> Path:
    """A dataset as a person may put it there by hand. Returns its folder."""
    place = folder / "datasets" / name
    place.mkdir(parents=True)
    for index in range(count):
        (place / f"{index}.png").write_bytes(png(index))
        (place / f"{index}.txt").write_text(f"a zig, number {index}\n")
    return place


def put(client: Any, name: str, data: bytes, dataset: str = "zig", **query: str) -> Any:
    """Upload a file."""
    return client.put(f"/api/datasets/{dataset}/files/{name}", content=data, headers=web_client.UPLOAD, params=query)


def tree(folder: Path, hidden: bool = False) -> dict[str, bytes]:
    """All files below a folder with what they hold; what begins with a dot only if `hidden`."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and (hidden or not any(part.startswith(".") for part in name.split("/"))):
            found[name] = path.read_bytes()
    return found
