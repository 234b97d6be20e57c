"""The figures of each stage: what the judge says of base and turbo, and that the turbo's field is no flow-matching one.

    python -m detour.nano.recipes.figures --base work/base --turbo work/turbo8 --out work/figures \
        --adapter work/adapter/training_adapter/training_adapter.safetensors

Writes `figures.json`, `figures.md` (the page of the documentation) and one picture grid for each row of it. Rows that
are there already are not drawn again.

Shapes: B batch, C channels, H W latent positions.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from detour import archs, export, files
from detour.lora_formats import by_module, with_adapter
from detour.nano import codec, judge, world
from detour.nano.recipes import base, miniature, training
from detour.nn import flow
from detour.nn.rng import generator
from detour.seeds import seed_for

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from detour.nano.recipes.miniature import Miniature
    from detour.nano.world import Pictures, Prompt

COLUMNS = ("strict", "strict_se", "clean", *world.ATTRIBUTES, "sharpness", "grain", "mud", "diversity")
TRUTH = "truth"
"""True drawings of the prompts, in place of a model's."""
_SAMPLES = 4  # pictures of one prompt, for the diversity within it


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One way of drawing, on one set of prompts."""

    model: str
    steps: int
    guidance: float
    prompts: str = "stated"

    @property
    def name(self) -> str:
        """Its name in the files."""
        return f"{self.model}-{self.steps}-g{self.guidance:g}-{self.prompts}"


def rows(few: int, guidance: float) -> list[Row]:
    """What to compare: true drawings, the base with and without guidance, in many steps and in few, and the turbo, with
    the training adapter (`adapted`) and without."""
    ways = [
        Row(model=TRUTH, steps=0, guidance=1.0),
        Row(model="base", steps=32, guidance=guidance),
        Row(model="base", steps=32, guidance=1.0),
        Row(model="base", steps=few, guidance=guidance),
        Row(model="base", steps=few, guidance=1.0),
        Row(model="turbo", steps=few, guidance=1.0),
        Row(model="turbo", steps=few // 2, guidance=1.0),
        Row(model="turbo", steps=32, guidance=1.0),
        Row(model="adapted", steps=few, guidance=1.0),
        Row(model="adapted", steps=32, guidance=1.0),
    ]
    main = (ways[1], ways[5])
    return ways + [replace(row, prompts=kind) for kind in ("held_out", "unstated") for row in main]


def prompts_of(kind: str, n: int) -> list[Prompt]:
    """The prompts of a set: never those that `base` is watched with while it trains."""
    if kind == "held_out":
        return world.prompts(n, seed=2, split="held_out")
    dials = replace(base.DIALS, unstated_size=1.0, unstated_texture=1.0) if kind == "unstated" else world.STATED
    return world.prompts(n, seed=2, dials=dials)


def drawings(model: Miniature | None, row: Row, prompts: Sequence[Prompt], seed: int) -> Pictures:
    """A picture for each prompt, drawn by the model, or without one as it should be."""
    if model is None:
        shown = [world.scenes_for(prompt, 1, seed=seed + index)[0] for index, prompt in enumerate(prompts)]
        return world.render(shown)
    texts = [prompt.text for prompt in prompts]
    return miniature.draw(model, texts, steps=row.steps, guidance=row.guidance, seed=seed)


def measure(model: Miniature | None, row: Row, n: int) -> tuple[dict[str, float], Pictures]:
    """The figures of a row, and its first pictures."""
    prompts = prompts_of(row.prompts, n)
    pictures = drawings(model, row, prompts, 10_000)
    found = judge.score(pictures, prompts).summary()
    few = [prompt for prompt in prompts[: n // 8] for _ in range(_SAMPLES)]
    again = drawings(model, row, few, 20_000)
    found["diversity"] = judge.diversity(np.clip(again, 0, 1).reshape(-1, _SAMPLES, *again.shape[1:]))
    return {name: round(found[name], 4) for name in COLUMNS if name in found}, pictures


def flow_matching_loss(model: Miniature, n: int) -> float:
    """The mean squared error of the field on clean pictures that were never trained on, at even times."""
    total = 0.0
    for index in range(n // base.BATCH):
        examples = world.training_set(base.BATCH, seed=seed_for("figures", index), dials=world.STATED)
        latents_BCHW = codec.encode(world.render_training_set(examples))
        eps_BCHW = torch.randn(latents_BCHW.shape, generator=generator("figures", index))
        t_B = (torch.arange(base.BATCH) + 0.5) / base.BATCH
        condition = model.captions([example.caption for example in examples])
        with torch.no_grad():
            v_BCHW = model.velocity(flow.noisy(latents_BCHW, eps_BCHW, t_B), t_B, condition)
        total += (v_BCHW - flow.velocity(latents_BCHW, eps_BCHW)).square().mean().item()
    return total / (n // base.BATCH)


def adapted(turbo: Mapping[str, Tensor], adapter: Path) -> Miniature:
    """The turbo of these weights (float32) with its training adapter added to them."""
    weights = dict(turbo)
    file = export.read_lora(adapter, archs.get("zimage").spec)
    for module, parts in by_module(file.tensors).items():
        weights[f"{module}.weight"] = with_adapter(weights[f"{module}.weight"], parts, file.scale(module))
    denoiser = miniature.build_transformer()
    denoiser.load_state_dict(weights)
    return miniature.Miniature.of(denoiser.eval().requires_grad_(False))


def page(figures: dict[str, dict[str, float]]) -> str:
    """The figures as a page of Markdown."""
    lines = ["# The trained miniature in figures", "", "Written by `python -m detour.nano.recipes.figures`.", ""]
    lines += [f"| drawing | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, row in figures.items():
        if "strict" in row:
            lines.append(f"| {name} | {' | '.join(f'{row[key]:.3f}' if key in row else '-' for key in COLUMNS)} |")
    lines += ["", "| model | flow-matching loss on new pictures |", "|---|---|"]
    lines += [f"| {name} | {row['fm_loss']:.4f} |" for name, row in figures.items() if "fm_loss" in row]
    return "\n".join(lines) + "\n"


def save_grid(path: Path, pictures_NHW3: Pictures, columns: int = 8) -> None:
    """Write pictures side by side, at 128 pixels each."""
    pixels = world.to_pixels(pictures_NHW3[: columns * 4])
    side = pixels.shape[1]
    grid = pixels.reshape(-1, columns, side, side, 3).transpose(0, 2, 1, 3, 4).reshape(-1, columns * side, 3)
    with files.new_file(path) as temporary:
        Image.fromarray(grid).save(temporary, format="PNG")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is not measured yet, and write the page."""
    args = _arguments(argv)
    with training.process(args.threads):
        _run(args)


