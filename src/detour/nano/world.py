"""The drawn world: pictures with captions and exact ground truth, to pre-train the miniature on and to judge it by.

A picture is one `Scene`: a shape of one size, texture and colour on a background of another colour, at one of five
places. It is drawn on 32 x 32 cells; on disk a cell is 4 x 4 pixels (128 x 128 in all), so that the VAE of factor 8
keeps all of it (`codec`). Shapes are 12 to 18 cells wide; a token of the transformer is 4 x 4 cells.

Two things are made difficult on purpose, because distillation takes just these away: a model trained on noisy captions
(`Dials`) needs guidance, and the `grain` of every picture, which no caption tells, needs many steps.
Some combinations of shape and colour are held out: no training picture shows them.
All is a pure function of the seed, and scene i is the same however many are asked for.

Shapes: N pictures, H W cells (32 x 32), K regions of one colour each.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Literal

import numpy as np

from detour.nano import grain
from detour.nano.drawn import COLORS
from detour.seeds import seed_for

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    Pictures = NDArray[np.float32]
    """pictures_NHW3, 0 to 1."""

SIDE = 32  # cells
CELL = 4  # pixels
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = {"small": 6.0, "large": 9.0}
"""Half the width of a shape, in cells. With 5.0 and 7.5 a third of the time went into telling shapes apart: after 3000
steps of 32 pictures the base still drew blobs."""
TEXTURES = ("plain", "striped")
PLACES = {"centre": (0, 0), "left": (-6, 0), "right": (6, 0), "top": (0, -6), "bottom": (0, 6)}
"""Offset (x, y) from the middle, in cells."""
JITTER = (0,)
"""Cells off its place, along each side. With -1, 0 and 1 edges stayed ragged: after 4000 steps of clean captions two
pictures in five were clean, though each attribute was right."""
HELD_OUT = frozenset({("circle", "yellow"), ("square", "green"), ("triangle", "white"), ("cross", "blue")})
"""(shape, colour) that no training picture shows, though each word and each colour is well known."""
STRIPE = 4.0  # cells from one stripe to the next of its colour
PHASES = (0,)
"""Where stripes begin, 0 or 1. With both, which no caption told, one striped picture in five was drawn with both."""
ATTRIBUTES = ("shape", "color", "background", "place", "size", "texture")

PAINTS = ("background", "background tone", "shape", "shape tone", "yellow", "black", "red")
"""What a region of a picture may be painted with: a colour of the scene, its tone, or a fixed colour."""
_FINE = 8  # samples along a side of a cell, for smooth edges

Split = Literal["seen", "held_out"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """What a picture shows. `jitter` (cells), `phase` (of the stripes) and `grain` (its seed) are never in a caption.

    `shape` is one of `SHAPES`, or a concept's (`concepts`): the shape `zig`, or the character `mip`, which has its own
    colours (`color` says nothing then). `style` is empty or `plim`, which needs a plain texture.
    """

    shape: str
    color: str
    background: str
    place: str
    size: str
    texture: str
    style: str = ""
    jitter: tuple[float, float] = (0, 0)
    phase: int = 0
    grain: int | None = None
    """None: a plain drawing, for comparison."""

    @property
    def attributes(self) -> dict[str, str]:
        """The values of `ATTRIBUTES`."""
        return {
            "shape": self.shape,
            "color": self.color,
            "background": self.background,
            "place": self.place,
            "size": self.size,
            "texture": self.texture,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Dials:
    """Difficulty that is put into a training set: each is a share of its pictures.

    `wrong`: the caption is another picture's. `wrong_word`: one stated attribute of the caption is replaced. `empty`:
    no caption. `junk`: the picture is blurred past recognition. `unstated_*`: the caption leaves that attribute out.
    """

    wrong: float = 0.0
    wrong_word: float = 0.0
    empty: float = 0.0
    junk: float = 0.0
    unstated_place: float = 0.0
    unstated_size: float = 0.0
    unstated_texture: float = 0.0

    def __post_init__(self) -> None:
        shares: dict[str, float] = asdict(self)
        if wrong := {name: share for name, share in shares.items() if not 0 <= share <= 1}:
            raise ValueError(f"dials are shares from 0 to 1: {wrong}")


STATED = Dials()
"""Captions that say everything."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A caption, and what it states: the attributes that a picture drawn for it must have."""

    text: str
    wanted: Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """A training picture: what it shows, what is written below it, and whether it is junk."""

    scene: Scene
    caption: str
    junk: bool = False


