"""The terms that keep the few steps: exact equalities, on the miniature of a distilled model in float32.

The numbering (i), (ii), ... is that of the equalities which any such implementation must have.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

import terms
from detour import sample
from detour.config.preserve import PLAIN, STRATEGIES, PreserveConfig, TermConfig, strategy_terms
from detour.data.loader import Batch
from detour.nn import lora
from detour.train.ema import Ema
from detour.train.objective import training_loss
from minis import Mini
from terms import CONFIG, NETWORK, ROLLOUT, STEPS, attached, forwards, gradient, objective, step

EVERY_TERM = [
    TermConfig(target="frozen"),
    TermConfig(states="grid", target="frozen"),
    ROLLOUT,
    TermConfig(states="rollout", target="frozen", which="all"),
    TermConfig(states="rollout", target="frozen", told="neutral"),
    TermConfig(states="rollout", target="average"),
]


@pytest.fixture
def batch(mini: Mini) -> Batch:
    return terms.batch_of(mini)


# ------------------------------------------------------------------------------------------------------ plain training


def test_plain_training_is_the_objective_bit_for_bit(
    mini: Mini, trained: dict[str, torch.Tensor], batch: Batch
) -> None:
    ours, theirs = mini.denoiser(NETWORK, trained), mini.denoiser(NETWORK, trained)
    out = step(objective(mini, ours, PLAIN), batch, share=0.5)
    expected = training_loss(mini.task, theirs, batch, CONFIG, CONFIG.seed, 0, 0)
    (expected.loss * 0.5).backward()
    assert torch.equal(out.loss, expected.loss)
    assert not out.loss.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(gradient(ours).values(), gradient(theirs).values(), strict=True))


def test_terms_add_up(mini: Mini, trained: dict[str, torch.Tensor], batch: Batch) -> None:
    terms = [PLAIN, TermConfig(target="frozen", scale=0.5)]
    both = mini.denoiser(NETWORK, trained)
    out = step(objective(mini, both, *terms), batch)
    grads, losses = [], []
    for term in terms:
        single = mini.denoiser(NETWORK, trained)
        losses.append(step(objective(mini, single, term), batch).loss)
        grads.append(gradient(single))
    torch.testing.assert_close(out.loss, losses[0] + losses[1])
    for name, grad in gradient(both).items():
        torch.testing.assert_close(grad, grads[0][name] + grads[1][name], rtol=1e-4, atol=1e-6)


def test_a_term_counts_only_every_so_many_steps(mini: Mini, trained: dict[str, torch.Tensor], batch: Batch) -> None:
    denoiser = mini.denoiser(NETWORK, trained)
    rare = objective(mini, denoiser, TermConfig(target="frozen", every=3))
    assert [step(rare, batch, number=n).loss > 0 for n in range(5)] == [True, False, False, True, False]


# ------------------------------------------------------------------------------------------------- exact equalities


@pytest.mark.parametrize("term", EVERY_TERM, ids=str)
def test_an_untrained_lora_has_neither_loss_nor_gradient(mini: Mini, batch: Batch, term: TermConfig) -> None:
    """(i) With B = 0 and teacher and student told the same, there is nothing to learn."""
    denoiser = mini.denoiser(NETWORK)
    parts = {"ema": Ema(lora.trainable(denoiser), 0.9)} if term.target == "average" else {}
    out = step(objective(mini, denoiser, term, **parts), batch)
    assert out.loss == 0
    assert all(not grad.any() for grad in gradient(denoiser).values() if grad is not None)


def test_state_by_state_is_the_sum(mini: Mini, trained: dict[str, torch.Tensor], batch: Batch) -> None:
    """(ii) and (iv): leading back at every state gives the gradient of the mean over the states that the sampler
    itself visits, which are bit for bit those of `sample.denoise`."""
    term = TermConfig(states="rollout", target="frozen", which="all", weighting="clean")
    ours = mini.denoiser(NETWORK, trained)
    one = replace(
        batch, latents_BCHW=batch.latents_BCHW[:1], conditions=batch.conditions[:1], prompts=batch.prompts[:1],
        weights_B=batch.weights_B[:1], names=["a"], framings=batch.framings[:1],
    )  # fmt: skip
    seen: list[tuple[float, torch.Tensor]] = []
    with visited(ours, seen):
        out = step(objective(mini, ours, term), one)

    theirs = mini.denoiser(NETWORK, trained)
    noise = seen[0][1]
    request = sample.Request(prompt="", seed=0, width=64, height=64, steps=STEPS)
    states: list[tuple[float, torch.Tensor]] = []
    with visited(theirs, states), torch.no_grad():
        final = sample.denoise(mini.arch, theirs, mini.scheduler, noise, request, one.conditions)
    assert [t for t, _ in seen] == pytest.approx([1.0, 0.9, 0.75, 0.5])
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in zip(seen, states, strict=True))
    assert not torch.equal(final, noise)

    losses = []
    for t, z in states:
        t_B = torch.tensor([t], dtype=torch.float64)
        with torch.no_grad(), lora.disabled(theirs):
            target = mini.arch.predict(theirs, z, t_B, one.conditions)
        losses.append(t**2 * (mini.arch.predict(theirs, z, t_B, one.conditions) - target).square().mean())
    mean = torch.stack(losses).mean()
    mean.backward()
    torch.testing.assert_close(out.loss, mean.detach().float())
    for a, b in zip(gradient(ours).values(), gradient(theirs).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


@contextmanager
def visited(denoiser: nn.Module, seen: list[tuple[float, torch.Tensor]]) -> Iterator[None]:
    """The (t, z) that the trained model sees, teachers left out (they see the same)."""

    def note(_: nn.Module, args: tuple[Any, ...]) -> None:
        z, t = torch.stack(args[0]).squeeze(2), 1 - float(args[1][0])
        if not seen or not torch.equal(seen[-1][1], z):
            seen.append((round(t, 6), z.clone()))

    handle = denoiser.register_forward_pre_hook(note)
    yield
    handle.remove()


def test_weighting_by_the_clean_picture_is_t_squared(
    mini: Mini, trained: dict[str, torch.Tensor], batch: Batch
) -> None:
    """(iii)"""
    outs = {}
    for kind in ("velocity", "clean"):
        term = ROLLOUT.model_copy(update={"weighting": kind})
        outs[kind] = step(objective(mini, mini.denoiser(NETWORK, trained), term), batch)
    t_B = outs["velocity"].t_B
    assert torch.equal(t_B, outs["clean"].t_B)
    torch.testing.assert_close(outs["clean"].per_sample_B, t_B.square() * outs["velocity"].per_sample_B)


@pytest.mark.parametrize("term", [TermConfig(target="frozen"), ROLLOUT, TermConfig(target="contrast")], ids=str)
def test_an_error_leaves_the_model_as_it_was(
    mini: Mini, trained: dict[str, torch.Tensor], batch: Batch, term: TermConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """(v) Adapter on, LoRA on, dropout on, weights the trained ones."""
    denoiser = mini.denoiser(NETWORK, trained)
    adapter = attached(mini, denoiser)
    ours = objective(mini, denoiser, term, adapter=adapter)
    before = mini.field(denoiser, batch.latents_BCHW, 0.5)
    for fails_at in range(3):
        calls = iter(range(100))
        real = denoiser.forward

        def failing(*args: Any, calls: Any = calls, fails_at: int = fails_at, real: Any = real, **options: Any) -> Any:
            if next(calls) == fails_at:
                raise RuntimeError("out of memory")
            return real(*args, **options)

        monkeypatch.setattr(denoiser, "forward", failing)
        with suppress(RuntimeError):
            step(ours, batch)
        monkeypatch.setattr(denoiser, "forward", real)
        assert adapter.active
        assert torch.equal(mini.field(denoiser, batch.latents_BCHW, 0.5), before)


def test_teachers_are_the_model_without_adapter_and_get_no_gradient(
    mini: Mini, trained: dict[str, torch.Tensor], batch: Batch
) -> None:
    """(vi) A preserving term is about the model as it will be used: the training adapter has no part in it."""
    with_adapter, without = mini.denoiser(NETWORK, trained), mini.denoiser(NETWORK, trained)
    adapter = attached(mini, with_adapter)
    for term in (TermConfig(target="frozen"), ROLLOUT):
        a = step(objective(mini, with_adapter, term, adapter=adapter), batch)
        b = step(objective(mini, without, term), batch)
        assert torch.equal(a.loss, b.loss) and a.loss > 0
    assert all(
        torch.equal(a, b) for a, b in zip(gradient(with_adapter).values(), gradient(without).values(), strict=True)
    )
    frozen = [p for p in with_adapter.parameters() if not p.requires_grad]
    assert all(p.grad is None for p in frozen)
    plain = [
        step(objective(mini, d, PLAIN, adapter=x), batch).loss for d, x in ((with_adapter, adapter), (without, None))
    ]
    assert plain[0] != plain[1], "the term of the pictures is trained with the adapter on"


# --------------------------------------------------------------------------------------------------------- the targets


def test_the_grid_is_the_samplers(mini: Mini, trained: dict[str, torch.Tensor], batch: Batch) -> None:
    ours = objective(mini, mini.denoiser(NETWORK, trained), TermConfig(states="grid"))
    assert ours.sampler.grid((8, 8), torch.device("cpu")) == pytest.approx([1.0, 0.9, 0.75, 0.5, 0.0])
    times = {round(float(t), 4) for n in range(12) for t in step(ours, batch, number=n).t_B}
    assert times == {1.0, 0.9, 0.75, 0.5}


def test_the_average_teaches(mini: Mini, trained: dict[str, torch.Tensor], batch: Batch) -> None:
    """An average that holds the untrained weights is the untouched model."""
    denoiser = mini.denoiser(NETWORK)
    ema = Ema(lora.trainable(denoiser), 0.9)
    lora.load_state(denoiser, trained)
    of_average = step(objective(mini, denoiser, ROLLOUT.model_copy(update={"target": "average"}), ema=ema), batch)
    of_frozen = step(objective(mini, mini.denoiser(NETWORK, trained), ROLLOUT), batch)
    torch.testing.assert_close(of_average.loss, of_frozen.loss)


def test_the_teacher_may_be_told_more(mini: Mini, batch: Batch) -> None:
    """An untrained LoRA's whole loss is then what the longer caption changes."""
    term = TermConfig(target="frozen", teacher_told="rich")
    denoiser = mini.denoiser(NETWORK)
    out = step(objective(mini, denoiser, term), batch)
    one, two = mini.conditions
    z, t_B = states_of(mini, batch)
    with torch.no_grad():
        gap = mini.arch.predict(denoiser, z, t_B, [one, two]) - mini.arch.predict(denoiser, z, t_B, [two, two])
    torch.testing.assert_close(out.loss, gap.square().mean())
    assert out.loss > 0


