"""The teacher gate: before training with a teacher that is told more, does being told more help it?

What is trained comes no closer to the training pictures than its teacher's own drawings do. So a few pictures are drawn
by the untouched model in the sampler's few steps, from the same noise once told the caption alone and once told what
the teacher is told, and compared with the training pictures:

- Gain: how much closer the second drawing is, in latents, as a share of the first one's distance. It must be above
  twice its standard error over pictures.
- Colour: the mean colour of the second drawing less the picture's. It must not differ by more than .05 (13 of 255
  levels) and twice its standard error in any channel.
- Frame: does the picture fit the drawing better enlarged, reduced or moved? The correlation of the two at 16 x 16
  positions must not rise by more than .1 and twice its standard error, to above .5, under one and the same change.
- Context gap: sum over the grid of t^2 |v_0(told more) - v_0(caption)|^2 on the way of the first drawing: the whole
  signal at the start of training.

The thresholds are conventions, not findings: 4 pictures find what is plain to see in them, and of teachers that do
nothing at all one in fourteen passes for a gain (twice the error, with 3 degrees of freedom).

Shapes: B batch (1 here), C channels, H W latent height and width (of pixels: pictures'; of video: C F H W).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from math import fsum, sqrt
from typing import TYPE_CHECKING

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from detour.nn.rng import generator
from detour.seeds import seed_for
from detour.train.teachers import Asked

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from detour.archs.base import Condition
    from detour.config.preserve import TermConfig
    from detour.data.loader import Batch
    from detour.train.preserve import Objective

PICTURES, SEEDS = 4, 2
"""Of the first training pictures, and drawings of each: 3 * 8 forward passes a step of the sampler in all."""
COLOUR, FRAME, FIT = 0.05, 0.1, 0.5
"""Shifts that are told from none, and the correlation of what fits; see the top of the file."""
_GRID = 16  # positions at which frames are compared
_SIDE, _GAP = 192, 4  # pixels of a picture in the comparison, and between two
_COLUMNS = ("training picture", "told the caption", "told more")


@dataclass(frozen=True, slots=True)
class Figure:
    """A mean over drawings with its standard error."""

    mean: float
    error: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Figure:
        """With one value, nothing is known of the error: it counts as that value."""
        mean = fsum(values) / len(values)
        if len(values) == 1:
            return cls(mean, abs(mean))
        spread = fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
        return cls(mean, sqrt(spread / len(values)))

    def beyond(self, least: float) -> bool:
        """Is it above `least`, and more than twice its error?"""
        return self.mean > least and self.mean > 2 * self.error


@dataclass(frozen=True, slots=True)
class Drawn:
    """A training picture and two drawings of it, in pixels of 0 to 1 (3, H, W), with what was found."""

    picture: Tensor
    plain: Tensor
    told: Tensor
    gain: float
    gap: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the gate found."""

    gain: Figure
    gap: float
    colour: tuple[Figure, Figure, Figure]
    """Of red, green and blue."""
    frame: str
    """The change of frame that fits better; empty where none does."""
    reasons: list[str]
    """Why this teacher should not teach; empty where it may."""
    page: Image.Image
    """The drawings beside the pictures."""


@dataclass
class TeacherGate:
    """Draws and compares."""

    objective: Objective
    term: TermConfig
    """The one with the teacher."""
    pictures: Sequence[Batch]
    """Of one picture each."""
    pixels: Callable[[Tensor], Tensor]
    """Decodes latents to -1 to 1."""

    def examine(self) -> Verdict:
        """Draw, compare, judge. Nothing of the model changes."""
        pairs = product(self.pictures, range(SEEDS))
        return judge([self._draw(batch, number) for batch, number in pairs])

    @torch.no_grad()
    def _draw(self, batch: Batch, number: int) -> Drawn:
        objective, sampler = self.objective, self.objective.sampler
        z0 = batch.latents_BCHW.float()
        place = ("teacher gate", objective.config.seed, batch.names[0], number)
        noise = torch.randn(z0.shape, generator=generator(*place)).to(z0.device)
        gaps: list[float] = []

        def plain(state: Tensor, t_B: Tensor, conditions: Sequence[Condition]) -> Tensor:
            asked = Asked(state, t_B, list(conditions), batch.names, z0)
            said = objective.teachers.untouched(asked)
            more = objective.teachers.untouched(objective.teachers.of_teacher(self.term, asked))
            gaps.append(float(t_B[0]) ** 2 * float((more - said).square().mean()))
            return said

        def told(state: Tensor, t_B: Tensor, conditions: Sequence[Condition]) -> Tensor:
            asked = Asked(state, t_B, list(conditions), batch.names, z0)
            return objective.teachers.untouched(objective.teachers.of_teacher(self.term, asked))

        with objective.teachers.deployed():
            drawn = [
                _last(sampler.states(predict, noise, batch.conditions, seed_for(*place))) for predict in (plain, told)
            ]
        away, near = (float((latents - z0).square().mean().sqrt()) for latents in drawn)
        picture, first, second = (self._seen(latents) for latents in (z0, *drawn))
        return Drawn(picture, first, second, gain=(away - near) / away, gap=fsum(gaps))

    def _seen(self, latents: Tensor) -> Tensor:
        pixels = self.pixels(latents)[0].float().cpu()
        pixels_3HW = pixels if pixels.ndim == 3 else pixels[:, 0]  # of a clip, the first frame
        return (pixels_3HW * 0.5 + 0.5).clamp(0, 1)


def _last(states: Iterator[tuple[float, Tensor]]) -> Tensor:
    *_, (_, latents) = states
    return latents


