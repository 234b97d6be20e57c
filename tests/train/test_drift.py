"""The drift meter: its figures against plain arithmetic, its cost, its alarm, and that it leaves training alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from detour import sample
from detour.nn import lora
from detour.train.drift import STEP_FORWARDS, Schedule
from miniature import World, job, run, write_world

PROMPTS = ["a red circle on a blue background", "a blue square on a white background"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return write_world(tmp_path_factory.mktemp("world"))


def options(**drift: Any) -> dict[str, Any]:
    return {
        "train": {"steps": 4, "lr": 5e-3},
        "sample": {"sample_steps": 4},
        "save": {"save_every": 1, "max_step_saves_to_keep": 1},
        "preserve": {
            "drift": {"measure": True, "every": 2, "budget": 99.0, "long_steps": 6, "prompts": PROMPTS} | drift
        },
    }


@contextmanager
def meters() -> Iterator[list[Any]]:
    """The meters that runs inside build."""
    from detour.train import drift

    made: list[Any] = []
    real = drift.DriftMeter.__post_init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drift.DriftMeter, "__post_init__", lambda self: (made.append(self), real(self))[1])
        yield made


def test_figures_are_what_they_say(world: World, tmp_path: Path) -> None:
    with meters() as made:
        ran = run(job(world, tmp_path, **options()))
    events = ran.seen.of("drift")
    assert [event.step for event in events] == [0, 2, 4]
    first, _, last = events
    assert (first.drift, first.pixels, first.spread) == (0.0, 0.0, 1.0)
    assert first.gap == first.gap_untouched == last.gap_untouched
    assert first.curvature == first.curvature_untouched
    assert last.drift > 0.001 and list(last.by_prompt) == PROMPTS

    (meter,) = made
    assert [request.seed for request in meter.requests] == [1000, 1001, 1002, 1003]
    tuned, untouched, long = [], [], []
    for request, condition in zip(meter.requests, meter.conditions, strict=True):
        model = meter.model
        noise = sample.initial_noise(meter.arch.spec, request)
        parts = (meter.arch, model.denoiser, model.scheduler, noise)
        with model.adapter.removed():
            tuned.append(sample.denoise(*parts, request, [condition]))
            long.append(sample.denoise(*parts, replace(request, steps=6), [condition]))
            with lora.disabled(model.denoiser):
                untouched.append(sample.denoise(*parts, request, [condition]))
    a, b, c = (torch.cat(latents) for latents in (tuned, untouched, long))
    size = b.square().mean().sqrt()
    each = (a - b).square().flatten(1).mean(1).sqrt() / size
    assert last.drift == pytest.approx(each.mean().item(), rel=1e-4)
    assert list(last.by_prompt.values()) == pytest.approx([each[:2].mean().item(), each[2:].mean().item()], rel=1e-4)
    gap = ((a - c).square().flatten(1).mean(1).sqrt() / size).mean().item()
    assert last.gap == pytest.approx(gap, rel=1e-4)

    def spread(z: torch.Tensor) -> float:
        return sum((z[i] - z[i + 1]).square().mean().sqrt().item() for i in (0, 2))

    assert last.spread == pytest.approx(spread(a) / spread(b), rel=1e-4)


@pytest.mark.slow
def test_measuring_leaves_training_alone(world: World, tmp_path: Path) -> None:
    plain = options()
    plain["preserve"] = {}
    with_meter, without = run(job(world, tmp_path / "a", **options())), run(job(world, tmp_path / "b", **plain))
    assert [e.loss for e in with_meter.seen.of("step")] == [e.loss for e in without.seen.of("step")]
    weights = [{k: v for k, v in ran.state.items() if k != "progress"} for ran in (with_meter, without)]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_an_alarm_warns_and_stops_and_the_last_checkpoint_below_it_stays(world: World, tmp_path: Path) -> None:
    levels = {e.step: e.drift for e in run(job(world, tmp_path / "a", **options(every=1))).seen.of("drift")}
    assert levels[1] < levels[2] < levels[3]
    alarm = (levels[1] + levels[2]) / 2
    ran = run(job(world, tmp_path / "b", **options(every=1, alarm=alarm, stop=True)))
    assert [event.alarm for event in ran.seen.of("drift")] == [False, False, True]
    assert not ran.result.finished and ran.result.step == 2
    assert ran.seen.of("stop")[0].reason == "the drift is above its alarm"
    assert "step 1 was the last below it" in ran.seen.warnings[-1]
    kept = sorted(path.name for path in (ran.result.folder / "checkpoints").iterdir())
    assert kept == ["step-000000001", "step-000000002"]  # max_step_saves_to_keep: 1 would have left the second alone
    assert (ran.result.folder / "zig-000000001.safetensors").is_file()

    on = run(job(world, tmp_path / "c", **options(every=1, alarm=alarm)))
    assert on.result.finished
    kept = sorted(path.name for path in (on.result.folder / "checkpoints").iterdir())
    assert kept == ["step-000000001", "step-000000004"]


@pytest.mark.parametrize(
    ("steps", "every", "pictures"), [(3000, 250, 1), (3000, 50, 1), (500, 100, 4), (100, 10, 1), (40, 10, 2)]
)
def test_the_budget_bounds_the_cost(steps: int, every: int, pictures: int) -> None:
    few, many = 32, 128
    schedule = Schedule.within(0.06, every, steps, pictures, (few, many))
    measured = [step for step in range(1, steps) if schedule.due(step, steps)]
    assert schedule.every % every == 0
    assert schedule.forwards == 3 * (few + many) + len(measured) * few
    assert schedule.share == pytest.approx(schedule.forwards / (STEP_FORWARDS * steps * pictures))
    assert schedule.share <= 0.06 or not measured  # the ends alone may be more
    assert schedule.due(0, steps) and schedule.due(steps, steps)
    if every * 2 <= schedule.every < steps:  # not more seldom than it must
        closer = 3 * (few + many) + (steps - 1) // (schedule.every - every) * few
        assert closer > 0.06 * STEP_FORWARDS * steps * pictures
