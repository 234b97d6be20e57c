"""The judge of the drawn world: what a picture shows, how well, and whether it was asked for. No neural network.

A picture is read by comparing it with *every* legal picture there is, the concepts' included: each shape, size,
texture, place and jitter (in half cells, out to 1.5), in each pair of colours; about 210 000. The nearest one says what
the picture shows; the distance to it, relative to the shape's area, says how well it is drawn. That is fast because a
picture is a sum of regions of one colour each: inner products with the regions' maps give all distances.

Figures of a picture:
- the shape is *present* if it stands out from the background by at least `PRESENT` of the contrast that it should have;
- an attribute is *right* if the nearest legal picture has the wanted value and the shape is present. The background
  needs no shape: its mean colour must be near (`FAR`);
- *clean*: the squared error per cell of the shape's area is below `CLEAN`, the sharpness above `SHARP`, and the grain
  above `GRAINED`;
- *as told*: all that the prompt states is right and the shape is present, however it is drawn;
- *strict*: as told, and clean;
- *sharpness*: edge strength along the nearest legal picture's own edges, 1 for a clean drawing, less for blur. Noise
  does not raise it;
- *grain*: the contrast of the grain (`detour.nano.grain`), 1 for all of it. It is what few steps lose first. All other
  figures are taken without what a grain explains;
- *mud*: the share of cells far from every colour of the nearest legal picture, less that picture's own share;
- *pull* of a concept: 0 at the nearest ordinary picture, 1 at the nearest picture of the concept. Blur raises that of
  a shape too, so look at it beside the sharpness; `shows` says which kind of picture is nearest.
Prompts that leave an attribute out are judged by the rest. The thresholds were set by perturbed drawings alone
(noise, blur, fading; tests/nano/test_judge.py), before any model was judged.

Shapes: N pictures, G geometries, K regions, P pairs of colours, H W cells.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import TYPE_CHECKING

import numpy as np

from detour.nano import grain, world
from detour.nano.drawn import COLORS
from detour.nano.world import PLACES, SIDE, Scene

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from detour.nano.world import Pictures, Prompt

    Floats = NDArray[np.float32]
    Flags = NDArray[np.bool_]

FAMILIES = ("world", "zig", "plim", "mip")
"""Ordinary pictures, and those of each concept."""
MIP_BACKGROUNDS = ("blue", "green", "white", "black")
CLEAN = 0.02
"""Squared error (0 to 1, mean over colours) per cell of the shape's area. The least contrast of two colours is 0.14."""
PRESENT = 0.6
SHARP = 0.6
"""A blur of 0.7 cells gives that. Without it two faint colours would pass for clean however blurred."""
GRAINED = 0.7
"""A perfect ordinary model is below it in 8 steps (0.56) and above it in 16 (0.85); `grain.expected`."""
FAR = 0.15
"""Distance of two colours (root mean square over red, green, blue) from which they are not the same."""
COPY = 0.03
"""Root mean square difference below which two pictures are copies, to the grain: another grain makes .08 (and moving a
small shape by a cell .1)."""
_JITTER = np.arange(-1.5, 1.75, 0.5)
_CHUNK = 16  # pictures compared at a time: 60 MB for the largest block


@dataclass(frozen=True, kw_only=True, slots=True)
class _Block:
    """Legal pictures whose regions have the same paints, ready for comparison."""

    family: str
    scenes: tuple[Scene, ...]
    """One for each geometry, in the first pair of colours."""
    pairs: tuple[tuple[str, str], ...]
    maps_DG: Floats
    """Regions' maps, D cells (H W) by G x K."""
    palette_DP: Floats
    """Colours of the regions, K x 3 by P."""
    own_GP: Floats
    """The squared norm of each legal picture."""
    area_G: Floats


@dataclass(frozen=True, slots=True)
class Reading:
    """What pictures show: for each the nearest legal scene, and for each family its nearest and their distance."""

    scenes: list[Scene]
    family: list[str]
    area_N: Floats
    """Cells of the nearest picture's shape."""
    nearest: dict[str, list[Scene]]
    error: dict[str, Floats]
    """By family, the squared error of the nearest."""


