"""Times: distributions, bias, limits, and that every draw is a pure function of (seed, step, micro-batch, place)."""

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from detour import UserError
from detour.config.job import TimestepType, TrainConfig
from detour.nn.flow import shift_time
from detour.train.timesteps import FEW_STEPS, WEIGHTS, check_times, draw_times, state_times, weight_at

ALL = get_args(TimestepType)
CONTINUOUS = [kind for kind in ALL if kind not in FEW_STEPS and kind != "next_sample"]
SHIFT, N = 3.0, 10_000


def config(kind, **options) -> TrainConfig:
    return TrainConfig(timestep_type=kind, **options)


def drawn(kind, n=N, shift=SHIFT, **options) -> np.ndarray:
    return draw_times(config(kind, **options), shift, n, 1, 0, 0)[0].double().numpy()


@pytest.mark.parametrize("kind", ALL)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**40), step=st.integers(0, 10**6), micro=st.integers(0, 64), n=st.integers(1, 9))
def test_a_draw_depends_on_seed_step_micro_batch_and_place_alone(kind, seed, step, micro, n):
    few, few_weights = draw_times(config(kind), SHIFT, n, seed, step, micro)
    torch.manual_seed(seed % 7)  # the global state has no say
    many, many_weights = draw_times(config(kind), SHIFT, 10, seed, step, micro)
    assert few.dtype == few_weights.dtype == torch.float32
    assert torch.equal(few, many[:n])
    assert torch.equal(few_weights, many_weights[:n])
    assert bool(((few >= 0) & (few <= 1) & few.isfinite()).all())


def test_every_part_of_the_address_changes_the_draw():
    def first(seed, step, micro):
        return float(draw_times(config("linear"), SHIFT, 1, seed, step, micro)[0][0])

    assert len({first(s, t, m) for s in range(5) for t in range(5) for m in range(5)}) == 125
    assert len(set(drawn("linear").tolist())) > 0.99 * N


def test_draws_are_the_same_in_every_version():
    """Pinned: a change here changes what every resumed run trains."""
    t_B, _ = draw_times(config("sigmoid"), SHIFT, 3, 42, 7, 1)
    torch.testing.assert_close(t_B, torch.tensor([0.1401669830, 0.5134992003, 0.4162016809]), rtol=1e-6, atol=0)


EXACT = {
    "linear": stats.uniform(0, 1).cdf,
    "weighted": stats.uniform(0, 1).cdf,
    "sigmoid": lambda t: stats.norm.cdf(np.log(t / (1 - t))),
    "shift": lambda t: t / (SHIFT - (SHIFT - 1) * t),
}


@pytest.mark.parametrize("kind", EXACT)
def test_distribution(kind):
    assert stats.kstest(drawn(kind), EXACT[kind]).pvalue > 0.01


@pytest.mark.parametrize("kind", EXACT)
def test_distribution_within_limits_is_the_conditional_one(kind):
    low, high, cdf = 0.2, 0.7, EXACT[kind]
    times = drawn(kind, min_timestep=low, max_timestep=high)
    assert times.min() >= low - 1e-7
    assert times.max() <= high + 1e-7
    assert stats.kstest(times, lambda t: (cdf(t) - cdf(low)) / (cdf(high) - cdf(low))).pvalue > 0.01


def reference_blend(tables: int) -> np.ndarray:
    """The published recipe, many tables of it: 750 of a log-normal, scaled by their own largest, and 250 even times."""
    rng, out = np.random.default_rng(0), []
    for _ in range(tables):
        x = rng.lognormal(0, 0.333, 750)
        out += [1 - x / x.max(), np.linspace(1, 0.001, 250)]
    return np.concatenate(out)


def test_lognorm_blend_is_close_to_the_published_recipe():
    """Not equal: the largest of 750 draws scatters there (2.5 to 3.8). The largest distance of the cdfs is small."""
    times, reference = drawn("lognorm_blend"), reference_blend(200)
    assert stats.ks_2samp(times, reference).statistic < 0.06
    assert times.mean() == pytest.approx(reference.mean(), abs=0.02)
    assert times.std() == pytest.approx(reference.std(), abs=0.02)


def test_lognorm_blend_is_three_quarters_lognormal():
    """Its log-normal part has no time above 1 - 1/2.91^2 = .88, so what lies above is from the even quarter."""
    times = drawn("lognorm_blend")
    assert (times > 0.9).mean() == pytest.approx(0.25 * 0.1, abs=0.005)
    assert np.median(times) == pytest.approx(0.64, abs=0.02)
    limited = drawn("lognorm_blend", min_timestep=0.5, max_timestep=0.75)
    inside = times[(times >= 0.5) & (times <= 0.75)]
    assert stats.ks_2samp(limited, inside).pvalue > 0.01


@pytest.mark.parametrize("kind", CONTINUOUS)
def test_bias_is_cubic_in_the_place_from_the_noisy_end(kind):
    """For u uniform, high noise is at place u^3, low noise at 1 - u^3: P(place < x) is x^(1/3) or 1 - (1-x)^(1/3)."""
    balanced, high, low = (np.sort(drawn(kind, timestep_bias=b)) for b in ("balanced", "high_noise", "low_noise"))
    assert low.mean() < balanced.mean() < high.mean()
    for share in (0.1, 0.3, 0.5, 0.8):  # of the balanced draws that are noisier than this time
        time = np.quantile(balanced, 1 - share)
        assert (high > time).mean() == pytest.approx(share ** (1 / 3), abs=0.02)
        assert (low > time).mean() == pytest.approx(1 - (1 - share) ** (1 / 3), abs=0.02)


