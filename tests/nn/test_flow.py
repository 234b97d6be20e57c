"""The flow-matching formulas: against their definitions, diffusers' scheduler and PyWavelets."""

import numpy as np
import pytest
import pywt
import torch
from hypothesis import given
from hypothesis import strategies as st

from detour.nn import flow

TIMES = st.floats(0, 1)
SHIFTS = st.floats(0.25, 12)


def pair(shape=(3, 4, 6, 8)):
    g = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=g, dtype=torch.float64), torch.randn(shape, generator=g, dtype=torch.float64)


def test_state_runs_from_clean_to_noise_and_velocity_is_its_derivative():
    z0, eps = pair()
    assert torch.equal(flow.noisy(z0, eps, torch.zeros(3)), z0)
    assert torch.equal(flow.noisy(z0, eps, torch.ones(3)), eps)
    t_B = torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64)
    derivative = (flow.noisy(z0, eps, t_B + 1e-3) - flow.noisy(z0, eps, t_B - 1e-3)) / 2e-3
    torch.testing.assert_close(derivative, flow.velocity(z0, eps), rtol=0, atol=1e-9)


def test_each_sample_has_its_own_time_also_with_a_frame_axis():
    for shape in ((3, 4, 6, 8), (3, 4, 2, 6, 8)):
        z0, eps = pair(shape)
        t_B = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
        z = flow.noisy(z0, eps, t_B)
        for i, t in enumerate((0.0, 0.25, 1.0)):
            torch.testing.assert_close(z[i], (1 - t) * z0[i] + t * eps[i])


def test_clean_picture_comes_back_from_state_and_velocity():
    z0, eps = pair()
    t_B = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)
    torch.testing.assert_close(flow.clean_from(flow.noisy(z0, eps, t_B), flow.velocity(z0, eps), t_B), z0)


@given(TIMES, SHIFTS)
def test_shift_keeps_the_ends_and_has_an_inverse(t, shift):
    shifted = flow.shift_time(t, shift)
    assert 0 <= shifted <= 1 + 1e-12
    assert flow.unshift_time(shifted, shift) == pytest.approx(t, abs=1e-9)
    assert (shifted - t) * (shift - 1) >= -1e-12, "above 1 towards noise, below 1 towards clean"
    assert flow.shift_time(0.0, shift) == 0
    assert flow.shift_time(1.0, shift) == pytest.approx(1)


def test_shift_3_gives_the_published_grids_for_numbers_and_tensors():
    assert [flow.shift_time(k / 4, 3.0) for k in (4, 3, 2, 1, 0)] == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    eight = flow.shift_time(torch.arange(8, -1, -1) / 8, 3.0)
    expected = [1, 0.9545, 0.9, 0.8333, 0.75, 0.6429, 0.5, 0.3, 0]
    torch.testing.assert_close(eight, torch.tensor(expected), rtol=0, atol=5e-5)


@pytest.mark.parametrize("size", [(6, 8), (5, 8), (6, 7), (5, 7), (1, 1)])
def test_haar_is_that_of_pywavelets(size):
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    average, (rows, columns, both) = pywt.dwt2(x.numpy(), "haar", mode="symmetric", axes=(-2, -1))
    expected = np.concatenate([average, rows, columns, both], axis=1)
    np.testing.assert_allclose(flow.haar(x).numpy(), expected, rtol=0, atol=1e-12)


def test_haar_is_orthonormal():
    x, y = pair()
    torch.testing.assert_close((flow.haar(x) * flow.haar(y)).sum(), (x * y).sum())