@dataclass(frozen=True, slots=True)
class Scores:
    """The figures of pictures (see above). `right` holds each stated attribute: 1, 0, or NaN where it is not stated."""

    right: dict[str, Floats]
    present_N: Flags
    clean_N: Flags
    as_told_N: Flags
    strict_N: Flags
    fit_N: Floats
    sharpness_N: Floats
    grain_N: Floats
    mud_N: Floats
    shows: list[str]
    """The family that each picture shows, or nothing where no shape is present."""
    pull: dict[str, Floats]

    def summary(self) -> dict[str, float]:
        """Means over the pictures; of sharpness the median. Of `strict`, its standard error too."""
        strict = self.strict_N.mean()
        found = {name: float(np.nanmean(values)) for name, values in self.right.items() if not np.isnan(values).all()}
        found |= {
            "present": float(self.present_N.mean()),
            "clean": float(self.clean_N.mean()),
            "as_told": float(self.as_told_N.mean()),
            "strict": float(strict),
            "strict_se": float(np.sqrt(strict * (1 - strict) / len(self.strict_N))),
            "fit": float(self.fit_N.mean()),
            "sharpness": float(np.median(self.sharpness_N)),
            "grain": float(self.grain_N.mean()),
            "mud": float(self.mud_N.mean()),
        }
        for name in FAMILIES[1:]:
            found[f"shows_{name}"] = float(np.mean([shown == name for shown in self.shows]))
            found[f"pull_{name}"] = float(self.pull[name].mean())
        return found


def score(pictures_NHW3: Pictures, prompts: Sequence[Prompt]) -> Scores:
    """Judge pictures drawn for prompts, one each."""
    if len(pictures_NHW3) != len(prompts):
        raise ValueError(f"{len(pictures_NHW3)} pictures, {len(prompts)} prompts")
    reading = read(pictures_NHW3)
    drawings, grounds = world.render(reading.scenes), world.render_grounds(reading.scenes)
    grained_NHW3 = np.clip(pictures_NHW3, 0, 1)
    plain_NHW3 = grain.removed(grained_NHW3, drawings)
    present = _contrast(plain_NHW3, drawings, grounds) > PRESENT
    ground_right = _ground_error(plain_NHW3, drawings, grounds) < FAR
    right = {name: np.full(len(prompts), np.nan, np.float32) for name in (*world.ATTRIBUTES, "style")}
    for index, (prompt, scene) in enumerate(zip(prompts, reading.scenes, strict=True)):
        shown = scene.attributes | {"style": scene.style}
        for name, value in prompt.wanted.items():
            visible = ground_right if name in ("background", "style") else present
            right[name][index] = shown[name] == value and visible[index]
    sharpness, grained = _sharpness(plain_NHW3, drawings), grain.contrast(grained_NHW3, drawings)
    fit = np.square(plain_NHW3 - drawings).mean(axis=-1).sum(axis=(1, 2)) / reading.area_N
    clean = (fit < CLEAN) & (sharpness > SHARP) & (grained > GRAINED)
    as_told = present & np.all([np.isnan(values) | (values == 1) for values in right.values()], axis=0)
    return Scores(
        right=right,
        present_N=present,
        clean_N=clean,
        as_told_N=as_told,
        strict_N=as_told & clean,
        fit_N=fit,
        sharpness_N=sharpness,
        grain_N=grained,
        mud_N=_mud(plain_NHW3, reading.scenes) - _mud(drawings, reading.scenes),
        shows=[name if there else "" for name, there in zip(reading.family, present, strict=True)],
        pull={name: _pull(reading, name) for name in FAMILIES[1:]},
    )


def read(pictures_NHW3: Pictures) -> Reading:
    """Find the nearest legal picture of each. Values outside 0 to 1 are clipped; ValueError if one is not finite."""
    if pictures_NHW3.shape[1:] != (SIDE, SIDE, 3):
        raise ValueError(f"the judge reads pictures of {SIDE} x {SIDE} cells, not of shape {pictures_NHW3.shape}")
    if not np.isfinite(pictures_NHW3).all():
        raise ValueError("a picture holds values that are not finite")
    pictures = np.clip(pictures_NHW3, 0, 1).astype(np.float32)
    n = len(pictures)
    error = {name: np.full(n, np.inf, np.float32) for name in FAMILIES}
    nearest: dict[str, list[Scene]] = {name: [_blocks()[0].scenes[0]] * n for name in FAMILIES}
    area = {name: np.ones(n, np.float32) for name in FAMILIES}
    for start in range(0, n, _CHUNK):
        part = pictures[start : start + _CHUNK]
        for block in _blocks():
            best_N, geometry_N, pair_N = _compare(part, block)
            for offset in np.flatnonzero(best_N < error[block.family][start : start + len(part)]):
                index, geometry = start + offset, geometry_N[offset]
                error[block.family][index] = best_N[offset]
                nearest[block.family][index] = _painted(block.scenes[geometry], block.pairs[pair_N[offset]])
                area[block.family][index] = block.area_G[geometry]
    order = np.argmin(np.stack([error[name] for name in FAMILIES]), axis=0)
    family = [FAMILIES[choice] for choice in order]
    return Reading(
        scenes=[nearest[name][index] for index, name in enumerate(family)],
        family=family,
        area_N=np.array([area[name][index] for index, name in enumerate(family)], np.float32),
        nearest=nearest,
        error=error,
    )


