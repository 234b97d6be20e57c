"""The teacher gate: what it finds of right teachers and of deliberately wrong ones, and what a run makes of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

import terms
from detour import UserError
from detour.archs.base import Framing
from detour.config.preserve import TermConfig
from detour.data.loader import Batch
from detour.nano import drawn
from detour.nano.recipes import miniature as recipe
from detour.train.gate import SEEDS, Figure, TeacherGate
from detour.train.preserve import Objective, Told
from miniature import World, job, run, write_world
from minis import Mini

STEPS, CHANNELS, POSITIONS, NAMES = terms.STEPS, 16, 16, ("a", "b", "c", "d")
TERM = TermConfig(states="rollout", target="frozen", teacher_told="rich")


def smooth(seed: int) -> Tensor:
    """latents_CHW in -1 to 1 that vary slowly: a picture whose frame can be told."""
    coarse = torch.randn(1, CHANNELS, 5, 5, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, (POSITIONS, POSITIONS), mode="bicubic", align_corners=True)[0].tanh()


PICTURES = {name: smooth(seed) for seed, name in enumerate(NAMES)}


def pixels(latents: Tensor) -> Tensor:
    """A decoder that shows the first three channels, eight pixels for each position."""
    return F.interpolate(latents[:, :3], scale_factor=8, mode="bilinear")


@pytest.fixture
def oracle(mini: Mini, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """A model that draws what it is told to: `goal` where its condition has one, else grey. With its modes."""
    training: list[bool] = []

    def predict(denoiser: Any, z: Tensor, t_B: Tensor, conditions: Any) -> Tensor:
        training.append(denoiser.training)
        goals = torch.stack(
            [told.get("goal", torch.zeros_like(state)) for state, told in zip(z, conditions, strict=True)]
        )
        return (z - goals) / t_B.to(z).reshape(-1, 1, 1, 1)

    monkeypatch.setattr(mini.arch, "predict", predict)
    return training


def gate(mini: Mini, goals: dict[str, Tensor]) -> TeacherGate:
    """The gate of a teacher that is told to draw these."""
    rich = {name: {"goal": goal} for name, goal in goals.items()}
    objective = Objective(
        task=mini.task, denoiser=mini.denoiser(), config=terms.CONFIG, terms=[TERM], told=Told(rich=rich),
        scheduler=mini.scheduler, steps=STEPS,
    )  # fmt: skip
    batches = [
        Batch(
            latents_BCHW=latents[None], conditions=[{}], weights_B=torch.ones(1), masks_B1HW=None, names=[name],
            prompts=[name], framings=[Framing.whole(128, 128)], is_reg=False, epoch=0,
        )
        for name, latents in PICTURES.items()
    ]  # fmt: skip
    return TeacherGate(objective, TERM, batches, pixels)


def zoomed(latents: Tensor) -> Tensor:
    """The middle 13 of 16 positions, enlarged."""
    return F.interpolate(latents[None, :, 2:-1, 2:-1], (POSITIONS, POSITIONS), mode="bilinear", align_corners=True)[0]


def test_a_right_teacher_passes(mini: Mini, oracle: list[bool]) -> None:
    """It draws the pictures themselves. On the grid every state is one step from its goal, so that the context gap,
    t^2 |(z - goal) / t - z / t|^2 summed over the steps, is that many times the goal's mean square."""
    noisy = {name: latents + 0.05 * torch.randn(latents.shape) for name, latents in PICTURES.items()}
    asked = gate(mini, noisy)
    verdict = asked.examine()
    assert verdict.reasons == [] and verdict.frame == ""
    assert verdict.gain.mean > 0.8 and verdict.gain.beyond(0.0)
    size = sum(goal.square().mean().item() for goal in noisy.values()) / len(noisy)
    assert verdict.gap == pytest.approx(STEPS * size, rel=1e-4)
    assert max(abs(shift.mean) for shift in verdict.colour) < 0.02
    assert len(oracle) == 3 * STEPS * SEEDS * len(NAMES) and not any(oracle), "dropout is off"
    assert verdict.page.size == (3 * 196 - 4, 16 + 4 * 196 - 4)