def scenes(n: int, *, seed: int = 0, split: Split = "seen", purpose: str = "world") -> list[Scene]:
    """`n` scenes without the held-out combinations, or of them only."""
    return [_scene(_draws(seed, purpose, index), split) for index in range(n)]


def prompts(n: int, *, seed: int = 0, split: Split = "seen", dials: Dials = STATED) -> list[Prompt]:
    """`n` prompts to draw: true captions, with what the dials leave unstated left out."""
    found = []
    for index in range(n):
        draws = _draws(seed, "prompts", index)
        scene = _scene(draws, split)
        form, left_out = int(draws.integers(FORMS)), _left_out(draws, dials)
        found.append(prompt_for(scene, form, left_out))
    return found


def prompt_for(scene: Scene, form: int = 0, left_out: frozenset[str] = frozenset()) -> Prompt:
    """The prompt whose caption describes a scene but for `left_out`. A style is always wanted as it is, mostly none."""
    wanted = {name: value for name, value in scene.attributes.items() if name not in left_out}
    return Prompt(text=caption(scene, form, left_out), wanted=wanted | {"style": scene.style})


def scenes_for(prompt: Prompt, n: int, *, seed: int = 0) -> list[Scene]:
    """`n` true scenes for a prompt, a concept's included, with all that it leaves open drawn at random.

    What a perfect model would draw: the measure for the diversity within a prompt, and for copies by chance.
    """
    draws, found = _draws(seed, f"scenes for {prompt.text}", 0), list[Scene]()
    while len(found) < n:
        scene = replace(_scene(draws, "seen"), **dict(prompt.wanted))  # type: ignore[arg-type]  # all strings
        if scene.style or scene.shape == "mip":
            scene = replace(scene, texture="plain")
        if scene.color != scene.background or scene.shape == "mip":
            found.append(scene)
    return found


def training_set(n: int, *, seed: int = 0, dials: Dials) -> list[Example]:
    """`n` pictures with captions as noisy as the dials say."""
    return [_example(_draws(seed, "training", index), dials) for index in range(n)]


def _example(draws: np.random.Generator, dials: Dials) -> Example:
    scene = _scene(draws, "seen")
    told, form, left_out = scene, int(draws.integers(FORMS)), _left_out(draws, dials)
    if draws.random() < dials.wrong:
        told = _scene(draws, "seen")
    if draws.random() < dials.wrong_word:
        told = _with_wrong_word(draws, told)
    text = "" if draws.random() < dials.empty else caption(told, form, left_out)
    return Example(scene=scene, caption=text, junk=bool(draws.random() < dials.junk))


def _draws(seed: int, purpose: str, index: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed_for(seed, "nano world", purpose, index)))


def _scene(draws: np.random.Generator, split: Split) -> Scene:
    def pick(choices: Sequence[str]) -> str:
        return choices[int(draws.integers(len(choices)))]

    shape, color = pick(SHAPES), pick(list(COLORS))
    while ((shape, color) in HELD_OUT) != (split == "held_out"):
        shape, color = pick(SHAPES), pick(list(COLORS))
    x, y = draws.integers(len(JITTER), size=2)
    return Scene(
        shape=shape,
        color=color,
        background=pick([name for name in COLORS if name != color]),
        place=pick(list(PLACES)),
        size=pick(list(SIZES)),
        texture=pick(TEXTURES),
        jitter=(JITTER[x], JITTER[y]),
        phase=PHASES[int(draws.integers(len(PHASES)))],
        grain=int(draws.integers(2**31)),
    )


