"""Curves of a run as SVG: drawn here, so that they show without any script, in print, and in a telephone's preview.

Of many steps each chart keeps the lowest and the highest of every small stretch, and the first and the last of all, so
that no spike is lost and every point shown is a step that was.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from detour.report.history import History

BINS = 300
"""Stretches of a curve: more than a chart has pixels on a telephone, half as many as it has on a screen."""
MEMORY = 0.98
"""Share of the mean that a step leaves as it is, as in the terminal: the mean is of about 50 steps."""
FRAME = {"width": 480, "height": 220, "left": 66, "right": 456, "top": 12, "bottom": 192}
"""The view box of a chart, and the axes in it."""
FAR = 4.0
"""A chart ends below values so many times as high as 99 of 100 are; it says so."""

Value = float | None


@dataclass(frozen=True)
class Curve:
    """Values over steps; None where something was not finite."""

    name: str
    steps: list[int]
    values: list[Value]
    style: str = "line"
    """`line`, `faint`, or `dots` where there are few."""

    @property
    def known(self) -> list[float]:
        """The values that are."""
        return [value for value in self.values if value is not None]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Curves over the same steps."""

    key: str
    title: str
    curves: list[Curve]
    level: tuple[str, float] | None = None
    """A line across, with its name."""
    from_zero: bool = False
    """The axis begins at zero."""


@dataclass(frozen=True)
class Drawing:
    """A chart as the template draws it, in units of its view box."""

    chart: Chart
    lines: list[tuple[Curve, str, str]]
    """The `d` of each curve's line, and of its dots."""
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    level: float | None = None
    """Where the line across lies, if it does in the chart."""
    note: str = ""
    domain: tuple[int, int] = field(default=(0, 1))


def charts(history: History, alarm: float | None) -> list[Chart]:
    """The curves of a run; those of which nothing is known are left out. `alarm` is that of the drift."""
    steps = [record["step"] for record in history.steps]
    drifts = history.drifts

    def of(key: str, scale: float = 1.0) -> list[Value]:
        return [None if record[key] is None else record[key] / scale for record in history.steps]

    def one(key: str, title: str, curve: str, values: list[Value]) -> Chart:
        return Chart(key=key, title=title, curves=[Curve(curve, steps, values)], from_zero=True)

    loss = of("loss")
    found = [
        Chart(
            key="loss",
            title="Loss",
            curves=[Curve("each step", steps, loss, "faint"), Curve("mean of about 50 steps", steps, smooth(loss))],
        ),
        Chart(key="validation", title="Validation loss", curves=_validation(history)),
        one("lr", "Learning rate", "learning rate", of("lr")),
        one("grad_norm", "Gradient norm", "gradient norm", of("grad_norm")),
        Chart(
            key="drift",
            title="Drift from the untouched model",
            curves=[Curve("drift", [r["step"] for r in drifts], [r["drift"] for r in drifts], "dots")],
            level=None if alarm is None else ("alarm", alarm),
            from_zero=True,
        ),
        one("memory", "Memory, GiB", "most so far", of("memory_bytes", 2**30)),
        one("seconds", "Seconds per step", "seconds", of("seconds")),
    ]
    return [shown for chart in found if (shown := _thinned(chart)).curves]


def smooth(values: Sequence[Value]) -> list[Value]:
    """An exponential mean that starts at its first value's weight instead of zero; what is not finite is left out."""
    total = weight = 0.0
    means: list[Value] = []
    for value in values:
        if value is not None:
            total = MEMORY * total + (1 - MEMORY) * value
            weight = MEMORY * weight + (1 - MEMORY)
        means.append(total / weight if weight else None)
    return means