@pytest.mark.parametrize("kind", CONTINUOUS)
@settings(max_examples=30, deadline=None)
@given(
    low=st.floats(0, 0.98),
    width=st.floats(0.01, 1),
    bias=st.sampled_from(["balanced", "high_noise", "low_noise"]),
    shift=st.floats(0.5, 8),
)
def test_limits_hold_for_every_type_and_bias(kind, low, width, bias, shift):
    high = min(low + width, 1.0)
    times = drawn(kind, 40, shift, min_timestep=low, max_timestep=high, timestep_bias=bias)
    assert times.min() >= low - 1e-7
    assert times.max() <= high + 1e-7


FIXED = {
    "one_step": [1],
    "two_step": [1, 0.501],
    "four_step": [1, 0.75, 0.5, 0.25],
    "eight_step": [1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125],
}


@pytest.mark.parametrize("kind", FIXED)
def test_few_steps_are_the_fixed_places_of_the_even_table_drawn_evenly(kind):
    times, counts = np.unique(drawn(kind), return_counts=True)
    assert times[::-1].tolist() == pytest.approx(FIXED[kind], abs=1e-6)
    assert len(counts) == 1 or stats.chisquare(counts).pvalue > 0.01


def test_few_steps_obey_limits_and_bias():
    assert set(drawn("four_step", 100, min_timestep=0.4, max_timestep=0.8).tolist()) == {0.75, 0.5}
    assert drawn("eight_step", timestep_bias="high_noise").mean() > 0.7
    assert drawn("eight_step", timestep_bias="low_noise").mean() < 0.4


def test_limits_that_leave_no_time_are_an_error_that_lists_the_times():
    wrong = config("four_step", min_timestep=0.8, max_timestep=0.9)
    with pytest.raises(UserError, match=r"0\.8 and train\.max_timestep 0\.9 .*four_step.*1, 0\.75, 0\.5, 0\.25"):
        check_times(wrong, SHIFT)
    with pytest.raises(UserError):
        draw_times(wrong, SHIFT, 1, 0, 0, 0)
    check_times(config("four_step"), SHIFT)


def test_next_sample_pairs_are_neighbours_on_the_sampling_grid():
    grid = torch.tensor([shift_time(k / 8, SHIFT) for k in range(8, 0, -1)])
    cfg = config("next_sample")
    trained, start = draw_times(cfg, SHIFT, 2000, 3, 0, 0)[0], state_times(cfg, SHIFT, 2000, 3, 0, 0)
    places = (grid[None] - start[:, None]).abs().argmin(1)
    assert torch.equal(grid[places], start)
    assert torch.equal(grid[places + 1], trained)
    counts = torch.bincount(places)
    assert len(counts) == 7
    assert stats.chisquare(counts.numpy()).pvalue > 0.01


def test_next_sample_s_limits_are_about_the_trained_time():
    cfg = config("next_sample", min_timestep=0.6, max_timestep=0.96)
    trained, start = draw_times(cfg, SHIFT, 200, 3, 0, 0)[0], state_times(cfg, SHIFT, 200, 3, 0, 0)
    torch.testing.assert_close(trained.unique(), torch.tensor([9 / 14, 0.75, 5 / 6, 0.9, 21 / 22]))
    assert float(start.max()) == 1.0


def test_only_next_sample_starts_elsewhere():
    assert all(state_times(config(kind), SHIFT, 2, 0, 0, 0) is None for kind in ALL if kind != "next_sample")


def test_weights_follow_the_published_figures():
    """Values of the published table (place: weight), most of them not among the knots; its mean is 1."""
    published = {
        0: 0.906, 50: 1.375, 100: 1.507, 200: 1.441, 300: 1.264, 400: 1.083,
        500: 0.925, 600: 0.805, 800: 0.716, 900: 0.716, 950: 0.582, 999: 0.447,
    }  # fmt: skip
    times = torch.tensor([1 - place / 1000 for place in published], dtype=torch.float64)
    torch.testing.assert_close(weight_at(times), torch.tensor([*published.values()]).double(), rtol=0.03, atol=0)
    even = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    assert float(weight_at(even).mean()) == pytest.approx(1, abs=1e-6)
    assert 0.75 < float(even[weight_at(even).argmax()]) < 0.95
    assert [t for t, _ in WEIGHTS] == sorted(t for t, _ in WEIGHTS)


def test_only_weighted_weighs():
    t_B, weight_B = draw_times(config("weighted"), SHIFT, 50, 0, 0, 0)
    torch.testing.assert_close(weight_B, weight_at(t_B))
    for kind in ALL:
        if kind != "weighted":
            assert torch.equal(draw_times(config(kind), SHIFT, 5, 0, 0, 0)[1], torch.ones(5))


def test_an_unresolved_job_is_a_programming_error():
    with pytest.raises(AssertionError, match="resolve"):
        draw_times(TrainConfig(), SHIFT, 1, 0, 0, 0)
