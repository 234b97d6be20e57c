"""A loss or gradient that is not finite changes no weight, is told with its pictures and times, and ends a run only
after `train.max_bad_steps` in a row, with the last checkpoint whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import Any

import pytest
import torch

from detour import UserError
from detour.archs import resolve
from detour.data.cache import LATENTS, Store
from detour.train import build, loop, preserve
from detour.train.control import Control
from detour.train.run import Run
from detour.train.session import run_job
from miniature import NAME, Recorder, World, digest, hashes, job, newest, run, traced

NAN, INF = float("nan"), float("inf")


@contextmanager
def spoilt(bad: Callable[[int, int], bool], where: str = "loss", value: float = NAN) -> Iterator[None]:
    """Make the loss, or only the gradient, of chosen (step, micro) not finite."""
    training_loss = preserve.training_loss

    def loss(task: Any, denoiser: Any, batch: Any, config: Any, seed: int, step: int, micro: int) -> Any:
        if not bad(step, micro):
            return training_loss(task, denoiser, batch, config, seed, step, micro)
        if where == "loss":  # in one picture of the batch, from the model's output on
            predict = task.arch.predict

            def poisoned(*args: Any) -> torch.Tensor:
                out = predict(*args)
                mask = torch.zeros_like(out)
                mask[-1, 0, 0, 0] = value
                return out + mask

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(type(task.arch), "predict", lambda _, *args: poisoned(*args))
                return training_loss(task, denoiser, batch, config, seed, step, micro)
        out = training_loss(task, denoiser, batch, config, seed, step, micro)
        parameter = next(p for p in denoiser.parameters() if p.requires_grad)
        handle = parameter.register_hook(lambda grad: (handle.remove(), grad * value)[1])
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preserve, "training_loss", loss)
        yield


def opened(world: World, folder: Path, **sections: Any) -> Run:
    process = resolve(job(world, folder, **sections).config.process[0])
    return build.build(build.gather(process, Recorder()), folder / NAME, NAME, "", Recorder())


def everything(open_run: Run) -> list[str]:
    """Hashes of weights, average and optimizer state."""
    state = open_run.optimizer.state
    tensors = [*open_run.parameters, *(open_run.ema.state().values() if open_run.ema else ())]
    held = [value for parameter in open_run.parameters for value in state.get(parameter, {}).values()]
    return [digest(t) for t in [*tensors, *(torch.as_tensor(value) for value in held)]]


def without_place(state: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in state.items() if name != "progress"}


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("where", "value", "micro"),
    [
        ("loss", NAN, 0),
        ("gradient", INF, 2),
        pytest.param("loss", INF, 2, marks=SLOW),
        pytest.param("gradient", NAN, 1, marks=SLOW),
    ],
)
@pytest.mark.parametrize(
    "optimizer", ["adamw", *(pytest.param(name, marks=SLOW) for name in ("adamw8bit", "prodigy", "schedulefree"))]
)
def test_a_bad_step_changes_nothing_but_the_place(world, tmp_path, optimizer, where, value, micro):
    """Whichever micro-batch it comes from; gradients of the others are not kept for the next step."""
    train = {
        "optimizer": optimizer, "gradient_accumulation": 3, "batch_size": 2, "ema_config": {"use_ema": True},
    }  # fmt: skip
    open_run, progress = opened(world, tmp_path, train=train), loop.Progress()
    open_run.start(progress)
    for _ in range(2):
        assert loop.train_step(open_run, progress).taken
    before = everything(open_run)
    assert len(before) > 3 * 48
    with spoilt(lambda step, at: (step, at) == (2, micro), where, value):
        outcome = loop.train_step(open_run, progress)
    assert not outcome.taken
    assert everything(open_run) == before
    assert all(parameter.grad is None for parameter in open_run.parameters)
    assert progress.step == 3
    assert loop.train_step(open_run, progress).taken
    assert everything(open_run) != before


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_the_picture_is_named_with_its_time(world, tmp_path, where):
    """Of a bad loss only the draw that has it (the same picture may be in the step twice), of a bad gradient all."""
    train = {"gradient_accumulation": 2, "batch_size": 2, "steps": 4}
    with traced() as seen, spoilt(lambda step, at: (step, at) == (1, 1), where):
        ran = run(job(world, tmp_path, train=train))
    assert ran.result.finished
    (event,) = [event for event in ran.seen.of("warning") if "not finite" in event.message]
    assert event.step == 2
    assert f"step 2: the {where} is not finite; no weight was changed" in event.message
    batches = [batch for batch in seen if batch.step == 1]
    pairs = [pair for batch in batches for pair in zip(batch.names, batch.times, strict=True)]
    draws = [f"{name} at t = {t:.3f}" for name, t in pairs]
    assert len(draws) > 2
    assert event.details == (draws[-1:] if where == "loss" else draws)
    (step,) = [event for event in ran.seen.of("step") if event.step == 2]
    assert isfinite(step.loss) == (where == "gradient")
    assert [t for t, _ in step.picture_losses] == [round(t, 4) for _, t in pairs]
    assert [isfinite(loss) for _, loss in step.picture_losses] == [*[True] * (len(pairs) - 1), where == "gradient"]


def test_training_goes_on_as_if_the_step_had_not_been(world, tmp_path):
    """The weights after a bad step 3 of 3 are those after step 2; the next run of steps goes on from there."""
    with spoilt(lambda step, _: step == 2):
        ran = run(job(world, tmp_path, train={"steps": 3}))
    good = run(job(world, tmp_path / "good", train={"steps": 2}))
    assert ran.result.finished
    assert ran.state["progress"] != good.state["progress"]
    assert without_place(ran.state) == without_place(good.state)


def test_the_run_ends_after_so_many_bad_steps_in_a_row(world, tmp_path):
    settings = {"train": {"steps": 9, "max_bad_steps": 3}, "save": {"save_every": 2}}
    seen = Recorder()
    with traced() as batches, spoilt(lambda step, _: step >= 5), pytest.raises(UserError) as caught:
        run_job(job(world, tmp_path, **settings), Control(), seen)
    text = str(caught.value)
    assert "3 steps in a row" in text
    assert "train.max_bad_steps: 3" in text
    assert batches[-1].names[0] in text
    assert [event.step for event in seen.of("warning") if "not finite" in event.message] == [6, 7, 8]
    last = newest(tmp_path / NAME)  # of step 6, which was bad: its weights are those of step 5
    assert last.step == 6
    assert all(bool(torch.isfinite(tensor).all()) for group in last.tensors.values() for tensor in group.values())
    with traced():
        good = run(job(world, tmp_path / "good", train={"steps": 5}))
    bad_state, good_state = hashes(last), good.state
    assert {k: v for k, v in bad_state.items() if k != "progress"} == {
        k: v for k, v in good_state.items() if k != "progress"
    }
    # It goes on once the cause is gone, and counts on: step 6 was the first in a row.
    assert last.state["progress"]["bad_steps"] == 1
    again = run(job(world, tmp_path, **settings))
    assert again.result.finished
    assert newest(tmp_path / NAME).state["progress"]["bad_steps"] == 0


def test_bad_steps_that_are_not_in_a_row_do_not_end_a_run(world, tmp_path):
    with spoilt(lambda step, _: step % 2 == 0):
        ran = run(job(world, tmp_path, train={"steps": 8, "max_bad_steps": 2}))
    assert ran.result.finished
    assert len([message for message in ran.seen.warnings if "not finite" in message]) == 4


def test_the_count_survives_a_stop(world, tmp_path):
    settings = {"train": {"steps": 8, "max_bad_steps": 3}}
    with spoilt(lambda step, _: step >= 1):
        run(job(world, tmp_path, **settings), stop_at=3)
        with pytest.raises(UserError, match="3 steps in a row"):
            run(job(world, tmp_path, **settings))
    assert newest(tmp_path / NAME).step == 3


def test_latents_that_are_not_finite_are_named_at_every_draw(world, tmp_path):
    """A cache that holds NaN for one picture, with a hash that fits: only that picture's steps are left out."""
    cache = tmp_path / "cache"
    settings = {"train": {"steps": 10, "cache_folder": str(cache)}}
    run(job(world, tmp_path / "first", train={"steps": 1, "cache_folder": str(cache)}))
    store = Store(cache)
    entry = sorted((cache / LATENTS).rglob("*.safetensors"))[0]
    latents = store.get(LATENTS, entry.stem)["latents_CHW"]
    bad = digest(poisoned := latents.index_fill(0, torch.tensor([0]), NAN)[None])
    store.put(LATENTS, entry.stem, {"latents_CHW": poisoned[0]})
    with traced() as seen:
        ran = run(job(world, tmp_path / "second", **settings))
    expected = [(batch.step + 1, batch.names[0]) for batch in seen if batch.latents == bad]
    assert len(expected) == 2  # two epochs of five pictures
    told = [event for event in ran.seen.of("warning") if "not finite" in event.message]
    assert [(event.step, event.details[0].split(" at t = ")[0]) for event in told] == expected
    assert re.fullmatch(r"data/000\d\.png at t = 0\.\d{3}", told[0].details[0])
    assert ran.result.finished