def _compare(pictures_NHW3: Pictures, block: _Block) -> tuple[Floats, NDArray[np.intp], NDArray[np.intp]]:
    """For each picture the least squared error in a block, and the geometry and the pair of colours that have it."""
    n, pairs = len(pictures_NHW3), len(block.pairs)
    colors_ND = pictures_NHW3.transpose(0, 3, 1, 2).reshape(n * 3, SIDE * SIDE)
    k = len(block.palette_DP) // 3
    products = (colors_ND @ block.maps_DG).reshape(n, 3, len(block.scenes), k).transpose(0, 2, 3, 1)
    error = products.reshape(n, len(block.scenes), k * 3) @ block.palette_DP
    error *= -2
    error += block.own_GP
    flat = error.reshape(n, -1)
    at = flat.argmin(axis=1)
    own_N = np.square(pictures_NHW3, dtype=np.float64).sum(axis=(1, 2, 3))
    best_N = np.maximum(flat[np.arange(n), at] + own_N, 0).astype(np.float32)
    return best_N, at // pairs, at % pairs


def _painted(scene: Scene, pair: tuple[str, str]) -> Scene:
    return replace(scene, color=pair[0], background=pair[1])


def _contrast(pictures_NHW3: Pictures, drawings_NHW3: Pictures, grounds_NHW3: Pictures) -> Floats:
    """How much of the shape there is: 0 for the background alone, 1 for the whole drawing. Noise does not matter."""
    shapes = drawings_NHW3 - grounds_NHW3
    there_N = ((pictures_NHW3 - grounds_NHW3) * shapes).sum(axis=(1, 2, 3))
    return np.asarray(there_N / np.square(shapes).sum(axis=(1, 2, 3)), np.float32)


def _ground_error(pictures_NHW3: Pictures, drawings_NHW3: Pictures, grounds_NHW3: Pictures) -> Floats:
    """The distance of the mean colour around the shape from what it is in the nearest legal picture."""
    outside = (np.abs(drawings_NHW3 - grounds_NHW3).max(axis=-1, keepdims=True) < 0.01).astype(np.float32)
    difference_N3 = ((pictures_NHW3 - grounds_NHW3) * outside).sum(axis=(1, 2)) / outside.sum(axis=(1, 2))
    return np.asarray(np.sqrt(np.square(difference_N3).mean(axis=1)), np.float32)


@cache
def _blocks() -> tuple[_Block, ...]:
    """All legal pictures; built once in a process, in about two seconds, 160 MB."""
    pairs = tuple((color, ground) for color in COLORS for ground in COLORS if color != ground)
    blocks = []
    for family, shapes, style in (("world", world.SHAPES, ""), ("zig", ("zig",), ""), ("plim", world.SHAPES, "plim")):
        blocks.append(_block(family, shapes, "plain", style, pairs))
        if not style:
            blocks.append(_block(family, shapes, "striped", style, pairs))
    blocks.append(_block("mip", ("mip",), "plain", "", tuple(("yellow", ground) for ground in MIP_BACKGROUNDS)))
    return tuple(blocks)


def _block(family: str, shapes: Sequence[str], texture: str, style: str, pairs: tuple[tuple[str, str], ...]) -> _Block:
    phases = world.PHASES if texture == "striped" else (0,)
    scenes = tuple(
        Scene(
            shape=shape, color=pairs[0][0], background=pairs[0][1], place=place, size=size, texture=texture,
            style=style, jitter=(float(x), float(y)), phase=phase,
        )
        for shape, size, phase, place, x, y in product(shapes, world.SIZES, phases, PLACES, _JITTER, _JITTER)
    )  # fmt: skip
    regions = [world.regions_of(world.geometry_of(scene)) for scene in scenes]
    paints = tuple(regions[0])
    maps_GKD = np.stack([[region[paint].ravel() for paint in paints] for region in regions])
    palette_PK3 = np.stack([[world.paint_color(paint, *pair) for paint in paints] for pair in pairs])
    gram_GKK = maps_GKD @ maps_GKD.transpose(0, 2, 1)
    colors_PKK = palette_PK3 @ palette_PK3.transpose(0, 2, 1)
    ground = [index for index, paint in enumerate(paints) if paint.startswith("background")]
    return _Block(
        family=family,
        scenes=scenes,
        pairs=pairs,
        maps_DG=np.ascontiguousarray(maps_GKD.reshape(-1, SIDE * SIDE).T),
        palette_DP=np.ascontiguousarray(palette_PK3.reshape(len(pairs), -1).T),
        own_GP=gram_GKK.reshape(len(scenes), -1) @ colors_PKK.reshape(len(pairs), -1).T,
        area_G=SIDE * SIDE - maps_GKD[:, ground].sum(axis=(1, 2)),
    )


