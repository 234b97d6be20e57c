"""Which way of training keeps the few steps of a distilled model, at the same concept learnt?

    python benchmarks/turbo.py prepare --work work/turbo
    python benchmarks/turbo.py run --work work/turbo [--arm none adapter] [--concept zig] [--minutes 60]
    python benchmarks/turbo.py report --work work/turbo --docs docs/turbo.md

Every arm trains through the engine, as `detour run` would (`turbo_arms`), on the trained miniature turbo. Its LoRA is
judged at many steps on prompts of the concept that no picture shows, and on ordinary prompts (`turbo_measure`). Both go
on where they were stopped. Two of these may run side by side on one folder: `--part 0/2` and `--part 1/2`.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from turbo_arms import ARMS, BY_NAME, FULL, QUICK, Arm, Places, job_for
from turbo_measure import Judge, Way

from detour import files, nano
from detour.config.job import Job
from detour.nano import concepts, world
from detour.nn.quiet import quiet_imports
from detour.train.control import Control
from detour.train.session import run_job

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

LOG = logging.getLogger("turbo")
CONCEPTS = ("zig", "plim", "mip")
TRAINING_SEEDS = (1, 2, 3)


class _Silent:
    """A sink that shows nothing; each run keeps its own `events.jsonl`."""

    def emit(self, event: object) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def prepare(places: Places) -> None:
    """Write the models, the adapter and the concept sets."""
    if not places.turbo.is_dir():
        written = nano.write(places.turbo)
        files.write_bytes(places.adapter, written["training adapter"].read_bytes())
    if not places.base.is_dir():
        nano.write(places.base, "zimage:base")
    for concept in CONCEPTS:
        concepts.write_dataset(places.pictures(concept), concept)


def planned(args: argparse.Namespace) -> Iterator[tuple[str, Arm, int]]:
    """The runs that were asked for, in the order of use: first one seed of everything."""
    arms = [BY_NAME[name] for name in args.arm] if args.arm else list(ARMS)
    for seed, concept, arm in product(args.seed, args.concept, arms):
        yield concept, arm, seed


def run(places: Places, args: argparse.Namespace) -> None:
    """Train and judge what is not there yet."""
    stop_at = time.monotonic() + 60 * args.minutes
    mine, parts = (int(part) for part in args.part.split("/"))
    judges = {concept: Judge(places.turbo, concept, places.scale) for concept in args.concept}
    controls = [prompt.text for prompt in world.prompts(24, seed=11)]  # not those that are judged
    for index, (concept, arm, seed) in enumerate(planned(args)):
        if index % parts != mine or places.figures(concept, arm.name, seed).is_file():
            continue
        if time.monotonic() > stop_at:
            LOG.info("time is over; the same command goes on")
            return
        began = time.monotonic()
        job = Job.model_validate(job_for(places, concept, arm, seed, controls))
        result = run_job(job, Control(), _Silent())[0]
        trained = time.monotonic()
        points = judged(places, judges[concept], concept, arm, seed)
        figures = {
            "concept": concept, "arm": arm.name, "seed": seed, "steps": result.step, "points": points,
            "seconds": {"training": round(trained - began, 1), "judging": round(time.monotonic() - trained, 1)},
        }  # fmt: skip
        files.write_json(places.figures(concept, arm.name, seed), figures)
        LOG.info("%s %s %d: %s", concept, arm.name, seed, line(points))


def judged(places: Places, judge: Judge, concept: str, arm: Arm, seed: int) -> list[dict[str, object]]:
    """The figures of a run at each point; step 0 is the untouched model."""
    found: list[dict[str, object]] = []
    patch = ((places.adapter, -arm.patch),) if arm.patch else ()
    for step in (0, *places.scale.points):
        loras = () if step == 0 else ((places.lora(concept, arm.name, seed, step), 1.0), *patch)
        many = step in (0, places.scale.steps)
        found.append({"step": step} | judge.figures(Way(loras=loras), many=many))
    return found


def line(points: Sequence[dict[str, object]]) -> str:
    """A run in a line: concept as told / others right / grain of others / drift, at each point."""
    return "  ".join(
        f"{p['step']}: {p['concept']['as_told']:.2f}/{p['other']['strict']:.2f}/{p['other']['grain']:.2f}"  # type: ignore[index]
        f"/{mean_drift(p):.3f}"
        for p in points
    )


def mean_drift(point: dict[str, object]) -> float:
    """Over the pictures of all drawing seeds."""
    return float(torch.tensor(point["drift"]).mean())


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("prepare", "run", "report"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--arm", nargs="*", choices=sorted(BY_NAME))
    parser.add_argument("--concept", nargs="*", choices=CONCEPTS, default=list(CONCEPTS))
    parser.add_argument("--seed", nargs="*", type=int, default=list(TRAINING_SEEDS))
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--part", default="0/1", help="which of how many processes on this folder")
    parser.add_argument("--quick", action="store_true", help="two steps, two prompts: to see that it runs")
    parser.add_argument("--docs", type=Path, default=Path("docs/turbo.md"))
    args = parser.parse_args(argv)
    places = Places(work=args.work.resolve(), scale=QUICK if args.quick else FULL)
    with quiet_imports():
        if args.action == "prepare":
            prepare(places)
        elif args.action == "run":
            run(places, args)
        else:
            from turbo_page import report

            report(places, args.docs)


if __name__ == "__main__":
    main()