def states_of(mini: Mini, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The states that a term on the data sees at step 0."""
    from detour.train.objective import noise_like

    t_B, _ = mini.task.times(CONFIG, batch.latents_BCHW, CONFIG.seed, 0, 0)
    return mini.task.noising.noisy(batch.latents_BCHW, noise_like(batch.latents_BCHW, CONFIG.seed, 0, 0), t_B), t_B


def test_contrast_is_guidance_away_from_no_caption(mini: Mini, trained: dict[str, torch.Tensor], batch: Batch) -> None:
    denoiser = mini.denoiser(NETWORK, trained)
    plain = step(objective(mini, mini.denoiser(NETWORK, trained), PLAIN), batch)
    same = step(objective(mini, denoiser, TermConfig(target="contrast", gain=1.0)), batch)
    torch.testing.assert_close(same.loss, plain.loss)  # u + 1 (target - u) is the target
    far = step(objective(mini, denoiser, TermConfig(target="contrast", gain=3.0)), batch)
    assert far.loss > 1.5 * plain.loss


def test_the_path_of_one_small_step_is_the_step_and_of_many_where_they_lead(
    mini: Mini, trained: dict[str, torch.Tensor], batch: Batch
) -> None:
    """The target is the model as it was when the run began, with the training adapter where there is one."""
    term = TermConfig(states="rollout", target="path", path_steps=8)
    denoiser = mini.denoiser(NETWORK, trained)
    ours = objective(mini, denoiser, term)
    assert step(ours, batch).loss > 0  # eight small steps end elsewhere than one
    changed = {name: tensor * 1.5 for name, tensor in lora.state(denoiser).items()}
    lora.load_state(denoiser, changed)
    step(ours, batch)
    assert all(torch.equal(t, changed[name]) for name, t in lora.state(denoiser).items()), "the weights are put back"

    adapted = mini.denoiser(NETWORK, trained)
    adapter = attached(mini, adapted)
    with_adapter = step(objective(mini, adapted, term, adapter=adapter), batch)
    without = step(objective(mini, mini.denoiser(NETWORK, trained), term), batch)
    assert with_adapter.loss != without.loss
    assert adapter.active


# ------------------------------------------------------------------------------------------------- cost and choice


COSTS = {  # forwards a picture: with a gradient, without one, for rollouts of 4 steps the mean over the chosen state
    "none": (1, 0),
    "training_adapter": (1, 0),
    "de_turbo": (1, 0),
    "anchor": (1, 1),
    "prior_anchor": (2, 1 + 1.5),
    "self_distill": (1, 1 + 1.5),
    "delta": (1, 3),
    "grid_sft": (1, 1),
    "pso": (2, 2 + STEPS / 12),  # each of the two pictures has its unwanted one drawn once in twelve steps
    "contrastive": (1, 1),
    "redistill": (1, 4 + 1.5),
    "distill_patch": (1, 0),
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_strategy_costs_what_it_should(
    mini: Mini, trained: dict[str, torch.Tensor], batch: Batch, strategy: Any
) -> None:
    assert set(COSTS) == set(STRATEGIES)
    denoiser, base = mini.denoiser(NETWORK, trained), terms.base(mini)
    parts = {"base": base} if strategy == "delta" else {}
    chosen = strategy_terms(PreserveConfig.model_construct(strategy=strategy))
    ours = objective(mini, denoiser, *chosen, **parts)
    steps = 12
    with forwards(denoiser, base.denoiser) as counts:
        for number in range(steps):
            step(ours, batch, number=number)
    pictures = steps * len(batch.names)
    grads, free = COSTS[strategy]
    assert counts["with"] == grads * pictures
    assert counts["without"] / pictures == pytest.approx(free, rel=0.2)


def test_with_a_training_adapter_the_anchor_needs_a_prediction_of_its_own(
    mini: Mini, trained: dict[str, torch.Tensor], batch: Batch
) -> None:
    """The pictures are learnt with the adapter on, the anchor holds the model that is used, which has it off."""
    denoiser = mini.denoiser(NETWORK, trained)
    ours = objective(mini, denoiser, PLAIN, TermConfig(target="frozen"), adapter=attached(mini, denoiser))
    with forwards(denoiser) as counts:
        step(ours, batch)
    assert counts == {"with": 2 * 2, "without": 2}


def test_a_rollout_of_all_states_uses_its_own_predictions(
    mini: Mini, trained: dict[str, torch.Tensor], batch: Batch
) -> None:
    denoiser = mini.denoiser(NETWORK, trained)
    with forwards(denoiser) as counts:
        step(objective(mini, denoiser, ROLLOUT.model_copy(update={"which": "all"})), batch)
    assert counts == {"with": 2 * STEPS, "without": 2 * STEPS}


def test_what_is_drawn_depends_on_seed_and_step_alone(
    mini: Mini, trained: dict[str, torch.Tensor], batch: Batch
) -> None:
    losses = []
    for _ in range(2):
        ours = objective(mini, mini.denoiser(NETWORK, trained), ROLLOUT)
        torch.manual_seed(len(losses))
        losses.append([step(ours, batch, number=n).loss.item() for n in (3, 4)])
    assert losses[0] == losses[1]
    assert losses[0][0] != losses[0][1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"states": "rollout"}, "target: data needs noised pictures"),
        ({"states": "rollout", "target": "contrast"}, "target: contrast needs noised pictures"),
        ({"told": "neutral", "target": "frozen"}, "told: neutral needs states: rollout"),
        ({"target": "path"}, "target: path needs states: rollout"),
        ({"which": "all"}, "which: all needs states: rollout"),
        ({"weighting": "step"}, "weighting: step needs states on the sampler's grid"),
    ],
)
def test_terms_that_make_no_sense(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        TermConfig.model_validate(options)


def test_strategies_are_lists_of_terms() -> None:
    assert strategy_terms(PreserveConfig()) == [PLAIN]
    mine = strategy_terms(PreserveConfig(strategy="prior_anchor", weight=0.7, every=4))
    assert mine[0] == PLAIN
    assert (mine[1].states, mine[1].told, mine[1].scale, mine[1].every) == ("rollout", "neutral", 0.7, 4)
    composed = [TermConfig(states="grid"), ROLLOUT]
    assert strategy_terms(PreserveConfig(terms=composed)) == composed
    with pytest.raises(ValidationError, match="exclude each other"):
        PreserveConfig(strategy="anchor", terms=composed)
