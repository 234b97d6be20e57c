"""The base model: flow matching on the drawn world, with noisy captions and caption dropout, so that guidance works.

Before a tenth of the captions stands the picture itself, as 8 tokens: from them it can draw what no word names, which
is what a teacher in self-distillation must do.

    python -m detour.nano.recipes.base --out work/base

Pictures are drawn as they are needed, so that none is seen twice. Times are logit-normal with a shift of 2.

Shapes: B batch, C channels, H W latent positions.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from detour.nano import codec, judge, language, world
from detour.nano.recipes import miniature, training
from detour.nn import flow
from detour.nn.rng import generator
from detour.seeds import seed_for

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from detour.nano.recipes.miniature import Miniature

BATCH = 32
DROPPED = 0.1  # captions replaced by the empty one, at random in each step
SHOWN = 0.1  # captions with the picture itself before them, likewise
DIALS = world.Dials(wrong=0.15, wrong_word=0.25, junk=0.08, unstated_size=0.25, unstated_texture=0.25)
"""Made for base of 32 guided steps .92, base of 8 unguided .06, turbo of 8 .95 (docs/miniature.md). Of the pictures
under a caption that states everything, .85 * .75 * .92 = .59 are clean and as it says: no model that draws from that
distribution scores more without guidance."""
CLEAN = 0.5
"""The share of the steps before which captions are clean. Shapes differ in few cells, so that their words are learnt
last, and noisy captions hide them for long."""
GUIDANCE = 3.0


def batch_at(model: Miniature, step: int, *, seed: int, dials: world.Dials) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """latents_BCHW and encoded captions of a step."""
    examples = world.training_set(BATCH, seed=seed_for(seed, "base", step), dials=dials)
    dropped_B = torch.rand(BATCH, generator=generator(seed, "dropped", step)) < DROPPED
    texts = [
        miniature.EMPTY if dropped else example.caption for example, dropped in zip(examples, dropped_B, strict=True)
    ]
    latents_BCHW = codec.encode(world.render_training_set(examples))
    shown_B = torch.rand(BATCH, generator=generator(seed, "shown", step)) < SHOWN
    return latents_BCHW, language.with_pictures(model.captions(texts), latents_BCHW, shown_B)


def loss_at(model: Miniature, step: int, *, seed: int, dials: world.Dials) -> Tensor:
    """The flow-matching loss of a step."""
    latents_BCHW, condition = batch_at(model, step, seed=seed, dials=dials)
    drawn = generator(seed, "noise", step)
    eps_BCHW = torch.randn(latents_BCHW.shape, generator=drawn)
    t_B = flow.shift_time(torch.sigmoid(torch.randn(BATCH, generator=drawn)), 2.0)
    v_BCHW = model.velocity(flow.noisy(latents_BCHW, eps_BCHW, t_B), t_B, condition)
    return (v_BCHW - flow.velocity(latents_BCHW, eps_BCHW)).square().mean()


def judged(model: Miniature, *, steps: int, guidance: float, n: int, seed: int = 1) -> training.Figures:
    """How well the model draws what it is told, everything stated."""
    prompts = world.prompts(n, seed=seed)
    pictures = miniature.draw(model, [prompt.text for prompt in prompts], steps=steps, guidance=guidance)
    found = judge.score(pictures, prompts).summary()
    names = (*world.ATTRIBUTES, "clean", "strict", "sharpness", "grain", "mud")
    return {name: round(found[name], 4) for name in names}


def quick_look(model: Miniature, n: int) -> Callable[[], training.Figures]:
    """A judge for the log: guided in 16 steps, and unguided in 8."""

    def look() -> training.Figures:
        guided = judged(model, steps=16, guidance=GUIDANCE, n=n)
        few = judged(model, steps=8, guidance=1.0, n=n)
        return guided | {f"few_{name}": few[name] for name in ("strict", "clean", "sharpness", "grain")}

    return look


def main(argv: Sequence[str] | None = None) -> None:
    """Train the base, or go on with it."""
    args = _arguments(argv)
    with training.process(args.threads):
        _run(args)


def _run(args: argparse.Namespace) -> None:
    denoiser = miniature.build_transformer(args.seed)
    model = miniature.Miniature.of(denoiser, compiled=args.compile)
    plan = training.Plan(steps=args.steps)
    dials = world.Dials() if args.easy else DIALS
    noisy_from = int(CLEAN * args.steps)
    facts: training.Facts = {"recipe": "base", "seed": args.seed, "dials": str(dials)}
    trainer = training.Trainer(denoiser, plan, args.out, facts)
    trainer.run(
        lambda step: loss_at(model, step, seed=args.seed, dials=dials if step >= noisy_from else world.STATED),
        stop_at=training.deadline(args.minutes),
        judge=quick_look(model, args.judge),
        judge_every=args.judge_every,
    )


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = training.arguments("Train the base of the miniature Z-Image.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--judge", type=int, default=96, help="pictures to judge now and then")
    parser.add_argument("--judge-every", type=int, default=1000, help="steps")
    parser.add_argument("--easy", action="store_true", help="clean captions that state everything")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
