"""The loss of a micro-batch against plain formulas and diffusers' scheduler, gradients too; purity; validation."""

from dataclasses import replace
from types import SimpleNamespace
from typing import get_args

import pytest
import pywt
import torch
from torch import nn

from detour.archs.base import Framing
from detour.config.job import TimestepType, TrainConfig
from detour.data.loader import Batch
from detour.nn.flow import FlowMatching, clean_from, noisy, shift_time
from detour.train.objective import Task, evaluating, noise_like, sample_loss, training_loss, validation_loss
from detour.train.timesteps import draw_times, state_times

LOSSES = ("mse", "mae", "huber", "wavelet")
KINDS = get_args(TimestepType)


class Denoiser(nn.Module):
    """A small convolution that sees the time and the condition."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(4, 8, 3, padding=1)
        self.leave = nn.Conv2d(8, 4, 3, padding=1)
        self.dropout = nn.Dropout(0.5)
        g = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for param in self.parameters():
                param.copy_(0.3 * torch.randn(param.shape, generator=g))

    def forward(self, z, t, c):
        return self.leave(self.dropout(torch.tanh(self.enter(z) * (1 + t) + c)))


class Arch:
    spec = SimpleNamespace(shift_at=lambda latent_HW, variant: 3.0)

    def picture_condition(self, framing, guidance):
        return {}

    def predict(self, denoiser, z, t_B, conditions):
        c = torch.stack([condition["tokens_LD"].mean() for condition in conditions])
        return denoiser(z, t_B[:, None, None, None], c[:, None, None, None]).float()


ARCH = Arch()
TASK = Task(ARCH, FlowMatching())


def model() -> Denoiser:
    return Denoiser().train(False)


def batch(n=3, masks=False, size=(8, 6)) -> Batch:
    g = torch.Generator().manual_seed(5)
    mask = torch.rand(n, 1, *size, generator=g) + 0.1
    return Batch(
        latents_BCHW=torch.randn(n, 4, *size, generator=g),
        names=[f"{i}.png" for i in range(n)],
        framings=[Framing.whole(64, 64)] * n,
        conditions=[{"tokens_LD": torch.randn(5, 3, generator=g)} for _ in range(n)],
        weights_B=torch.tensor([1.0, 0.5, 2.0][:n]),
        masks_B1HW=mask / mask.mean((1, 2, 3), keepdim=True) if masks else None,
        prompts=["a picture"] * n,
        is_reg=False,
        epoch=0,
    )


def config(kind="weighted", loss="mse", **options) -> TrainConfig:
    return TrainConfig(timestep_type=kind, loss_type=loss, **options)


def plain_loss(net, b, cfg, seed, step, micro):
    """The same loss, one picture at a time in plain arithmetic (float64 unless the model says otherwise)."""
    times, time_weights = draw_times(cfg, 3.0, len(b.names), seed, step, micro)
    starts = state_times(cfg, 3.0, len(b.names), seed, step, micro)
    noise, total = noise_like(b.latents_BCHW, seed, step, micro), 0.0
    for i in range(len(b.names)):
        x0, eps, t = b.latents_BCHW[i : i + 1], noise[i : i + 1], times[i]
        z = (1 - t) * x0 + t * eps
        if starts is not None:
            with torch.no_grad():
                z = (1 - starts[i]) * x0 + starts[i] * eps
                z = z + (t - starts[i]) * ARCH.predict(net, z, starts[i : i + 1], b.conditions[i : i + 1])
            eps = (z - (1 - t) * x0) / t  # the noise that this state implies
        v = ARCH.predict(net, z, t[None], b.conditions[i : i + 1])
        if cfg.loss_type == "mse":
            error = torch.nn.functional.mse_loss(v, eps - x0, reduction="none")
        elif cfg.loss_type == "mae":
            error = torch.nn.functional.l1_loss(v, eps - x0, reduction="none")
        elif cfg.loss_type == "huber":
            size = (v - (eps - x0)).abs()
            error = torch.where(size < cfg.huber_delta, size**2 / 2, cfg.huber_delta * (size - cfg.huber_delta / 2))
        else:
            error = (bands(eps - v) - bands(x0)) ** 2
        if b.masks_B1HW is not None:
            mask = b.masks_B1HW[i]
            if cfg.loss_type == "wavelet":
                mask = (mask[:, 0::2, 0::2] + mask[:, 1::2, 0::2] + mask[:, 0::2, 1::2] + mask[:, 1::2, 1::2]) / 4
            error = error * mask
        total = total + error.mean() * time_weights[i] * b.weights_B[i]
    return total / len(b.names)


def bands(x):
    """Haar bands through matrix products with PyWavelets' own filters."""
    wavelet = pywt.Wavelet("haar")
    low, high = torch.tensor(wavelet.dec_lo), torch.tensor(wavelet.dec_hi)

    def matrix(n, taps):
        out = torch.zeros(n // 2, n)
        for i in range(n // 2):
            out[i, 2 * i : 2 * i + 2] = taps.float()
        return out

    rows, columns = x.shape[-2:]
    return torch.cat([matrix(rows, a) @ x @ matrix(columns, b).T for a in (low, high) for b in (low, high)], dim=1)


def gradients(net):
    return torch.cat([p.grad.flatten() for p in net.parameters()])


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kind", ["weighted", "next_sample"])
def test_loss_and_gradients_equal_a_plain_formula(kind, loss, masks):
    """Relative 1e-6 in float32, as promised."""
    ours, theirs, b = model(), model(), batch(masks=masks)
    cfg = config(kind, loss)
    out = training_loss(TASK, ours, b, cfg, 11, 2, 1)
    expected = plain_loss(theirs, b, cfg, 11, 2, 1)
    out.loss.backward()
    expected.backward()
    assert relative(out.loss.detach(), expected.detach()) < 1e-6
    assert relative(gradients(ours), gradients(theirs)) < 1e-6
    assert out.loss.dtype == out.per_sample_B.dtype == torch.float32
    assert not out.per_sample_B.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_every_timestep_type_trains(kind):
    net = model()
    out = training_loss(TASK, net, batch(), config(kind), 0, 0, 0)
    out.loss.backward()
    assert out.loss.isfinite()
    assert gradients(net).norm() > 0
    assert out.t_B.shape == out.per_sample_B.shape == (3,)


def test_equals_a_training_step_written_with_diffusers():
    """Noise, target and loss as in diffusers' training scripts, at times of its own scheduler."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler, ours, theirs = FlowMatchEulerDiscreteScheduler(), model(), model()
    b = replace(batch(), weights_B=torch.ones(3))
    cfg = config("four_step")  # 1, .75, .5, .25: exact entries of its table of 1000
    out = training_loss(TASK, ours, b, cfg, 3, 0, 0)
    noise = noise_like(b.latents_BCHW, 3, 0, 0)
    noisy_input = scheduler.scale_noise(b.latents_BCHW, out.t_B * 1000, noise)
    prediction = ARCH.predict(theirs, noisy_input, out.t_B, b.conditions)
    expected = ((prediction.float() - (noise - b.latents_BCHW).float()) ** 2).reshape(3, -1).mean(1).mean()
    out.loss.backward()
    expected.backward()
    assert relative(out.loss.detach(), expected.detach()) < 1e-6
    assert relative(gradients(ours), gradients(theirs)) < 1e-6


class Oracle:
    """Predicts the true velocity of the one picture it knows: z_t = (1-t) z0 + t eps, so v = (z - z0) / t."""

    spec = SimpleNamespace(shift_at=lambda latent_HW, variant: 3.0)

    def picture_condition(self, framing, guidance):
        return {}

    def __init__(self, z0):
        self.z0, self.seen = z0, []

    def predict(self, denoiser, z, t_B, conditions):
        self.seen.append((t_B, z))
        return (z - self.z0) / t_B[:, None, None, None]


@pytest.mark.parametrize("kind", KINDS)
def test_the_true_velocity_has_no_loss(kind):
    b = batch()
    out = training_loss(Task(Oracle(b.latents_BCHW), FlowMatching()), model(), b, config(kind), 1, 4, 0)
    assert float(out.loss) < 1e-9


def test_next_sample_steps_along_the_grid_without_gradient():
    b, net = batch(), model()
    seen = []

    class Watch(Arch):
        def predict(self, denoiser, z, t_B, conditions):
            seen.append((t_B.tolist(), torch.is_grad_enabled(), z))
            return super().predict(denoiser, z, t_B, conditions)

    training_loss(Task(Watch(), FlowMatching()), net, b, config("next_sample"), 1, 4, 0)
    (start, first_grad, z), (end, second_grad, z_next) = seen
    assert (first_grad, second_grad) == (False, True)
    grid = [shift_time(k / 8, 3.0) for k in range(8, 0, -1)]
    places = [min(range(8), key=lambda k, t=t: abs(grid[k] - t)) for t in start]
    assert end == pytest.approx([grid[k + 1] for k in places])
    start_B, end_B = torch.tensor(start), torch.tensor(end)
    assert torch.equal(z, noisy(b.latents_BCHW, noise_like(z, 1, 4, 0), start_B))
    step = (end_B - start_B)[:, None, None, None] * ARCH.predict(net, z, start_B, b.conditions)
    torch.testing.assert_close(z_next, z + step)
    assert not z_next.requires_grad
    target = (z_next - b.latents_BCHW) / end_B[:, None, None, None]
    torch.testing.assert_close(clean_from(z_next, target, end_B), b.latents_BCHW)


def test_next_sample_keeps_its_gradients_inside_autocast():
    """autocast remembers the bf16 copy of a weight; the one made without gradient must not serve the second forward."""
    found = []
    for clear in (False, True):
        net = model()

        class Careful(Arch):
            def predict(self, *arguments):
                if clear:  # noqa: B023
                    torch.clear_autocast_cache()
                return super().predict(*arguments)

        with torch.autocast("cpu", torch.bfloat16):
            out = training_loss(Task(Careful(), FlowMatching()), net, batch(), config("next_sample"), 0, 0, 0)
        out.loss.backward()
        found.append(gradients(net))
    assert torch.equal(*found)
    assert found[0].norm() > 0


@pytest.mark.parametrize("size", [(8, 6), (2, 2)])
def test_wavelet_is_mse_by_parseval_when_the_sides_are_even(size):
    prediction, target = torch.randn(2, 4, *size), torch.randn(2, 4, *size)
    wavelet, mse = (sample_loss(prediction, target, config(loss=name)) for name in ("wavelet", "mse"))
    torch.testing.assert_close(wavelet, mse)


def test_wavelet_takes_odd_sides_and_masks():
    prediction, target, mask = torch.randn(2, 4, 5, 7), torch.randn(2, 4, 5, 7), torch.ones(2, 1, 5, 7)
    plain = sample_loss(prediction, target, config(loss="wavelet"))
    torch.testing.assert_close(sample_loss(prediction, target, config(loss="wavelet"), mask), plain)


@pytest.mark.parametrize("loss", LOSSES)
def test_arithmetic_is_float32_whatever_the_model_computes_in(loss):
    prediction, target = torch.randn(2, 4, 8, 6).bfloat16(), torch.randn(2, 4, 8, 6)
    expected = sample_loss(prediction.float(), target, config(loss=loss))
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            got = sample_loss(prediction, target, config(loss=loss), torch.ones(2, 1, 8, 6))
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


# --- purity ---------------------------------------------------------------------------------------------------------


def test_noise_is_normal_and_a_function_of_its_address_alone():
    big = noise_like(torch.empty(4, 16, 64, 64), 1, 2, 3)
    assert abs(float(big.mean())) < 0.01
    assert abs(float(big.std()) - 1) < 0.01
    torch.manual_seed(0)
    assert torch.equal(noise_like(torch.empty(2, 16, 64, 64, dtype=torch.bfloat16), 1, 2, 3), big[:2])
    assert big.dtype == torch.float32
    others = [noise_like(torch.empty(1, 16, 64, 64), *a) for a in ((0, 2, 3), (1, 0, 3), (1, 2, 0))]
    assert all(abs(float((other[0] * big[0]).mean())) < 0.02 for other in others)
    assert abs(float((big[0] * big[1]).mean())) < 0.02


@pytest.mark.parametrize("kind", ["sigmoid", "next_sample"])
def test_a_picture_s_loss_does_not_depend_on_who_shares_its_batch(kind):
    b = batch()
    whole = training_loss(TASK, model(), b, config(kind), 7, 1, 0)
    part = training_loss(TASK, model(), next(split(b, 2)), config(kind), 7, 1, 0)
    torch.testing.assert_close(part.per_sample_B, whole.per_sample_B[:2], rtol=1e-6, atol=0)
    assert torch.equal(part.t_B, whole.t_B[:2])
    again = training_loss(TASK, model(), b, config(kind), 7, 1, 0)
    assert torch.equal(again.per_sample_B, whole.per_sample_B)


def test_the_weight_of_a_regularisation_set_is_not_counted_twice():
    """The loader has put `reg_weight` into the weights already."""
    b, cfg = batch(), config("linear", reg_weight=0.25)
    assert torch.equal(
        training_loss(TASK, model(), replace(b, is_reg=True), cfg, 0, 0, 0).loss,
        training_loss(TASK, model(), b, cfg, 0, 0, 0).loss,
    )


def test_weights_scale_the_loss_and_leave_the_report_alone():
    b = batch()
    one = training_loss(TASK, model(), replace(b, weights_B=torch.ones(3)), config("linear"), 0, 0, 0)
    half = training_loss(TASK, model(), replace(b, weights_B=torch.tensor([0.0, 1.0, 0.0])), config("linear"), 0, 0, 0)
    assert torch.equal(one.per_sample_B, half.per_sample_B)
    torch.testing.assert_close(half.loss, one.per_sample_B[1] / 3)
    torch.testing.assert_close(one.loss, one.per_sample_B.mean())


def test_the_callers_batch_is_not_changed():
    b = batch(masks=True)
    before = [t.clone() for t in (b.latents_BCHW, b.weights_B, b.masks_B1HW)]
    training_loss(TASK, model(), b, config("weighted"), 0, 0, 0)
    assert all(torch.equal(x, y) for x, y in zip(before, (b.latents_BCHW, b.weights_B, b.masks_B1HW), strict=True))


# --- validation -----------------------------------------------------------------------------------------------------


def split(b, *sizes):
    start = 0
    for n in sizes:
        at = slice(start, start + n)
        few = {name: getattr(b, name)[at] for name in ("latents_BCHW", "names", "conditions", "framings", "weights_B")}
        yield replace(b, **few)
        start += n


def test_validation_is_a_function_of_seed_and_picture():
    b, net = batch(), model()
    mean, by_time = validation_loss(TASK, net, [b], [0.25, 0.75, 1.0], 42)
    assert list(by_time) == ["0.25", "0.75", "1"]
    assert mean == pytest.approx(sum(by_time.values()) / 3)
    assert validation_loss(TASK, net, [b], [0.25, 0.75, 1.0], 42) == (mean, by_time)
    for parts in ((1, 2), (1, 1, 1)):
        other, _ = validation_loss(TASK, net, list(split(b, *parts))[::-1], [0.25, 0.75, 1.0], 42)
        assert other == pytest.approx(mean, rel=1e-6)
    assert validation_loss(TASK, net, [b], [0.25, 0.75, 1.0], 43)[0] != mean


def test_validation_is_the_plain_loss_at_those_times():
    b, net = batch(), model()
    oracle = Oracle(b.latents_BCHW)
    assert validation_loss(Task(oracle, FlowMatching()), net, [b], [0.5], 0)[0] < 1e-9
    t_B, z = oracle.seen[0]
    assert t_B.tolist() == [0.5] * 3
    eps = 2 * z - b.latents_BCHW
    expected = (ARCH.predict(net, z, t_B, b.conditions) - (eps - b.latents_BCHW)).square().mean().item()
    assert validation_loss(TASK, net, [b], [0.5], 0)[0] == pytest.approx(expected, rel=1e-5)
    b = replace(b, weights_B=torch.zeros(3), is_reg=True)
    assert validation_loss(TASK, net, [b], [0.5], 0)[0] == pytest.approx(expected, rel=1e-5), "weights have no say"


def test_validation_counts_masks():
    b = batch(masks=True)
    bare = replace(b, masks_B1HW=None)
    assert validation_loss(TASK, model(), [b], [0.5], 0) != validation_loss(TASK, model(), [bare], [0.5], 0)
    even = replace(b, masks_B1HW=torch.ones(3, 1, 8, 6))
    assert validation_loss(TASK, model(), [even], [0.5], 0) == validation_loss(TASK, model(), [bare], [0.5], 0)


def test_validation_switches_dropout_off_and_every_flag_back():
    net = Denoiser()
    net.enter.training, net.dropout.training = False, True
    flags = [part.training for part in net.modules()]
    before = torch.get_rng_state()
    first = validation_loss(TASK, net, [batch()], [0.5], 0)
    assert first == validation_loss(TASK, net, [batch()], [0.5], 0)
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(KeyError), evaluating(net):
        assert not any(part.training for part in net.modules())
        raise KeyError
    assert [part.training for part in net.modules()] == flags
    assert all(p.grad is None for p in net.parameters())


def test_validation_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="at least one picture"):
        validation_loss(TASK, model(), [], [0.5], 0)
    with pytest.raises(ValueError, match="at least one picture"):
        validation_loss(TASK, model(), [batch()], [], 0)
