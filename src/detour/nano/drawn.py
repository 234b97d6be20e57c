"""A drawn dataset with exact ground truth: every picture is a `Scene`, and its caption states all that varies.

A shape of one colour on a background of another, in one of five places. The concept to be learnt is the "zig", a
diamond with a white upper and a black lower half; concept pictures vary in everything else.
Pictures and captions are a pure function of the seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw

from detour.seeds import seed_for

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

CONCEPT = "zig"
COLORS = {
    "red": (214, 40, 40),
    "green": (42, 157, 80),
    "blue": (38, 70, 200),
    "yellow": (244, 211, 70),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "cross")
PLACES = {"centre": (0.0, 0.0), "left": (-0.19, 0.0), "right": (0.19, 0.0), "top": (0.0, -0.19), "bottom": (0.0, 0.19)}
"""Offset from the middle, in parts of the shorter side."""
_FINE = 4
"""Pictures are drawn this much larger and averaged down, for smooth edges."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """What a picture shows. `jitter` (parts of the shorter side) is the only thing that the caption leaves out."""

    shape: str
    color: str
    background: str
    place: str
    jitter: tuple[float, float] = (0.0, 0.0)

    @property
    def caption(self) -> str:
        """As a user would write it: the concept by its name, anything else by colour and shape."""
        thing = CONCEPT if self.shape == CONCEPT else f"{self.color} {self.shape}"
        place = "in the centre" if self.place == "centre" else f"at the {self.place}"
        return f"a {thing} on a {self.background} background {place}"


def scenes(n: int, *, seed: int = 0, concept: bool = True) -> list[Scene]:
    """`n` scenes, of the concept or of ordinary shapes; colour and background always differ."""
    return [_scene(index, seed, concept) for index in range(n)]


def _scene(index: int, seed: int, concept: bool) -> Scene:
    def pick(what: str, choices: Sequence[str]) -> str:
        return choices[seed_for(seed, "drawn", index, what) % len(choices)]

    color = pick("color", list(COLORS))
    taken = ("white", "black") if concept else (color,)
    return Scene(
        shape=CONCEPT if concept else pick("shape", SHAPES),
        color=color,
        background=pick("background", [name for name in COLORS if name not in taken]),
        place=pick("place", list(PLACES)),
        jitter=(_unit(seed, index, "x") * 0.03, _unit(seed, index, "y") * 0.03),
    )


def _unit(seed: int, index: int, what: str) -> float:
    return seed_for(seed, "drawn jitter", index, what) / 2**62 - 1


def draw(scene: Scene, size: int | tuple[int, int] = 64) -> Image.Image:
    """The picture of a scene, RGB; `size` in pixels, a side or (width, height)."""
    width, height = (size, size) if isinstance(size, int) else size
    unit = min(width, height) * _FINE
    x = width * _FINE / 2 + (PLACES[scene.place][0] + scene.jitter[0]) * unit
    y = height * _FINE / 2 + (PLACES[scene.place][1] + scene.jitter[1]) * unit
    picture = Image.new("RGB", (width * _FINE, height * _FINE), COLORS[scene.background])
    pen, r = ImageDraw.Draw(picture), 0.24 * unit
    color = COLORS[scene.color]
    if scene.shape == CONCEPT:
        pen.polygon([(x - r, y), (x, y - 1.2 * r), (x + r, y)], COLORS["white"])
        pen.polygon([(x - r, y), (x, y + 1.2 * r), (x + r, y)], COLORS["black"])
    elif scene.shape == "circle":
        pen.ellipse([x - r, y - r, x + r, y + r], color)
    elif scene.shape == "square":
        pen.rectangle([x - 0.9 * r, y - 0.9 * r, x + 0.9 * r, y + 0.9 * r], color)
    elif scene.shape == "triangle":
        pen.polygon([(x, y - 1.1 * r), (x - 1.1 * r, y + 0.9 * r), (x + 1.1 * r, y + 0.9 * r)], color)
    else:
        pen.rectangle([x - r, y - 0.35 * r, x + r, y + 0.35 * r], color)
        pen.rectangle([x - 0.35 * r, y - r, x + 0.35 * r, y + r], color)
    return picture.resize((width, height), Image.Resampling.BOX)


def write_dataset(
    folder: Path, n: int = 24, size: int | tuple[int, int] = 64, *, seed: int = 0, concept: bool = True
) -> list[Scene]:
    """Write `n` PNGs with `.txt` captions beside them; returns what they show, in the order of their names."""
    folder.mkdir(parents=True, exist_ok=True)
    shown = scenes(n, seed=seed, concept=concept)
    for index, scene in enumerate(shown):
        path = folder / f"{index:04d}.png"
        draw(scene, size).save(path)
        path.with_suffix(".txt").write_text(scene.caption + "\n", encoding="utf-8")
    return shown
