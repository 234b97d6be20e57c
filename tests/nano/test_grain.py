"""The grain: two brightnesses a block, measured as it is, and as hard in few steps as its page says."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from detour.nano import codec, grain, world
from detour.nano.recipes import miniature
from detour.nn import flow

SHOWN = world.scenes(24, seed=3)
PLAIN = world.render([replace(scene, grain=None) for scene in SHOWN])
GRAINED = world.render(SHOWN)


def test_a_grain_is_a_function_of_its_seed_and_each_scene_has_its_own() -> None:
    assert np.array_equal(grain.pattern(5), grain.pattern(5)) and not np.array_equal(grain.pattern(5), grain.pattern(6))
    assert len({scene.grain for scene in SHOWN}) == len(SHOWN)
    depth = grain.pattern(7)[..., 0]
    blocks = depth.reshape(16, 2, 16, 2).transpose(0, 2, 1, 3).reshape(256, 4)
    assert (blocks == blocks[:, :1]).all() and np.allclose(abs(blocks), grain.DEPTH)
    assert 80 < (blocks[:, 0] > 0).sum() < 176, "as often brighter as darker"


def test_pictures_are_their_drawings_with_the_grain_where_there_is_room() -> None:
    middle = (PLAIN > grain.DEPTH) & (PLAIN < 1 - grain.DEPTH)
    wanted = PLAIN + np.stack([grain.pattern(scene.grain or 0) for scene in SHOWN])
    assert np.abs(GRAINED - wanted)[middle].max() <= 1 / 255
    assert GRAINED.min() >= 0 and GRAINED.max() <= 1
    grounds = world.render_grounds(SHOWN[:1])
    assert np.array_equal(grounds[0, 0, 0], GRAINED[0, 0, 0]), "the ground has the picture's own"


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_contrast_is_the_share_of_the_grain_that_is_there(share: float) -> None:
    assert grain.contrast(PLAIN + share * (GRAINED - PLAIN), PLAIN) == pytest.approx(np.full(24, share), abs=0.06)


def test_what_a_grain_explains_is_taken_away_and_no_more() -> None:
    assert np.abs(grain.removed(GRAINED, PLAIN) - PLAIN).max() < 0.06, "near white and black it is not even"
    assert np.abs(grain.removed(GRAINED, PLAIN) - PLAIN).mean() < 2e-3
    assert np.allclose(grain.removed(PLAIN + 0.2, PLAIN), PLAIN + 0.2 - grain.DEPTH)
    fine = np.where(np.indices((32, 32)).sum(0) % 2, 0.1, -0.1)[..., None].astype(np.float32)
    assert np.allclose(grain.removed(PLAIN + fine, PLAIN), PLAIN + fine, atol=1e-6), "detail within a block is no grain"


def test_in_latents_it_is_as_faint_as_the_page_says() -> None:
    room = PLAIN[:, ::2, ::2].min(-1) > grain.DEPTH
    away = (codec.encode(GRAINED) - codec.encode(PLAIN)).square().sum(1).sqrt().numpy()
    assert away[room & (PLAIN[:, ::2, ::2].max(-1) < 1 - grain.DEPTH)].mean() == pytest.approx(grain.LATENT, abs=0.01)


def test_few_steps_lose_much_of_it_in_a_perfect_model() -> None:
    """The figures of the module's page, and the velocity by `detour.nn.flow` instead of the formula."""
    found = {steps: grain.expected(miniature.grid(steps)) for steps in (4, 8, 16, 32)}
    assert found == {
        4: pytest.approx(0.28, abs=0.01), 8: pytest.approx(0.56, abs=0.01),
        16: pytest.approx(0.85, abs=0.01), 32: pytest.approx(0.98, abs=0.01),
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(2, (400_000,), generator=generator) * 2.0 - 1
    eps = torch.randn(400_000, generator=generator)
    z = flow.noisy(grain.LATENT * signs, eps, torch.full((400_000,), 0.3))
    near = (z - 0.2).abs() < 0.05
    tanh = grain.LATENT * torch.tanh(0.7 * grain.LATENT * z[near] / 0.3**2).mean()
    assert (grain.LATENT * signs)[near].mean() == pytest.approx(float(tanh), abs=0.01), (
        "the best guess of the clean value"
    )