def _run(args: argparse.Namespace) -> None:
    models = {
        name: miniature.Miniature.load(folder / training.MODEL)
        for name, folder in (("base", args.base), ("turbo", args.turbo))
        if folder is not None
    }
    listing = args.out / "figures.json"
    known: dict[str, dict[str, float]] = json.loads(listing.read_text(encoding="utf-8")) if listing.is_file() else {}
    if args.turbo is not None and args.adapter is not None:
        models["adapted"] = adapted(miniature.load_transformer(args.turbo / training.MODEL), args.adapter)
    for row in rows(args.few, args.guidance):
        if row.name in known or row.model not in (*models, TRUTH):
            continue
        known[row.name], pictures = measure(models.get(row.model), row, args.n)
        save_grid(args.out / f"{row.name}.png", pictures)
        training.LOG.info("%s: %s", row.name, known[row.name])
        files.write_json(listing, known)
    for name, model in models.items():
        known.setdefault(f"{name}-field", {"fm_loss": flow_matching_loss(model, 256)})
    files.write_json(listing, known)
    files.write_bytes(args.out / "figures.md", page(known))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = training.arguments("Measure the base and the turbo of the miniature Z-Image.")
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--turbo", type=Path)
    parser.add_argument("--adapter", type=Path, help="the turbo's training adapter")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--few", type=int, default=8)
    parser.add_argument("--guidance", type=float, default=base.GUIDANCE)
    parser.add_argument("-n", type=int, default=192, help="pictures for each row (a multiple of 32)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
