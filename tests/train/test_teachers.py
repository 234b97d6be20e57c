"""Targets that need more than the model itself: the delta, the bound, the preference, a picture in context.

Exact equalities on the miniature of a distilled model in float32; the numbering is that of test_preserve.py.
"""

import math
from typing import Any

import pytest
import torch

import terms
from detour.config.preserve import PLAIN, TermConfig
from detour.data.loader import Batch
from detour.nn import fields, lora
from detour.nn.flow import clean_from
from detour.nn.picture_tokens import picture_tokens, with_picture
from detour.train.objective import noise_like, sample_loss
from detour.train.preserve import Told
from minis import Mini
from terms import CONFIG, NETWORK, ROLLOUT, STEPS, attached, forwards, gradient, objective, step

Weights = dict[str, torch.Tensor]


@pytest.fixture
def batch(mini: Mini) -> Batch:
    return terms.batch_of(mini)


def states_of(mini: Mini, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """What a term on the data sees at step 0."""
    t_B, _ = mini.task.times(CONFIG, batch.latents_BCHW, CONFIG.seed, 0, 0)
    return mini.task.noising.noisy(batch.latents_BCHW, noise_like(batch.latents_BCHW, CONFIG.seed, 0, 0), t_B), t_B


# ---------------------------------------------------------------------------------------------------------- the delta


@pytest.mark.parametrize("states", ["data", "grid", "rollout"])
def test_a_delta_of_nothing_is_the_anchor(mini: Mini, trained: Weights, batch: Batch, states: Any) -> None:
    """(vii) A LoRA that changes nothing in the base leaves the untouched model as the target, bit for bit."""
    ours, theirs = mini.denoiser(NETWORK, trained), mini.denoiser(NETWORK, trained)
    a = step(objective(mini, ours, TermConfig(states=states, target="delta"), base=terms.base(mini, scale=0.0)), batch)
    b = step(objective(mini, theirs, TermConfig(states=states, target="frozen")), batch)
    assert torch.equal(a.loss, b.loss) and a.loss > 0
    assert all(torch.equal(x, y) for x, y in zip(gradient(ours).values(), gradient(theirs).values(), strict=True))


def test_the_delta_is_what_the_lora_changes_in_the_base(mini: Mini, batch: Batch) -> None:
    """The loss of an untrained LoRA is gain^2 times the squared change. Everything but the LoRA stays as it was."""
    base, denoiser = terms.base(mini), mini.denoiser(NETWORK)
    before = {name: parameter.clone() for name, parameter in base.denoiser.named_parameters()}
    out = step(objective(mini, denoiser, TermConfig(target="delta", gain=2.0), base=base), batch)
    z, t_B = states_of(mini, batch)
    with torch.no_grad():
        changed = mini.arch.predict(base.denoiser, z, t_B, mini.conditions)
        with base.change.removed():
            unchanged = mini.arch.predict(base.denoiser, z, t_B, mini.conditions)
    torch.testing.assert_close(out.loss, 4 * (changed - unchanged).square().mean())
    assert out.loss > 0 and base.change.active
    for name, parameter in base.denoiser.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.grad is None, name


def test_an_error_in_the_base_leaves_its_lora_on(
    mini: Mini, trained: Weights, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """(v)"""
    base = terms.base(mini)
    ours = objective(mini, mini.denoiser(NETWORK, trained), TermConfig(target="delta"), base=base)

    def failing(*_: Any, **__: Any) -> None:
        if not base.change.active:
            raise RuntimeError("out of memory")
        return real(*_, **__)

    real = base.denoiser.forward
    monkeypatch.setattr(base.denoiser, "forward", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        step(ours, batch)
    assert base.change.active


# ---------------------------------------------------------------------------------------------------------- the bound


def test_a_wide_bound_is_the_picture_and_a_tight_one_the_untouched_model(
    mini: Mini, trained: Weights, batch: Batch
) -> None:
    losses = {}
    for name, term in {
        "picture": PLAIN,
        "wide": TermConfig(target="bounded", radius=1e6),
        "untouched": TermConfig(target="frozen"),
        "tight": TermConfig(target="bounded", radius=1e-9),
    }.items():
        losses[name] = step(objective(mini, mini.denoiser(NETWORK, trained), term), batch).loss
    torch.testing.assert_close(losses["wide"], losses["picture"], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(losses["tight"], losses["untouched"], rtol=1e-3, atol=1e-6)
    assert losses["picture"] > 2 * losses["untouched"]


def test_on_its_own_states_the_bound_leads_to_the_captions_picture(mini: Mini, batch: Batch) -> None:
    """An untrained LoRA's loss, in clean pictures, is how far the bound lets them move: radius times the norm."""
    term = TermConfig(states="rollout", target="bounded", radius=0.05, weighting="clean", which="all")
    denoiser = mini.denoiser(NETWORK)
    ours = objective(mini, denoiser, term)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    handle = denoiser.register_forward_pre_hook(
        lambda _, args: seen.append((torch.stack(args[0]).squeeze(2), 1 - args[1])) if torch.is_grad_enabled() else None
    )
    out = step(ours, batch)
    handle.remove()
    moved = []
    for index, (z, t_B) in enumerate(seen):
        picture = batch.latents_BCHW[index // STEPS][None]
        with torch.no_grad():
            clean = clean_from(z, mini.arch.predict(denoiser, z, t_B, [mini.conditions[index // STEPS]]), t_B)
        assert (picture - clean).norm() > 0.05 * clean.norm(), "or the bound would not be reached"
        moved.append((0.05 * clean).square().mean())
    assert len(seen) == 2 * STEPS
    torch.testing.assert_close(out.loss, torch.stack(moved).mean(), rtol=1e-3, atol=1e-6)


def test_only_late_states_where_asked(mini: Mini, trained: Weights, batch: Batch) -> None:
    """The grid is 1, .9, .75, .5."""
    ours = objective(mini, mini.denoiser(NETWORK, trained), ROLLOUT.model_copy(update={"below": 0.75}))
    times = {round(float(t), 4) for number in range(8) for t in step(ours, batch, number=number).t_B}
    assert times == {0.75, 0.5}


# ----------------------------------------------------------------------------------------------------- the preference

PREFERENCE = TermConfig(states="grid", target="preference", beta=5.0)


def test_an_untrained_lora_prefers_nothing(mini: Mini, batch: Batch) -> None:
    """(viii) log 2, and a gradient that is beta / 2 times that of the difference of the errors."""
    denoiser = mini.denoiser(NETWORK)
    ours = objective(mini, denoiser, PREFERENCE)
    out = step(ours, batch)
    torch.testing.assert_close(out.per_sample_B, torch.full((2,), math.log(2)))
    assert any(grad is not None and grad.any() for grad in gradient(denoiser).values())


def test_the_preference_is_that_of_fields(mini: Mini, trained: Weights, batch: Batch) -> None:
    """Each picture with plain training's noise, against what the untouched model draws from a noise that is kept."""
    denoiser = mini.denoiser(NETWORK, trained)
    ours = objective(mini, denoiser, PREFERENCE)
    with forwards(denoiser) as counts:
        out = step(ours, batch)
    assert counts == {"with": 4, "without": 4 + 2 * STEPS}
    with forwards(denoiser) as counts:
        drawn, noise = ours.unwanted.of(batch)
    assert counts == {"with": 0, "without": 0}, "drawn once"
    errors: dict[str, list[torch.Tensor]] = {"trained": [], "frozen": []}
    for clean, eps in ((batch.latents_BCHW, noise_like(batch.latents_BCHW, CONFIG.seed, 0, 0)), (drawn, noise)):
        z, goal = mini.task.noising.noisy(clean, eps, out.t_B), mini.task.noising.target(clean, eps, out.t_B)
        with torch.no_grad():
            errors["trained"].append(
                sample_loss(mini.arch.predict(denoiser, z, out.t_B, mini.conditions), goal, CONFIG)
            )
            with lora.disabled(denoiser):
                said = mini.arch.predict(denoiser, z, out.t_B, mini.conditions)
            errors["frozen"].append(sample_loss(said, goal, CONFIG))
    expected = fields.preference(tuple(errors["trained"]), tuple(errors["frozen"]), 5.0)  # type: ignore[arg-type]
    torch.testing.assert_close(out.per_sample_B, expected, rtol=1e-4, atol=1e-5)


def test_the_unwanted_is_the_untouched_models_own_picture(mini: Mini, trained: Weights, batch: Batch) -> None:
    """Bit for bit what the model without LoRA and adapter draws from that noise, whoever asks for it when."""
    denoiser, plain = mini.denoiser(NETWORK, trained), mini.denoiser(NETWORK)
    ours = objective(mini, denoiser, PREFERENCE, adapter=attached(mini, denoiser))
    with ours.teachers.deployed():
        drawn, noise = ours.unwanted.of(batch)
    theirs = objective(mini, plain, PREFERENCE)
    for index in range(2):
        expected = theirs.sampler.draw(plain, noise[index : index + 1], mini.conditions[index : index + 1])
        assert torch.equal(drawn[index : index + 1], expected)
    assert not torch.equal(noise[0], noise[1])
    again = theirs.unwanted.of(batch)
    assert torch.equal(again[0], drawn) and torch.equal(again[1], noise)


# ------------------------------------------------------------------------------------------------- a picture in context


def test_the_picture_comes_before_the_caption(mini: Mini, batch: Batch) -> None:
    """The trained model is told the caption, its teacher the caption after the picture's own tokens."""
    count, width = 4, 64  # of the miniature's encoder: 4 tokens of 4 * 16 features
    term = TermConfig(target="frozen", teacher_told="picture")
    denoiser = mini.denoiser(NETWORK)
    asked: list[list[torch.Tensor]] = []
    handle = denoiser.register_forward_pre_hook(lambda _, args: asked.append(args[2]))
    out = step(objective(mini, denoiser, term, told=Told(picture_tokens=count)), batch)
    handle.remove()
    teacher, student = asked
    for index, condition in enumerate(mini.conditions):
        tokens = condition["tokens_LD"]
        assert torch.equal(student[index], tokens)
        assert teacher[index].shape == (count + len(tokens), width)
        assert torch.equal(teacher[index][:count], picture_tokens(batch.latents_BCHW[index][None], count)[0])
        assert torch.equal(teacher[index], with_picture(tokens, batch.latents_BCHW[index], count))
    assert out.loss > 0


def test_on_rollouts_each_picture_is_its_own_context(mini: Mini, trained: Weights, batch: Batch) -> None:
    term = ROLLOUT.model_copy(update={"teacher_told": "picture"})
    denoiser = mini.denoiser(NETWORK, trained)
    asked: list[torch.Tensor] = []
    handle = denoiser.register_forward_pre_hook(lambda _, args: asked.append(args[2][0]))
    step(objective(mini, denoiser, term, told=Told(picture_tokens=4)), batch)
    handle.remove()
    lengths = {len(condition["tokens_LD"]) for condition in mini.conditions}
    teachers = [tokens[:4] for tokens in asked if len(tokens) - 4 in lengths and len(tokens) not in lengths]
    expected = [picture_tokens(latents[None], 4)[0] for latents in batch.latents_BCHW]
    assert len(teachers) == 2
    assert all(torch.equal(a, b) for a, b in zip(teachers, expected, strict=True))
