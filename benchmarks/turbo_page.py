"""Tables, curves and picture grids of the experiment, with intervals. Part of `turbo.py`.

Arms are compared where they have learnt the concept equally well: at the first step at which the share of pictures of
the concept that are as told reaches `MATCHED`, between two judged steps on a straight line. As told, and not clean: an
arm that has lost its few steps draws no clean picture at all, and that is to be seen beside it. Every drawing seed and
prompt is the same in all arms, so differences are paired; intervals are bootstraps over training seeds and prompts.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from common import table, write_docs
from turbo_arms import ARMS, BY_NAME, Arm, Places

from detour import files

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    Runs = Mapping[str, Mapping[tuple[str, int], "Curve"]]
    """By arm, by concept and training seed."""

MATCHED = 0.7
"""Wanted is 0.9; not all arms reach it in 1200 steps."""
DRAWS = 2000
"""Bootstrap draws."""


@dataclass(frozen=True)
class Curve:
    """What was measured of a run, at each judged step."""

    steps: NDArray[np.float64]
    concept: NDArray[np.float64]
    drift_SPN: NDArray[np.float64]
    """Step, drawing seed, prompt."""
    right_SPN: NDArray[np.float64]
    points: Sequence[dict[str, Any]]

    @classmethod
    def read(cls, path: Path) -> Curve:
        """From a file that `turbo.py` wrote."""
        points = json.loads(path.read_text(encoding="utf-8"))["points"]
        return cls(
            steps=np.array([p["step"] for p in points], float),
            concept=np.array([p["concept"]["as_told"] for p in points], float),
            drift_SPN=np.array([p["drift"] for p in points], float),
            right_SPN=np.array([p["other_strict"] for p in points], float),
            points=points,
        )

    def matched(self, score: float = MATCHED) -> float | None:
        """The index, between two points, at which the concept is first drawn that well; None if it never is."""
        for index in range(1, len(self.steps)):
            before, now = self.concept[index - 1], self.concept[index]
            if now >= score:
                return index - 1 + (0.0 if now == before else max(0.0, (score - before) / (now - before)))
        return None

    def at(self, index: float, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Values between two points."""
        low = min(int(index), len(values) - 1)
        high = min(low + 1, len(values) - 1)
        return values[low] + (index - low) * (values[high] - values[low])

    def figure(self, index: float, *keys: str) -> float:
        """A figure of the judge between two points."""
        low = min(int(index), len(self.points) - 1)
        share, values = index - low, []
        for point in self.points[low : low + 2] if share else [self.points[low]]:
            value: Any = point
            for key in keys:
                value = value[key]
            values.append(float(value))
        return values[0] + share * (values[-1] - values[0])


def load(places: Places) -> Runs:
    """All figures there are."""
    found: dict[str, dict[tuple[str, int], Curve]] = defaultdict(dict)
    for path in sorted((places.work / "figures").glob("*.json")):
        facts = json.loads(path.read_text(encoding="utf-8"))
        if facts["arm"] in BY_NAME:
            found[facts["arm"]][facts["concept"], facts["seed"]] = Curve.read(path)
    return found


def interval(
    curves: Mapping[tuple[str, int], NDArray[np.float64]], rival: Mapping[tuple[str, int], NDArray[np.float64]] | None
) -> tuple[float, float, float]:
    """Mean with a 95 % interval of per-picture values (drawing seed, prompt), or of their ratio to a rival's.

    Training seeds are drawn again within each concept, prompts for all arms alike.
    """
    keys = sorted(curves if rival is None else set(curves) & set(rival))
    generator = np.random.Generator(np.random.PCG64(0))
    concepts = sorted({concept for concept, _ in keys})

    def value(chosen: Sequence[tuple[str, int]], prompts: NDArray[np.intp]) -> float:
        own = np.mean([curves[key][:, prompts].mean() for key in chosen])
        return float(own if rival is None else own / np.mean([rival[key][:, prompts].mean() for key in chosen]))

    everything = np.arange(next(iter(curves.values())).shape[1])
    draws = []
    for _ in range(DRAWS):
        chosen = []
        for concept in concepts:
            of_concept = [key for key in keys if key[0] == concept]
            chosen += [of_concept[i] for i in generator.integers(len(of_concept), size=len(of_concept))]
        draws.append(value(chosen, generator.integers(len(everything), size=len(everything))))
    low, high = np.quantile(draws, [0.025, 0.975])
    return value(keys, everything), float(low), float(high)