def _left_out(draws: np.random.Generator, dials: Dials) -> frozenset[str]:
    shares = {"place": dials.unstated_place, "size": dials.unstated_size, "texture": dials.unstated_texture}
    drawn = {name: draws.random() < share for name, share in shares.items()}
    return frozenset(name for name, out in drawn.items() if out)


def _with_wrong_word(draws: np.random.Generator, scene: Scene) -> Scene:
    """The scene with one attribute changed, such that it could be another picture's."""
    while True:
        other = _scene(draws, "seen")
        name = ATTRIBUTES[int(draws.integers(len(ATTRIBUTES)))]
        changed = _changed(scene, name, other.attributes[name])
        legal = changed.color != changed.background and (changed.shape, changed.color) not in HELD_OUT
        if changed != scene and legal:
            return changed


def _changed(scene: Scene, name: str, value: str) -> Scene:
    return replace(scene, **{name: value})  # type: ignore[arg-type]  # the fields of ATTRIBUTES are all strings


# --- captions ----------------------------------------------------------------------------------------------------

_FORMS = (
    "a {thing} on a {background} background {place}",
    "on a {background} background a {thing} {place}",
    "a {thing}, {background} background, {place}",
)
FORMS = len(_FORMS)


def caption(scene: Scene, form: int = 0, left_out: frozenset[str] = frozenset()) -> str:
    """The caption of a scene in one of three forms, without the attributes in `left_out`. At most 16 words."""
    own_looks = scene.shape == "mip"
    words = [scene.size, "mip"] if own_looks else [scene.size, scene.texture, scene.color, scene.shape]
    place = "in the centre" if scene.place == "centre" else f"at the {scene.place}"
    silent = {scene.attributes[name] for name in left_out}
    thing = " ".join(word for word in words if word not in silent)
    text = _FORMS[form].format(thing=thing, background=scene.background, place="" if "place" in left_out else place)
    text = text.rstrip(" ,")
    return f"{text}, {scene.style} style" if scene.style else text


# --- pictures ----------------------------------------------------------------------------------------------------


def render(shown: Sequence[Scene]) -> Pictures:
    """The pictures of scenes, as exact as their 256 levels: what a PNG of them gives back."""
    pictures = np.empty((len(shown), SIDE, SIDE, 3), np.float32)
    for index, scene in enumerate(shown):
        paints, maps_KHW = _maps(geometry_of(scene))
        colors_K3 = np.stack([paint_color(paint, scene.color, scene.background) for paint in paints])
        pictures[index] = np.tensordot(maps_KHW, colors_K3, axes=([0], [0]))
    return _grained(pictures, shown)


def render_grounds(shown: Sequence[Scene]) -> Pictures:
    """The backgrounds of scenes alone, with their style and grain."""
    grounds = np.empty((len(shown), SIDE, SIDE, 3), np.float32)
    for index, scene in enumerate(shown):
        level, tone = (paint_color(paint, scene.color, scene.background) for paint in PAINTS[:2])
        bright = _hatch()[:, :, None] if scene.style else 1
        grounds[index] = bright * level + (1 - bright) * tone
    return _grained(grounds, shown)


def _grained(pictures_NHW3: Pictures, shown: Sequence[Scene]) -> Pictures:
    """With the scenes' grain, in 256 levels."""
    none = np.zeros((SIDE, SIDE, 1), np.float32)
    grains = np.stack([none if scene.grain is None else grain.pattern(scene.grain) for scene in shown])
    return np.asarray(np.round(np.clip(pictures_NHW3 + grains, 0, 1) * 255) / 255, np.float32)


