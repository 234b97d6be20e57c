"""The plane of Gaussian mixtures: closed forms against Monte Carlo, integration against exact samples."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from detour.nano import mixture
from detour.nn import flow

WORLD = mixture.world()
EAST = WORLD.conditions["east"]
UNEVEN = replace(
    mixture.mixture([(2.0, 0.0), (-1.0, 1.5), (0.0, -2.0)], 0.5, [0.6, 0.3, 0.1]),
    std_K=torch.tensor([0.3, 0.8, 0.5], dtype=torch.float64),
)


def pairs(condition: mixture.Mixture, n: int, t: float) -> tuple[Tensor, Tensor]:
    """States z_t and their targets, as training draws them."""
    drawn = torch.Generator().manual_seed(7)
    z0 = condition.sample(n, drawn)
    eps = torch.randn(n, 2, dtype=torch.float64, generator=drawn)
    return flow.noisy(z0, eps, torch.full((n,), t, dtype=torch.float64)), flow.velocity(z0, eps)


@pytest.mark.parametrize("t", [0.15, 0.5, 0.85])
def test_the_velocity_is_the_mean_of_targets_at_a_state(t: float) -> None:
    """Least squares: near a point, the mean target is v. The error of a mean over n pairs is known, 5 of it allowed."""
    states, targets = pairs(UNEVEN, 600_000, t)
    checked = 0
    for point in states[:40]:
        near = (states - point).norm(dim=1) < 0.05
        if near.sum() < 300:
            continue
        residual = targets[near] - UNEVEN.velocity(states[near], t)
        error = residual.std(dim=0) / math.sqrt(int(near.sum()))
        assert (residual.mean(dim=0).abs() < 5 * error + 1e-3).all()
        checked += 1
    assert checked > 10


def test_no_other_field_has_a_smaller_loss() -> None:
    states, targets = pairs(EAST, 50_000, 0.6)
    best = EAST.velocity(states, 0.6)
    least = (best - targets).square().mean()
    for other in (
        best * 1.05,
        best + 0.1,
        WORLD.anything.velocity(states, 0.6),
        EAST.moved((0.5, 0)).velocity(states, 0.6),
    ):
        assert (other - targets).square().mean() > least


@settings(max_examples=50, deadline=None)
@given(x=st.floats(-6, 6), y=st.floats(-6, 6))
def test_the_ends_of_time_are_known(x: float, y: float) -> None:
    z = torch.tensor([[x, y]], dtype=torch.float64)
    mean = (UNEVEN.weight_K[:, None] * UNEVEN.mean_K2).sum(dim=0)
    torch.testing.assert_close(UNEVEN.velocity(z, 1.0), z - mean)
    torch.testing.assert_close(UNEVEN.velocity(z, 0.0), -z, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("t", [0.1, 0.4, 0.9])
def test_the_velocity_carries_the_density(t: float) -> None:
    """The continuity equation d log p / dt = -div v - v . grad log p, by differences."""
    z, h = torch.randn(200, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2, 1e-5
    steps = torch.eye(2, dtype=torch.float64) * h
    divergence = sum(
        (UNEVEN.velocity(z + step, t) - UNEVEN.velocity(z - step, t))[:, axis] / (2 * h)
        for axis, step in enumerate(steps)
    )
    slope = torch.stack([(UNEVEN.log_density(z + s, t) - UNEVEN.log_density(z - s, t)) / (2 * h) for s in steps], dim=1)
    change = (UNEVEN.log_density(z, t + h) - UNEVEN.log_density(z, t - h)) / (2 * h)
    expected = -divergence - (UNEVEN.velocity(z, t) * slope).sum(dim=1)
    torch.testing.assert_close(change, expected, atol=1e-4, rtol=1e-4)


def test_the_density_integrates_to_one() -> None:
    axis = torch.linspace(-8, 8, 401, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis)
    for t in (0.0, 0.5, 1.0):
        assert float(UNEVEN.log_density(points, t).exp().sum()) * (16 / 400) ** 2 == pytest.approx(1, abs=1e-4)


def test_integration_reaches_the_mixture() -> None:
    noise = torch.randn(6000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    reached = mixture.flow(UNEVEN.velocity, noise, 1.0, 0.0, steps=32)
    shares = UNEVEN.responsibility(reached).mean(dim=0)
    assert torch.allclose(shares, UNEVEN.weight_K, atol=0.02)  # three standard errors
    exact = UNEVEN.sample(60_000, torch.Generator().manual_seed(4))
    assert torch.allclose(reached.mean(dim=0), exact.mean(dim=0), atol=0.06)
    assert torch.allclose(torch.cov(reached.T), torch.cov(exact.T), atol=0.1)
    likely = [UNEVEN.log_density(points).mean().item() for points in (reached, exact)]
    assert likely[0] == pytest.approx(likely[1], abs=0.05)
    noise, reached = noise[:500], reached[:500]
    back = mixture.flow(UNEVEN.velocity, reached, 0.0, 1.0, steps=128)
    assert (back - noise).norm(dim=1).median() < 1e-3, "the path leads back"


def test_an_exact_turbo_needs_no_more_steps_and_a_plain_few_step_sampler_does() -> None:
    noise = torch.randn(600, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    grid = [flow.shift_time(1 - k / 4, 3.0) for k in range(5)]
    exact = mixture.flow(EAST.velocity, noise, 1.0, 0.0, steps=128)

    def turbo(z: Tensor, t: float) -> Tensor:
        return mixture.jump(EAST.velocity, z, t, grid[grid.index(t) + 1], steps=64)

    few, plain = mixture.integrate(turbo, noise, grid), mixture.integrate(EAST.velocity, noise, grid)
    assert len(few) == 5 and torch.equal(few[0], noise)
    assert (few[-1] - exact).norm(dim=1).max() < 0.02
    lost = (EAST.log_density(plain[-1]) < EAST.log_density(exact).quantile(0.01)).double().mean()
    assert lost > 0.03, "in four plain steps some points land where no sample is"
    gaps = [
        (mixture.integrate(EAST.velocity, noise, torch.linspace(1, 0, n + 1).tolist())[-1] - exact).norm()
        for n in (8, 32, 128)
    ]
    assert gaps == sorted(gaps, reverse=True)


def test_guidance_one_is_the_condition_and_more_leaves_the_others() -> None:
    z = torch.randn(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    torch.testing.assert_close(WORLD.guided(EAST, 1.0)(z, 0.5), EAST.velocity(z, 0.5))
    torch.testing.assert_close(WORLD.guided(EAST, 0.0)(z, 0.5), WORLD.anything.velocity(z, 0.5))
    pushed = WORLD.guided(EAST, 3.0)(z, 0.5) - EAST.velocity(z, 0.5)
    torch.testing.assert_close(pushed, 2 * (EAST.velocity(z, 0.5) - WORLD.anything.velocity(z, 0.5)))


def test_a_bad_state_and_a_bad_teacher_can_be_told_apart() -> None:
    """A moved teacher is wrong everywhere by what it was moved; far states are unlikely under the right one."""
    drawn = torch.Generator().manual_seed(8)
    good = WORLD.concept.sample(4000, drawn)
    wrong = WORLD.concept.moved((0.5, 0.0))
    reached = mixture.flow(wrong.velocity, torch.randn(4000, 2, dtype=torch.float64, generator=drawn), 1.0, 0.0)
    assert torch.allclose(reached.mean(0) - good.mean(0), torch.tensor([0.5, 0.0], dtype=torch.float64), atol=0.03)
    assert WORLD.concept.log_density(reached).mean() < WORLD.concept.log_density(good).mean() - 2
    elsewhere = WORLD.anything.sample(4000, drawn)
    assert WORLD.concept.log_density(elsewhere).max() < WORLD.concept.log_density(good).min()


def test_mixtures_of_mixtures_keep_their_weights() -> None:
    both = mixture.together([EAST, UNEVEN], [1, 3])
    z = torch.randn(20, 2, dtype=torch.float64)
    expected = (0.25 * EAST.log_density(z).exp() + 0.75 * UNEVEN.log_density(z).exp()).log()
    torch.testing.assert_close(both.log_density(z), expected)


def test_impossible_mixtures_are_refused() -> None:
    with pytest.raises(ValueError, match="above 0"):
        mixture.mixture([(0, 0)], 0.0)
    with pytest.raises(ValueError, match="weights"):
        replace(EAST, weight_K=torch.ones(3).double() / 3)
    with pytest.raises(ValueError, match="add up"):
        replace(EAST, weight_K=EAST.weight_K * 2)
