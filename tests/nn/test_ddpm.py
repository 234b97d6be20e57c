"""Noise, targets and min-SNR weights of diffusion models, against diffusers' own scheduler."""

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from detour.nn.ddpm import Diffusion

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
LEVELS = torch.tensor([0, 1, 7, 250, 501, 998, 999])


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(7, 4, 3, 5, generator=g), torch.randn(7, 4, 3, 5, generator=g)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_states_and_targets_are_the_scheduler_s(prediction: str, zero_snr: bool) -> None:
    scheduler = DDPMScheduler(**BETAS, prediction_type=prediction, rescale_betas_zero_snr=zero_snr)
    z0, eps = pair()
    noising = Diffusion.of(scheduler)
    t_B = LEVELS.float() / 1000
    assert torch.equal(noising.noisy(z0, eps, t_B), scheduler.add_noise(z0, eps, LEVELS))
    expected = eps if prediction == "epsilon" else scheduler.get_velocity(z0, eps, LEVELS)
    assert torch.equal(noising.target(z0, eps, t_B), expected)
    assert torch.equal(noising.weights(t_B), torch.ones(7))


def test_every_level_keeps_its_time_and_times_between_fall_to_the_level_below() -> None:
    noising = Diffusion.of(DDPMScheduler(**BETAS))
    levels = torch.arange(1000)
    assert torch.equal((noising.times(levels.float() / 1000) * 1000).round().long(), levels)
    assert torch.equal(
        (noising.times(torch.tensor([0.0005, 0.5009, 0.9999, 1.0])) * 1000).round().long(),
        torch.tensor([0, 500, 999, 999]),
    )


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr_weights(prediction: str) -> None:
    """As the training examples of diffusers compute them: min(snr, gamma) / snr, over snr + 1 for velocity."""
    scheduler = DDPMScheduler(**BETAS, prediction_type=prediction)
    snr = compute_snr(scheduler, LEVELS)
    expected = snr.clamp(max=5.0) / (snr if prediction == "epsilon" else snr + 1)
    got = Diffusion.of(scheduler, min_snr_gamma=5.0).weights(LEVELS.float() / 1000)
    torch.testing.assert_close(got, expected)
    assert got[0] < 0.1 < got[-1] or prediction == "v_prediction"


def test_pure_noise_has_a_finite_weight() -> None:
    scheduler = DDPMScheduler(**BETAS, rescale_betas_zero_snr=True)
    assert Diffusion.of(scheduler, min_snr_gamma=5.0).weights(torch.tensor([0.999])).tolist() == [1.0]


def test_another_prediction_is_refused() -> None:
    with pytest.raises(ValueError, match="'sample'"):
        Diffusion.of(DDPMScheduler(prediction_type="sample"))
