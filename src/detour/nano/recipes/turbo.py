"""The turbo: a model that draws in 8 steps (or 4) without guidance what the base draws in 32 with it.

    python -m detour.nano.recipes.turbo --base work/base --out work/turbo8 --few 8

Trajectory regression. The base draws pictures with guidance; of its path, the states on the few-step grid are kept (the
32-step grid holds them all). The turbo learns the velocity that jumps from one of them to the next,
(z_next - z) / (t_next - t), from the caption alone. No adversarial term is needed. The result is no longer a
flow-matching field: it points along secants of guided paths, and is right only on its own grid.
As in the base's training, some captions have a picture before them: then one that the caption describes.

Shapes: B batch, S states on the few-step grid, C channels, H W latent positions.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

from detour import UserError, files
from detour.nano import codec, language, world
from detour.nano.recipes import base, miniature, training
from detour.nn.rng import generator
from detour.seeds import seed_for

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from torch import Tensor

    from detour.nano.recipes.miniature import Miniature

TEACHER_STEPS = 32
SHARD = 64  # trajectories in a file
_PATHS = "trajectories"


@dataclass(frozen=True, slots=True)
class Trajectories:
    """Guided paths of the base: what was asked for, and where it was at each time of the few-step grid."""

    texts: list[str]
    states_NSCHW: Tensor
    pictures_NCHW: Tensor
    """Latents of a picture for each caption."""
    shown_N: Tensor
    """Whether the picture stood before it."""

    def condition(self, model: Miniature, chosen_B: Tensor) -> tuple[Tensor, Tensor]:
        """What the base was told for some of them."""
        captions = model.captions([self.texts[index] for index in chosen_B.tolist()])
        return language.with_pictures(captions, self.pictures_NCHW[chosen_B].float(), self.shown_N[chosen_B])


def make_trajectories(teacher: Miniature, out: Path, n: int, facts: training.Facts, stop_at: float) -> Trajectories:
    """`n` trajectories, made in shards of 64 that are kept in `out`; those that are there already are read.

    `facts` say how: `few`, `guidance`, `seed`, and of which `base`. UserError at `stop_at`: the same command goes on.
    """
    files.remove_stale(out / _PATHS)
    shards = []
    for index in range(n // SHARD):
        folder = out / _PATHS / f"{index:04d}"
        if not folder.is_dir():
            if time.monotonic() > stop_at:
                raise UserError(f"{index * SHARD} of {n} trajectories are made; run the same command to go on")
            _make_shard(teacher, folder, index, facts)
            training.LOG.info("trajectories: %d of %d", (index + 1) * SHARD, n)
        files.verify_directory(folder)
        known = json.loads((folder / "texts.json").read_text(encoding="utf-8"))
        if known["facts"] != facts:
            raise UserError(f"{folder} was made with {known['facts']}, not {facts}; choose another --out")
        shards.append(Trajectories(known["texts"], **load_file(folder / "states.safetensors")))
    return Trajectories(
        [text for shard in shards for text in shard.texts],
        torch.cat([shard.states_NSCHW for shard in shards]),
        torch.cat([shard.pictures_NCHW for shard in shards]),
        torch.cat([shard.shown_N for shard in shards]),
    )


def _make_shard(teacher: Miniature, folder: Path, index: int, facts: training.Facts) -> None:
    few, guidance, seed = int(facts["few"]), float(facts["guidance"]), int(facts["seed"])
    prompts = world.prompts(SHARD, seed=seed_for(seed, "turbo prompts", index), dials=base.DIALS)
    scenes = [world.scenes_for(prompt, 1, seed=seed_for(seed, index, place))[0] for place, prompt in enumerate(prompts)]
    shard = Trajectories(
        [prompt.text for prompt in prompts],
        torch.empty(0),
        codec.encode(world.render(scenes)).half().contiguous(),
        torch.rand(SHARD, generator=generator(seed, "turbo shown", index)) < base.SHOWN,
    )
    noise_BCHW = miniature.noise_for([seed_for(seed, "turbo", index, place) for place in range(SHARD)])
    condition = shard.condition(teacher, torch.arange(SHARD))
    path = miniature.rollout(teacher, noise_BCHW, condition, TEACHER_STEPS, guidance)
    # float16 keeps 3 digits: an error of 2e-2 in the target's velocity at worst, which is random and averages out
    states = torch.stack(path[:: TEACHER_STEPS // few], dim=1).half().contiguous()
    tensors = {"states_NSCHW": states, "pictures_NCHW": shard.pictures_NCHW, "shown_N": shard.shown_N}
    with files.new_directory(folder) as fresh:
        save_file(tensors, fresh / "states.safetensors")
        files.write_json(fresh / "texts.json", {"facts": facts, "texts": shard.texts})


def loss_at(model: Miniature, paths: Trajectories, step: int, *, seed: int) -> Tensor:
    """The mean squared error of the jump velocity at random states of random trajectories."""
    drawn = generator(seed, "turbo", step)
    n, states = paths.states_NSCHW.shape[:2]
    chosen_B = torch.randint(n, (base.BATCH,), generator=drawn)
    place_B = torch.randint(states - 1, (base.BATCH,), generator=drawn)
    times = torch.tensor(miniature.grid(states - 1))
    now_B, then_B = times[place_B], times[place_B + 1]
    z_BCHW = paths.states_NSCHW[chosen_B, place_B].float()
    target_BCHW = (paths.states_NSCHW[chosen_B, place_B + 1].float() - z_BCHW) / (then_B - now_B)[:, None, None, None]
    return (model.velocity(z_BCHW, now_B, paths.condition(model, chosen_B)) - target_BCHW).square().mean()


def main(argv: Sequence[str] | None = None) -> None:
    """Make the trajectories and train the turbo, or go on with either."""
    args = _arguments(argv)
    with training.process(args.threads):
        _run(args)


def _run(args: argparse.Namespace) -> None:
    if args.few < 1 or TEACHER_STEPS % args.few:
        raise UserError(f"--few {args.few}: the steps must divide {TEACHER_STEPS}, so that their times are the base's")
    if args.paths < SHARD or args.paths % SHARD:
        raise UserError(f"--paths {args.paths}: trajectories are made {SHARD} at a time; give a multiple of it")
    stop_at, source = training.deadline(args.minutes), args.base / training.MODEL
    teacher = miniature.Miniature.load(source)
    facts: training.Facts = {
        "seed": args.seed,
        "few": args.few,
        "guidance": args.guidance,
        "base": files.sha256_file(source / "transformer" / miniature.WEIGHTS),
    }
    paths = make_trajectories(teacher, args.out, args.paths, facts, stop_at)
    denoiser = miniature.build_transformer()
    denoiser.load_state_dict(miniature.load_transformer(source))
    model = miniature.Miniature.of(denoiser, compiled=args.compile)
    plan = training.Plan(steps=args.steps, muon_lr=2e-3, adamw_lr=5e-4)
    trainer = training.Trainer(denoiser, plan, args.out, facts | {"recipe": "turbo", "paths": args.paths})
    trainer.run(
        lambda step: loss_at(model, paths, step, seed=args.seed),
        stop_at=stop_at,
        judge=lambda: base.judged(model, steps=args.few, guidance=1.0, n=args.judge),
        judge_every=args.judge_every,
    )


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = training.arguments("Distil a turbo from the base of the miniature Z-Image.")
    parser.add_argument("--base", type=Path, required=True, help="the folder of the base recipe")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--few", type=int, default=8, help="steps that the turbo draws in")
    parser.add_argument("--guidance", type=float, default=base.GUIDANCE, help="of the base's paths; 1 is none")
    parser.add_argument("--paths", type=int, default=2048, help="trajectories, 64 in a file of 5.2 MB")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--judge", type=int, default=96)
    parser.add_argument("--judge-every", type=int, default=1000)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
