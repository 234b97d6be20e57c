"""The trained miniature: what ships, and that it is what it says: a turbo, its base, and its training adapter."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file

from detour import UserError, archs, export, nano
from detour.lora_formats import by_module, with_adapter
from detour.nano import judge, trained, world
from detour.nano.recipes import figures, miniature

if TYPE_CHECKING:
    from pathlib import Path

    from detour.nano.recipes.miniature import Miniature


@cache
def model(name: str, *, adapter: bool = False) -> Miniature:
    weights = {key: tensor.float() for key, tensor in trained.weights(name).items()}
    if adapter:
        file = export.read_lora(trained.ADAPTER, archs.get("zimage").spec)
        for module, parts in by_module(file.tensors).items():
            weights[f"{module}.weight"] = with_adapter(weights[f"{module}.weight"], parts, file.scale(module))
    denoiser = miniature.build_transformer()
    denoiser.load_state_dict(weights)
    return miniature.Miniature.of(denoiser.eval().requires_grad_(False))


@cache
def right(name: str, steps: int, guidance: float = 1.0, *, adapter: bool = False) -> float:
    """The share of 64 pictures that are as their prompts say, and clean."""
    prompts = world.prompts(64, seed=5)
    texts = [prompt.text for prompt in prompts]
    pictures = miniature.draw(model(name, adapter=adapter), texts, steps=steps, guidance=guidance, seed=900)
    return float(judge.score(pictures, prompts).strict_N.mean())


def test_the_package_stays_small() -> None:
    shipped = list(trained.HERE.glob("*.safetensors"))
    assert {path.stem for path in shipped} == {"base", "turbo", "training_adapter"}
    assert sum(path.stat().st_size for path in shipped) < 25e6


def test_the_turbo_draws_in_few_steps_what_its_base_cannot() -> None:
    assert right("turbo", 8) > right("base", 8) + 0.3


def test_the_turbo_draws_in_four_steps_too() -> None:
    assert right("turbo", 4) > right("turbo", 8) - 0.1


def test_the_field_of_the_turbo_is_no_flow_matching_field() -> None:
    assert figures.flow_matching_loss(model("turbo"), 64) > 1.2 * figures.flow_matching_loss(model("base"), 64)


@pytest.mark.slow
def test_the_adapter_makes_the_field_of_the_turbo_an_ordinary_one() -> None:
    """Its few steps stay good, though: an ordinary model of so easy a world draws in 8 (docs/miniature.md)."""
    loss = {on: figures.flow_matching_loss(model("turbo", adapter=on), 64) for on in (False, True)}
    assert loss[True] < 0.6 * loss[False]
    assert right("turbo", 8, adapter=True) < right("turbo", 8)


@pytest.mark.slow
def test_the_base_needs_guidance() -> None:
    assert right("base", 32, 3.0) > right("base", 32) + 0.3


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