def matched_table(runs: Runs, concept: str | None = None) -> str:
    """Arms at equal concept score."""
    at = {arm: _matched(curves, concept) for arm, curves in runs.items()}
    rows = []
    for arm in _arms(runs):
        curves = {key: curve for key, curve in runs[arm.name].items() if concept in (None, key[0])}
        reached = at[arm.name]
        if not curves or arm.control:
            continue
        best = max(float(curve.concept.max()) for curve in curves.values())
        if not reached:
            rows.append([arm.name, f"0 of {len(curves)} (best {best:.2f})", *["-"] * 9])
            continue
        drift = {key: curves[key].at(index, curves[key].drift_SPN) for key, index in reached.items()}
        cells = [arm.name, f"{len(reached)} of {len(curves)}"]
        cells.append(
            f"{np.mean([np.interp(i, range(len(curves[k].steps)), curves[k].steps) for k, i in reached.items()]):.0f}"
        )
        cells.append("{:.3f} ({:.3f} to {:.3f})".format(*interval(drift, None)))
        for rival in ("none", "adapter"):
            theirs = {k: runs[rival][k].at(i, runs[rival][k].drift_SPN) for k, i in at.get(rival, {}).items()}
            shared = set(theirs) & set(drift)
            same = arm.name == rival or not shared
            cells.append("-" if same else "{:.2f} ({:.2f} to {:.2f})".format(*interval(drift, theirs)))
        for keys in (("concept", "grain"), ("other", "as_told"), ("other", "grain"), ("other", "strict"), ("leak",)):
            cells.append(f"{np.mean([curves[k].figure(i, *keys) for k, i in reached.items()]):.2f}")
        rows.append(cells)
    head = ["arm", "reached", "at step", "drift (95 %)", "to none", "to adapter", "concept's grain"]
    head += ["others as told", "others' grain", "others right", "leak"]
    return table(head, rows)


def last_table(runs: Runs) -> str:
    """Arms at the last step, far past the point where the concept is learnt."""
    rows = []
    for arm in _arms(runs):
        curves = runs[arm.name]
        drift = {key: curve.drift_SPN[-1] for key, curve in curves.items()}
        end = {key: len(curve.steps) - 1 for key, curve in curves.items()}
        cells = [arm.name, arm.what, str(len(curves))]
        for keys in (
            ("concept", "as_told"),
            ("concept", "grain"),
            ("other", "as_told"),
            ("other", "grain"),
            ("other", "strict"),
            ("other_many", "grain"),
            ("other_many", "strict"),
            ("leak",),
        ):
            cells.append(f"{np.mean([curve.figure(end[key], *keys) for key, curve in curves.items()]):.2f}")
        cells.append("{:.3f} ({:.3f} to {:.3f})".format(*interval(drift, None)))
        rows.append(cells)
    head = ["arm", "what", "runs", "concept as told", "concept's grain", "others as told", "others' grain"]
    head += ["others right", "grain, 32 steps", "right, 32 steps", "leak", "drift (95 %)"]
    return table(head, rows)


def _matched(curves: Mapping[tuple[str, int], Curve], concept: str | None) -> dict[tuple[str, int], float]:
    found = {key: curve.matched() for key, curve in curves.items() if concept in (None, key[0])}
    return {key: index for key, index in found.items() if index is not None}


def _arms(runs: Runs) -> list[Arm]:
    return [arm for arm in ARMS if arm.name in runs]


def draw_curves(runs: Runs, out: Path) -> None:
    """What is lost against what is learnt: a line for each arm, averaged over concepts and training seeds."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    for index, arm in enumerate(arm for arm in _arms(runs) if not arm.control):
        curves = list(runs[arm.name].values())
        steps = curves[0].steps
        color = mpl.colormaps["tab20"](index % 20)
        concept, drift = (
            np.mean(v, axis=0) for v in ([c.concept for c in curves], [c.drift_SPN.mean((1, 2)) for c in curves])
        )
        others = np.mean([c.right_SPN.mean((1, 2)) for c in curves], axis=0)
        left.plot(drift, concept, "o-", ms=3, color=color, label=arm.name)
        middle.plot(np.maximum(steps, 20), others, "o-", ms=3, color=color)
        right.plot(np.maximum(steps, 20), drift, "o-", ms=3, color=color)
    left.set(xlabel="drift of other prompts (8 steps)", ylabel="concept as told", title="learnt against lost")
    left.axhline(MATCHED, color="grey", lw=0.8, ls="--")
    left.legend(fontsize=7)
    middle.set(xlabel="training steps", ylabel="other prompts right", xscale="log", title="other prompts, 8 steps")
    right.set(xlabel="training steps", ylabel="drift", xscale="log", title="drift of other prompts")
    figure.savefig(out, dpi=80)
    pyplot.close(figure)


def report(places: Places, docs: Path) -> None:
    """Write the tables into the page, and the pictures beside it."""
    runs = load(places)
    write_docs(docs, "matched", matched_table(runs))
    write_docs(docs, "last", last_table(runs))
    for concept in sorted({concept for curves in runs.values() for concept, _ in curves}):
        write_docs(docs, f"matched {concept}", matched_table(runs, concept))
    files.make_folder(docs.parent / "img")
    draw_curves(runs, docs.parent / "img" / "turbo-curves.png")