@pytest.mark.parametrize(
    ("goals", "said"),
    [
        (dict(zip(NAMES, [PICTURES[name] for name in "bcda"], strict=True)), "no closer to the training pictures"),
        (dict.fromkeys(NAMES, torch.zeros(CHANNELS, POSITIONS, POSITIONS)), r"no closer .* \+0.0%"),
        ({name: zoomed(latents) for name, latents in PICTURES.items()}, "its drawings are enlarged by a quarter"),
        ({name: latents.roll(2, -1) for name, latents in PICTURES.items()}, "its drawings are moved to the right"),
        (
            {name: latents + torch.eye(CHANNELS)[0].reshape(-1, 1, 1) * 0.4 for name, latents in PICTURES.items()},
            r"its drawings are more red than the pictures: \+0.1",
        ),
    ],
    ids=["shuffled", "ignored", "zoomed", "moved", "reddened"],
)
def test_a_wrong_teacher_is_found(mini: Mini, oracle: list[bool], goals: dict[str, Tensor], said: str) -> None:
    reasons = gate(mini, goals).examine().reasons
    assert any(re.search(said, reason) for reason in reasons), reasons
    assert len(reasons) == 1 or said.startswith("no closer"), "it is found for what it is"


def test_one_drawing_tells_nothing() -> None:
    assert not Figure.of([0.5]).beyond(0.0)
    assert Figure.of([0.5, 0.5]).beyond(0.0)
    figure = Figure.of([1.0, 2.0, 3.0])
    assert (figure.mean, figure.error) == (2.0, pytest.approx((1 / 3) ** 0.5))


# ---------------------------------------------------------------------------------------------------------- in a run


@pytest.fixture(scope="module")
def own_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = write_world(tmp_path_factory.mktemp("world"))
    for caption in world.data.glob("*.txt"):
        caption.with_suffix(".long.txt").write_text(caption.read_text().strip() + " with a plain background, a drawing")
    return world


def sections(**preserve: Any) -> dict[str, Any]:
    return {
        "train": {"steps": 2},
        "sample": {"sample_steps": 2},
        "dataset": {"rich_caption_ext": "long.txt"},
        "preserve": {"strategy": "self_distill"} | preserve,
    }


def test_a_run_warns_and_shows_what_it_saw(own_world: World, tmp_path: Path) -> None:
    """A model of random weights: nothing that it is told helps it."""
    ran = run(job(own_world, tmp_path, **sections()))
    (event,) = ran.seen.of("gate")
    assert not event.passed and event.reasons and event.gap > 0
    assert Path(event.path) == ran.result.folder / "samples" / "teacher-gate.png"
    with Image.open(event.path) as page:
        assert page.size == (3 * 196 - 4, 16 + 4 * 196 - 4)
    (warning,) = [event for event in ran.seen.of("warning") if "teacher" in event.message]
    assert warning.details == event.reasons and event.path in warning.message
    assert ran.result.finished
    kinds = [event.type for event in ran.seen.events]
    assert kinds.index("start") < kinds.index("gate") < kinds.index("step")

    quiet = run(job(own_world, tmp_path / "off", **sections(gate="off")))
    assert not quiet.seen.of("gate") and quiet.state == ran.state, "looking changes nothing"


def test_a_run_refuses_where_it_is_asked_to(own_world: World, tmp_path: Path) -> None:
    mine = job(own_world, tmp_path, **sections(gate="refuse"))
    with pytest.raises(UserError, match=r"preserve.gate: the teacher .*teacher-gate.png.*no closer.*set preserve.gate"):
        run(mine)
    assert (tmp_path / "zig" / "samples" / "teacher-gate.png").is_file()
    assert not list((tmp_path / "zig" / "checkpoints").glob("step-*"))


def test_a_model_that_reads_pictures_teaches_from_them(tmp_path: Path) -> None:
    """The recipes' miniature, untrained: its folder says that it reads pictures, and the engine tells it them."""
    model, data = tmp_path / "model", tmp_path / "data"
    denoiser = recipe.build_transformer()
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    recipe.write(model, denoiser.state_dict())
    assert json.loads((model / "text_encoder" / "config.json").read_text())["picture_tokens"] == 8
    drawn.write_dataset(data, n=2, size=128)
    world = World(tmp_path)
    mine = sections(teacher_told="picture") | {"dataset": {"resolution": 128}}
    mine["model"] = {"assistant_lora_path": None}
    ran = run(job(world, tmp_path / "run", **mine))
    (event,) = ran.seen.of("gate")
    assert event.gap > 0
    assert all(step.loss > 0 for step in ran.seen.of("step"))