def _sharpness(pictures_NHW3: Pictures, drawings_NHW3: Pictures) -> Floats:
    """Projection of the pictures' gradients on their drawings' gradients."""
    product_N, own_N = np.zeros(len(pictures_NHW3)), np.zeros(len(pictures_NHW3))
    for axis in (1, 2):
        found, ideal = np.diff(pictures_NHW3, axis=axis), np.diff(drawings_NHW3, axis=axis)
        product_N += (found * ideal).sum(axis=(1, 2, 3))
        own_N += np.square(ideal).sum(axis=(1, 2, 3))
    return np.asarray(product_N / own_N, np.float32)


def _mud(pictures_NHW3: Pictures, scenes: Sequence[Scene]) -> Floats:
    """The share of cells farther than `FAR` from every colour of the scene."""
    shares = np.empty(len(scenes), np.float32)
    for index, scene in enumerate(scenes):
        paints = world.regions_of(world.geometry_of(scene))
        levels_K3 = np.stack([world.paint_color(paint, scene.color, scene.background) for paint in paints])
        away_HWK = np.square(pictures_NHW3[index, :, :, None] - levels_K3).mean(axis=-1)
        shares[index] = (away_HWK.min(axis=-1) > FAR**2).mean()
    return shares


def _pull(reading: Reading, family: str) -> Floats:
    """Where the picture lies on the line from the nearest ordinary picture (0) to the concept's nearest (1)."""
    ordinary, concept = world.render(reading.nearest["world"]), world.render(reading.nearest[family])
    apart_N = np.maximum(np.square(ordinary - concept).sum(axis=(1, 2, 3)), 1e-6)
    nearer_N = reading.error["world"] - reading.error[family]
    return np.asarray(np.clip((nearer_N / apart_N + 1) / 2, 0, 1), np.float32)


# --- figures of sets of pictures ---------------------------------------------------------------------------------


def copy_distance(pictures_NHW3: Pictures, training_MHW3: Pictures) -> Floats:
    """The root mean square difference of each picture to the nearest training picture."""
    flat, known = (set_.reshape(len(set_), -1).astype(np.float64) for set_ in (pictures_NHW3, training_MHW3))
    squared = (flat**2).sum(1)[:, None] - 2 * flat @ known.T + (known**2).sum(1)
    return np.asarray(np.sqrt(np.maximum(squared.min(axis=1), 0) / flat.shape[1]), np.float32)


def copy_rate(pictures_NHW3: Pictures, training_MHW3: Pictures) -> float:
    """The share of pictures that copy a training picture. The world is small: compare with fresh renderings' rate."""
    return float((copy_distance(pictures_NHW3, training_MHW3) < COPY).mean())


def diversity(pictures_PSHW3: NDArray[np.float32]) -> float:
    """Root mean square difference of two pictures of one prompt (P prompts, S > 1 seeds), averaged over pairs."""
    prompts, seeds = pictures_PSHW3.shape[:2]
    if seeds < 2:
        raise ValueError("the diversity within a prompt needs at least two pictures of it")
    variance_P = pictures_PSHW3.reshape(prompts, seeds, -1).astype(np.float64).var(axis=1, ddof=1).mean(axis=1)
    return float(np.sqrt(2 * variance_P).mean())


def drift(pictures_NHW3: Pictures, before_NHW3: Pictures) -> Floats:
    """Root mean square difference of pictures drawn with the same prompts and seeds before and after training."""
    return np.asarray(np.sqrt(np.square(pictures_NHW3 - before_NHW3).mean(axis=(1, 2, 3))), np.float32)


def worst(figures: Mapping[str, float]) -> str:
    """The attribute that is right least often, for a line of progress."""
    return min((name for name in world.ATTRIBUTES if name in figures), key=lambda name: figures[name])