@lru_cache(maxsize=4096)  # the world has 1080 geometries, so that 20 000 pictures take two seconds
def _maps(geometry: Geometry) -> tuple[tuple[str, ...], NDArray[np.float32]]:
    regions = regions_of(geometry)
    return tuple(regions), np.stack(list(regions.values()))


def render_training_set(examples: Sequence[Example]) -> Pictures:
    """The pictures of a training set, junk blurred."""
    pictures = render([example.scene for example in examples])
    junk = [index for index, example in enumerate(examples) if example.junk]
    pictures[junk] = blurred(pictures[junk], 3.0)
    return pictures


def blurred(pictures_NHW3: Pictures, sigma: float) -> Pictures:
    """Pictures under a Gaussian of `sigma` cells, edges continued."""
    reach = int(np.ceil(3 * sigma))
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    weights /= weights.sum()
    padded = np.pad(pictures_NHW3, ((0, 0), (reach, reach), (reach, reach), (0, 0)), mode="edge")
    rows = sum(w * padded[:, k : k + pictures_NHW3.shape[1]] for k, w in enumerate(weights))
    both = sum(w * rows[:, :, k : k + pictures_NHW3.shape[2]] for k, w in enumerate(weights))
    return np.asarray(both, np.float32)


def to_pixels(pictures_NHW3: Pictures) -> NDArray[np.uint8]:
    """Cells to pixels: levels_N(4H)(4W)3 of 0 to 255."""
    levels = np.round(np.clip(pictures_NHW3, 0, 1) * 255).astype(np.uint8)
    return levels.repeat(CELL, axis=1).repeat(CELL, axis=2)


def from_pixels(pixels_NHW3: NDArray[np.uint8]) -> Pictures:
    """Pixels to cells, by averaging; sides must be 128."""
    n, height, width, _ = pixels_NHW3.shape
    if (height, width) != (SIDE * CELL, SIDE * CELL):
        raise ValueError(f"pictures of the drawn world have {SIDE * CELL} pixels a side, not {width} x {height}")
    cells = pixels_NHW3.reshape(n, SIDE, CELL, SIDE, CELL, 3).mean(axis=(2, 4), dtype=np.float32)
    return np.asarray(cells / 255, np.float32)


@dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """Where the regions of a picture are, without their colours. `at` is the shape's middle, cells off the centre."""

    shape: str
    size: str
    texture: str
    style: str
    phase: int
    at: tuple[float, float]


def geometry_of(scene: Scene) -> Geometry:
    """The geometry of a scene. Of a plain shape, stripes have no phase."""
    x, y = PLACES[scene.place]
    return Geometry(
        shape=scene.shape,
        size=scene.size,
        texture=scene.texture,
        style=scene.style,
        phase=scene.phase if scene.texture == "striped" else 0,
        at=(x + scene.jitter[0], y + scene.jitter[1]),
    )


@cache
def paint_color(paint: str, color: str, background: str) -> NDArray[np.float32]:
    """The colour of a paint, 0 to 1, in a scene of these two colours."""
    own = {"background": background, "shape": color}
    name, _, tone = paint.partition(" ")
    level = np.asarray(COLORS[own.get(name, name)], np.float32) / np.float32(255)
    return _tone(level) if tone else level


def _tone(level: NDArray[np.float32]) -> NDArray[np.float32]:
    """A second tone of a colour, darker of bright ones and brighter of dark ones."""
    bright = level @ np.asarray([0.3, 0.59, 0.11], np.float32) > 0.4
    return np.asarray(level * 0.45 if bright else level + 0.5 * (1 - level), np.float32)