def judge(drawn: Sequence[Drawn]) -> Verdict:
    """What the drawings say of the teacher."""
    gain = _over_pictures([pair.gain for pair in drawn])
    shifts = torch.stack([pair.told.mean((1, 2)) - pair.picture.mean((1, 2)) for pair in drawn])
    red, green, blue = (_over_pictures(shifts[:, channel].tolist()) for channel in range(3))
    frame, better = _frame(drawn)
    reasons: list[str] = []
    if not gain.beyond(0.0):
        reasons.append(
            f"being told more brings its drawings no closer to the training pictures: by {gain.mean:+.1%} of the "
            f"distance, with a standard error of {gain.error:.1%}"
        )
    for name, shift in (("red", red), ("green", green), ("blue", blue)):
        if Figure(abs(shift.mean), shift.error).beyond(COLOUR):
            direction = "more" if shift.mean > 0 else "less"
            reasons.append(f"its drawings are {direction} {name} than the pictures: {shift.mean:+.2f} of 0 to 1")
    if frame:
        reasons.append(f"its drawings are {frame}: that fits the pictures better by {better.mean:.2f} of correlation")
    gap = fsum(pair.gap for pair in drawn) / len(drawn)
    return Verdict(gain, gap, (red, green, blue), frame, reasons, _page(drawn))


def _over_pictures(values: Sequence[float]) -> Figure:
    """The drawings of one picture are alike, so that the error is that over pictures; of one picture, over seeds."""
    means = [fsum(values[at : at + SEEDS]) / SEEDS for at in range(0, len(values), SEEDS)]
    return Figure.of(means if len(means) > 1 else values)


# --- the frame --------------------------------------------------------------------------------------------------------

_WHOLE = (0.0, 0.0, 1.0, 1.0)
_FRAMES = {
    "enlarged by a tenth": ((0.05, 0.05, 0.95, 0.95), _WHOLE),
    "enlarged by a quarter": ((0.1, 0.1, 0.9, 0.9), _WHOLE),
    "reduced by a tenth": (_WHOLE, (0.05, 0.05, 0.95, 0.95)),
    "reduced by a quarter": (_WHOLE, (0.1, 0.1, 0.9, 0.9)),
    "moved to the left": ((0.125, 0.0, 1.0, 1.0), (0.0, 0.0, 0.875, 1.0)),
    "moved to the right": ((0.0, 0.0, 0.875, 1.0), (0.125, 0.0, 1.0, 1.0)),
    "moved up": ((0.0, 0.125, 1.0, 1.0), (0.0, 0.0, 1.0, 0.875)),
    "moved down": ((0.0, 0.0, 1.0, 0.875), (0.0, 0.125, 1.0, 1.0)),
}
"""Which part of the picture would then fill which part of the drawing: left, top, right, bottom."""


def _frame(drawn: Sequence[Drawn]) -> tuple[str, Figure]:
    """The change of frame under which drawings fit their pictures best, and by how much; empty where it is none."""
    as_they_are = [_likeness(pair, _WHOLE, _WHOLE) for pair in drawn]
    pairs = list(zip(drawn, as_they_are, strict=True))
    rises = {
        name: _over_pictures([_likeness(pair, *boxes) - before for pair, before in pairs])
        for name, boxes in _FRAMES.items()
    }
    name, best = max(rises.items(), key=lambda rise: rise[1].mean)
    fits = fsum(as_they_are) / len(as_they_are) + best.mean > FIT
    return (name, best) if fits and best.beyond(FRAME) else ("", best)


def _likeness(pair: Drawn, of_picture: Sequence[float], of_drawing: Sequence[float]) -> float:
    """Correlation of a part of the picture with a part of the drawing, over positions and colours."""
    a, b = (_small(_part(pixels, box)) for pixels, box in ((pair.picture, of_picture), (pair.told, of_drawing)))
    a, b = a - a.mean((1, 2), keepdim=True), b - b.mean((1, 2), keepdim=True)
    return float((a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-6))


def _part(pixels_3HW: Tensor, box: Sequence[float]) -> Tensor:
    height, width = pixels_3HW.shape[-2:]
    left, top, right, bottom = (round(share * side) for share, side in zip(box, (width, height) * 2, strict=True))
    return pixels_3HW[:, top:bottom, left:right]


def _small(pixels_3HW: Tensor) -> Tensor:
    return F.interpolate(pixels_3HW[None], (_GRID, _GRID), mode="bilinear", antialias=True, align_corners=False)[0]


# --- to look at -------------------------------------------------------------------------------------------------------


def _page(drawn: Sequence[Drawn]) -> Image.Image:
    """A row for each picture (its first drawings), under what the columns are."""
    rows, head, pitch = drawn[::SEEDS], 16, _SIDE + _GAP
    page = Image.new("RGB", (pitch * len(_COLUMNS) - _GAP, head + pitch * len(rows) - _GAP), "white")
    pen = ImageDraw.Draw(page)
    for column, title in enumerate(_COLUMNS):
        pen.text((column * pitch + 4, 2), title, fill="black")
    for row, pair in enumerate(rows):
        for column, pixels in enumerate((pair.picture, pair.plain, pair.told)):
            page.paste(_thumbnail(pixels), (column * pitch, head + row * pitch))
    return page


def _thumbnail(pixels_3HW: Tensor) -> Image.Image:
    picture = Image.fromarray((pixels_3HW.permute(1, 2, 0) * 255).round().byte().numpy())
    scale = _SIDE / max(picture.size)
    return picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))
