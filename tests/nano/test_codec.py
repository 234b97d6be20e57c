"""The hand-made VAE keeps every cell of the drawn world, through the real class and in either precision."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from detour.nano import codec, concepts, world


@pytest.fixture(scope="module")
def vae() -> Any:
    return codec.build_vae()


def shown() -> list[world.Scene]:
    """Every kind of picture: shapes, textures and phases in all places, every concept, and a cell off."""
    scenes = world.scenes(24, seed=9)
    concept = [example.scene for name in concepts.CONCEPTS for example in concepts.examples(name, 4)]
    return [*scenes, *concept, *(replace(scene, jitter=(1, -1)) for scene in scenes[:4])]


def pixels_of(pictures: np.ndarray) -> Tensor:
    return torch.from_numpy(world.to_pixels(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


PICTURES = world.render(shown())


def test_encoding_and_decoding_without_the_network_are_inverse() -> None:
    latents = codec.encode(PICTURES)
    assert latents.shape == (len(PICTURES), 16, 16, 16) and latents.dtype == torch.float32
    assert np.abs(codec.decode(latents) - PICTURES).max() < 1e-5
    anything = np.random.default_rng(0).random((3, 32, 32, 3), dtype=np.float32)
    assert np.abs(codec.decode(codec.encode(anything)) - anything).max() < 1e-5


def test_every_channel_is_used_and_the_scale_is_that_of_real_latents() -> None:
    deviations = codec.encode(world.render(world.scenes(200))).std(dim=(0, 2, 3))
    assert deviations.min() > 0.2 and deviations.max() < 1.5


def test_the_real_class_encodes_the_same(vae: Any) -> None:
    with torch.no_grad():
        found = vae.encode(pixels_of(PICTURES)).latent_dist
    expected = codec.encode(PICTURES)
    torch.testing.assert_close((found.mode() - codec.SHIFT) * codec.SCALING, expected, atol=1e-5, rtol=0)
    assert found.std.max() < 1e-4, "a sample of the posterior is its mean"
    assert (vae.config.shift_factor, vae.config.scaling_factor) == (codec.SHIFT, codec.SCALING)


def test_the_real_class_decodes_every_cell(vae: Any) -> None:
    with torch.no_grad():
        found = vae.decode(codec.encode(PICTURES) / codec.SCALING + codec.SHIFT).sample
    error = (found - pixels_of(PICTURES)).abs()
    assert error.max() < 1e-3, "an eighth of a level of 256"
    levels = ((found * 0.5 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    assert np.array_equal(levels, world.to_pixels(PICTURES)), "as a PNG, nothing is lost at all"


def test_bfloat16_loses_about_a_level(vae: Any) -> None:
    half = codec.build_vae().bfloat16()
    raw = (codec.encode(PICTURES[:16]) / codec.SCALING + codec.SHIFT).bfloat16()
    with torch.no_grad():
        error = (half.decode(raw).sample.float() - pixels_of(PICTURES[:16])).abs()
    assert error.max() < 0.05 and error.mean() < 3e-3


@pytest.mark.parametrize("sigma", [0.03, 0.3])
def test_latents_that_a_model_drew_decode_as_the_mathematics_says(vae: Any, sigma: float) -> None:
    clean = codec.encode(PICTURES[:12])
    noisy = clean + sigma * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = vae.decode(noisy / codec.SCALING + codec.SHIFT).sample
    expected = torch.from_numpy(codec.decode(noisy)).permute(0, 3, 1, 2) * 2 - 1
    expected = expected.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    error = (found - expected).abs()
    assert error.mean() < 1e-4
    assert (error > 0.01).double().mean() < 1e-3, "neighbours that happen to be alike are rare"


def test_other_sizes_work_and_foreign_pictures_become_their_cells(vae: Any) -> None:
    pixels = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        found = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
    cells = torch.nn.functional.avg_pool2d(pixels, 4)
    expected = cells.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    assert (found - expected).abs().mean() < 1e-3


def test_it_survives_its_file(vae: Any, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    vae.save_pretrained(tmp_path)
    again = AutoencoderKL.from_pretrained(tmp_path)
    assert again.state_dict().keys() == vae.state_dict().keys()
    assert all(torch.equal(tensor, vae.state_dict()[name]) for name, tensor in again.state_dict().items())


def test_building_leaves_the_random_state_alone() -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    first, second = codec.build_vae().state_dict(), codec.build_vae().state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[name], second[name]) for name in first)
