"""Real photographs for tests: the colour pictures that come inside scikit-image's wheel, with captions."""

from __future__ import annotations

import importlib.metadata
import shutil
from pathlib import Path

CAPTIONS = {
    "astronaut.png": "a portrait photo of a woman in an orange space suit, a flag on the left, a shuttle on the right",
    "chelsea.png": "a close photo of a ginger cat with green eyes, lying down",
    "coffee.png": "a photo of a cup of black coffee on a white saucer with a spoon, on a wooden table",
    "hubble_deep_field.jpg": "a photo of many small galaxies on a black background",
    "motorcycle_left.png": "a photo of a motorcycle parked in a garage, tools on the wall behind it",
    "retina.jpg": "a medical photo of a retina, orange with dark red vessels, on a black background",
    "rocket.jpg": "a photo of a white rocket taking off from its launch pad in front of a dark blue sky",
}


def write_photographs(folder: Path) -> list[Path]:
    """Copy the photographs into `folder`, byte for byte, each with its caption beside it."""
    shipped = {file.name: file for file in importlib.metadata.files("scikit-image") or [] if _is_data(file)}
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for name, caption in CAPTIONS.items():
        target = folder / name
        shutil.copyfile(Path(shipped[name].locate()), target)
        target.with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")
        written.append(target)
    return written


def _is_data(file: importlib.metadata.PackagePath) -> bool:
    return file.parts[:2] == ("skimage", "data")
