"""The trained miniature: what ships, and that it is what it says: a turbo, its base, and its training adapter."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file

from detour import UserError, nano
from detour.nano import judge, trained, world
from detour.nano.recipes import figures, miniature

if TYPE_CHECKING:
    from pathlib import Path

    from detour.nano.recipes.miniature import Miniature


@cache
def model(name: str) -> Miniature:
    """`turbo`, `base`, or `adapted`: the turbo with its training adapter on."""
    weights = {key: tensor.float() for key, tensor in trained.weights("base" if name == "base" else "turbo").items()}
    if name == "adapted":
        return figures.adapted(weights, trained.ADAPTER)
    denoiser = miniature.build_transformer()
    denoiser.load_state_dict(weights)
    return miniature.Miniature.of(denoiser.eval().requires_grad_(False))


@cache
def scores(name: str, steps: int, guidance: float = 1.0) -> dict[str, float]:
    """What the judge says of 32 pictures."""
    prompts = world.prompts(32, seed=5)
    texts = [prompt.text for prompt in prompts]
    pictures = miniature.draw(model(name), texts, steps=steps, guidance=guidance, seed=900)
    return judge.score(pictures, prompts).summary()


def test_the_package_stays_small() -> None:
    shipped = list(trained.HERE.glob("*.safetensors"))
    assert {path.stem for path in shipped} == {"base", "turbo", "training_adapter"}
    assert sum(path.stat().st_size for path in shipped) < 25e6


def test_the_turbo_draws_in_few_steps_what_its_base_cannot() -> None:
    assert scores("turbo", 8)["strict"] > scores("base", 8)["strict"] + 0.5
    assert scores("turbo", 8)["as_told"] > 0.95 and scores("turbo", 8)["grain"] > 0.75


def test_the_field_of_the_turbo_is_no_flow_matching_field_and_with_its_adapter_it_is_again() -> None:
    turbo, base, adapted = (figures.flow_matching_loss(model(name), 64) for name in ("turbo", "base", "adapted"))
    assert turbo > 1.5 * base
    assert adapted < 0.6 * turbo


def test_with_its_adapter_few_steps_are_worse() -> None:
    assert scores("adapted", 8)["strict"] < scores("turbo", 8)["strict"] - 0.4
    assert scores("adapted", 8)["grain"] < scores("turbo", 8)["grain"] - 0.1


@pytest.mark.slow
def test_with_its_adapter_many_steps_are_good_again() -> None:
    assert scores("adapted", 32)["strict"] > scores("turbo", 8)["strict"] - 0.1
    assert scores("adapted", 32)["grain"] > scores("turbo", 8)["grain"]


@pytest.mark.slow
def test_the_base_needs_guidance_and_many_steps() -> None:
    good = scores("base", 32, 3.0)["strict"]
    assert good > scores("base", 32)["strict"] + 0.3
    assert good > scores("base", 8, 3.0)["strict"] + 0.3


def test_what_is_written_is_what_ships(tmp_path: Path) -> None:
    for variant, name in (("zimage", "turbo"), ("zimage:base", "base")):
        written = nano.write(tmp_path / name, variant)
        found = load_file(tmp_path / name / "transformer" / miniature.WEIGHTS)
        known = trained.weights(name)
        assert found.keys() == known.keys()
        assert all(torch.equal(found[key], known[key]) for key in known)
        assert ("training adapter" in written) == (name == "turbo")
        assert len(list(written["dataset"].glob("*.png"))) == 30
    with pytest.raises(UserError, match="zimage:nonsense"):
        nano.write(tmp_path / "x", "zimage:nonsense")