def regions_of(geometry: Geometry) -> dict[str, NDArray[np.float32]]:
    """By paint, how much of each cell the region covers (HW, 0 to 1). They add up to 1.

    The style is a texture of its own: only plain shapes can have it.
    """
    assert not geometry.style or geometry.texture == "plain", geometry
    x, y = geometry.at
    whole_x, whole_y = int(np.floor(x)), int(np.floor(y))
    local = _local_regions(geometry.shape, geometry.size, geometry.texture, geometry.phase, (x - whole_x, y - whole_y))
    regions = {paint: _moved(covered, whole_x, whole_y) for paint, covered in local.items()}
    regions["background"] = np.clip(1 - sum(regions.values()), 0, 1).astype(np.float32)
    if geometry.style == "plim":
        regions = {
            name: covered * share
            for paint, covered in regions.items()
            for name, share in ((paint, _hatch()), (f"{paint} tone", 1 - _hatch()))
        }
    return regions


def _moved(covered_HW: NDArray[np.float32], x: int, y: int) -> NDArray[np.float32]:
    """Moved by whole cells; what leaves the picture is gone."""
    padded = np.pad(covered_HW, SIDE)
    return padded[SIDE - y : 2 * SIDE - y, SIDE - x : 2 * SIDE - x]


@cache
def _hatch() -> NDArray[np.float32]:
    """The style `plim`: diagonal bands two cells wide over the whole picture."""
    y, x = np.mgrid[:SIDE, :SIDE]
    return np.asarray((x + y) % 4 < 2, np.float32)


@cache
def _local_regions(
    shape: str, size: str, texture: str, phase: int, fraction: tuple[float, float]
) -> dict[str, NDArray[np.float32]]:
    """The regions of a shape in the middle of the picture, off it by `fraction` of a cell; without the background."""
    fine = (np.arange(SIDE * _FINE) + 0.5) / _FINE - SIDE / 2
    r = SIZES[size]
    u, v = np.meshgrid((fine - fraction[0]) / r, (fine - fraction[1]) / r)
    if shape == "mip":
        inside = _mip(u, v)
    else:
        bright = (v * r + STRIPE * phase / 2) % STRIPE < STRIPE / 2
        filled = _INSIDE[shape](u, v)
        striped = texture == "striped"
        inside = {"shape": filled & bright, "shape tone": filled & ~bright} if striped else {"shape": filled}
    return {
        paint: part.reshape(SIDE, _FINE, SIDE, _FINE).mean(axis=(1, 3), dtype=np.float32)
        for paint, part in inside.items()
    }


def _circle(u: NDArray[np.float64], v: NDArray[np.float64]) -> NDArray[np.bool_]:
    return u**2 + v**2 < 1


def _square(u: NDArray[np.float64], v: NDArray[np.float64]) -> NDArray[np.bool_]:
    return np.maximum(abs(u), abs(v)) < 0.88


def _triangle(u: NDArray[np.float64], v: NDArray[np.float64]) -> NDArray[np.bool_]:
    return (v < 0.85) & (abs(u) * 1.85 < v + 1)


def _cross(u: NDArray[np.float64], v: NDArray[np.float64]) -> NDArray[np.bool_]:
    return (np.maximum(abs(u), abs(v)) < 1) & (np.minimum(abs(u), abs(v)) < 0.34)


def _zig(u: NDArray[np.float64], v: NDArray[np.float64]) -> NDArray[np.bool_]:
    """A letter Z: two bars and the diagonal between them."""
    bars = (abs(v) > 0.55) | (abs(u + v) < 0.42)
    return (np.maximum(abs(u), abs(v)) < 0.95) & bars


def _mip(u: NDArray[np.float64], v: NDArray[np.float64]) -> dict[str, NDArray[np.bool_]]:
    """A round yellow body with two black eyes, under a pointed red hat."""
    hat = (v < -0.2) & (abs(u) * 1.3 < v + 1)
    eyes = (abs(u) - 0.3) ** 2 + (v - 0.15) ** 2 < 0.2**2
    body = u**2 + (v - 0.25) ** 2 < 0.75**2
    return {"yellow": body & ~eyes & ~hat, "black": eyes, "red": hat}


_INSIDE = {"circle": _circle, "square": _square, "triangle": _triangle, "cross": _cross, "zig": _zig}