def thin(curve: Curve) -> Curve:
    """At most about two points of each of `BINS` stretches: its lowest and its highest, and the ends of the curve."""
    count = len(curve.steps)
    if count <= 2 * BINS:
        return curve
    kept = {0, count - 1}
    for number in range(BINS):
        stretch = range(number * count // BINS, (number + 1) * count // BINS)
        known = [(value, index) for index in stretch if (value := curve.values[index]) is not None]
        kept |= {min(known)[1], max(known)[1]} if known else {stretch[0]}  # a gap stays one
    places = sorted(kept)
    return Curve(curve.name, [curve.steps[i] for i in places], [curve.values[i] for i in places], curve.style)


def draw(chart: Chart) -> Drawing:
    """Lay a chart out."""
    steps = [step for curve in chart.curves for step in curve.steps]
    first, last = min(steps), max(steps)
    low, high, note = _span(chart)

    def x(step: float) -> float:
        return FRAME["left"] + (step - first) / max(last - first, 1) * (FRAME["right"] - FRAME["left"])

    def y(value: float) -> float:
        return FRAME["top"] + (high - value) / (high - low) * (FRAME["bottom"] - FRAME["top"])

    level = chart.level[1] if chart.level is not None and low <= chart.level[1] <= high else None
    laid = [[(x(s), None if v is None else y(min(v, high))) for s, v in _points(curve)] for curve in chart.curves]
    return Drawing(
        chart=chart,
        lines=[(curve, *_line(curve, points)) for curve, points in zip(chart.curves, laid, strict=True)],
        x_ticks=[(x(tick), f"{tick:g}") for tick in ticks(first, last, 5) if tick == int(tick)],
        y_ticks=[(y(tick), f"{tick:.6g}") for tick in ticks(low, high, 6)],
        level=None if level is None else y(level),
        note=note,
        domain=(first, last),
    )


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers from `low` to `high`: about so many."""
    if not high > low:
        return [low]
    rough = (high - low) / about
    unit = 10.0 ** math.floor(math.log10(rough))
    stride = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * 0.999)
    start, end = math.ceil(low / stride - 1e-9), math.floor(high / stride + 1e-9)
    return [number * stride for number in range(start, end + 1)]


def _thinned(chart: Chart) -> Chart:
    curves = [thin(curve) for curve in chart.curves if curve.known]
    return replace(chart, curves=curves)


def _validation(history: History) -> list[Curve]:
    """The mean, and the loss at each time that every validation has."""
    records = history.validations
    steps = [record["step"] for record in records]
    curves = [Curve("mean", steps, [record["loss"] for record in records], "dots")]
    times = [time for time in (records[-1]["by_time"] if records else {}) if all(time in r["by_time"] for r in records)]
    if len(times) > 1:
        curves += [Curve(f"at t = {time}", steps, [r["by_time"][time] for r in records], "faint") for time in times]
    return curves


def _span(chart: Chart) -> tuple[float, float, str]:
    """Lowest and highest value of the axis, and what to say where something lies above it."""
    values = sorted(value for curve in chart.curves for value in curve.known)
    low, top = (0.0 if chart.from_zero and values[0] >= 0 else values[0]), values[-1]
    usual, note = values[int(0.99 * (len(values) - 1))], ""
    if top - low > FAR * (usual - low) > 0:
        step = next(s for curve in chart.curves for s, v in _points(curve) if v == top)
        note = f"The highest, {top:.4g} at step {step}, lies above the chart."
        top = low + 1.5 * (usual - low)
    if chart.level is not None and top < chart.level[1] <= FAR * top:
        top = chart.level[1]  # the line belongs in the picture, unless it would flatten the curve
    if top <= low:  # all values are one
        room = abs(low) or 1.0
        return low - (0.0 if chart.from_zero else room / 2), low + room / 2, note
    room = (top - low) * 0.05
    return low if chart.from_zero else low - room, top + room, note


def _points(curve: Curve) -> Iterator[tuple[int, Value]]:
    return zip(curve.steps, curve.values, strict=True)


def _line(curve: Curve, points: Sequence[tuple[float, Value]]) -> tuple[str, str]:
    """The `d` of a line that is broken where a value is missing, and of its dots: all, or those that stand alone."""
    known = [None, *(y for _, y in points), None]
    line, dots = [], []
    for index, (x, y) in enumerate(points, 1):
        if y is None:
            continue
        line.append(f"{'M' if known[index - 1] is None else 'L'}{x:.1f} {y:.1f}")
        if curve.style == "dots" or known[index - 1] is known[index + 1] is None:
            dots.append(f"M{x:.1f} {y:.1f}h0")
    return "".join(line), "".join(dots)
