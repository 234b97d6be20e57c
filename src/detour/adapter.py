"""What making a training adapter adds to training: the model's own pictures before it, and the file after it.

The pictures are drawn by the distilled model as it is used, one by one, and only their latents are kept, in the run's
folder: each a file of its own that is hashed, found by all that it was drawn from, and never drawn twice. Then the
usual loop trains on them (`train.loop`); `train.plateau` says when it is enough.

Shapes: C channels, H W latent height and width (of a clip C F H W, F frames).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import TYPE_CHECKING

import torch

from detour import RefusedError, UserError, files, sample
from detour.archs import own_pictures as drawn_how
from detour.data import cache, own_pictures
from detour.data.prepare import Meter
from detour.data.scan import Scan
from detour.export import NotProvenError
from detour.export.inspection import KIND_KEY
from detour.export.verify import base_weights, layer_shapes
from detour.nn.adapter_file import hole, read_adapter
from detour.nn.training_adapter import TrainingAdapter, linear_shapes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import Tensor, nn

    from detour.archs.base import Arch, ArchSpec, Condition, Variant
    from detour.config.job import AdapterProcess, TrainProcess
    from detour.data.order import Order
    from detour.data.own_pictures import Drawing
    from detour.events import Sink
    from detour.lora_formats import LoraFile
    from detour.train.deployment import Deployment
    from detour.weights import ModelSource

KIND = "training adapter"
HELD_OUT = "held_out_sha256"
"""A run's fact: what its held-out losses are taken of. Those of another hash do not compare."""
RECORD = "pictures.jsonl"
"""In the run's folder: what each picture was drawn from, one JSON object a line."""
FOLDER = "pictures"
_VERSION = 1
"""Raised whenever pictures are drawn in another way: those of older runs are then drawn again."""
_TOLERANCE = 0.01
"""Share of what a layer adds by which the written file may differ: bf16 rounds both factors to 3 digits."""


@dataclass(frozen=True, kw_only=True)
class Making:
    """A job that makes an adapter, as far as it is more than the training that it contains."""

    process: AdapterProcess
    """Resolved."""
    training: TrainProcess
    """What the engine runs."""
    drawings: list[Drawing]
    """The held-out ones first."""
    orders: tuple[Order, Order]
    """Of training, and of the held-out pictures."""
    variant: Variant
    """Of the distilled model."""
    guidance: float
    """That pictures are drawn with."""

    @classmethod
    def of(cls, process: AdapterProcess, spec: ArchSpec, variant: Variant) -> Making:
        """Plan the pictures of a resolved process. UserError where its prompts cannot be read."""
        drawings = own_pictures.plan(process.adapter)
        training = process.training()
        held_out = process.adapter.stop.held_out
        prompts = list(dict.fromkeys(drawing.prompt for drawing in drawings[:held_out]))[:2]
        drift = training.preserve.drift.model_copy(update={"prompts": prompts})
        training = training.model_copy(update={"preserve": training.preserve.model_copy(update={"drift": drift})})
        return cls(
            process=process,
            training=training,
            drawings=drawings,
            orders=own_pictures.orders(drawings, training.datasets[0], training.train, held_out),
            variant=variant,
            guidance=drawn_how.guidance(spec, variant),
        )

    def check_layers(self, denoiser: nn.Module, names: Sequence[str]) -> None:
        """Refuse a choice of layers that no reader of training adapters would take for a whole one."""
        if (lacking := hole(set(names), linear_shapes(denoiser))) is not None:
            raise UserError(
                f"network.include and network.exclude: a training adapter has a kind of layer in every block or in "
                f"none, but {lacking}; choose by kind (attention), not by block"
            )

    def data(self) -> tuple[Scan, Order, Order]:
        """The pictures as if they had been found, and the orders of training and of the held-out ones."""
        training, held = self.orders
        return Scan([item.picture for item in (*held.items, *training.items)], [], []), training, held

    def identify(
        self, store: cache.Store, keys: cache.Keys, spec: ArchSpec, source: ModelSource
    ) -> tuple[cache.Keys, dict[str, str]]:
        """The cache's keys, with the model that draws in the place of the VAE (both say what latents are made by), and
        facts about the run."""
        model, checks, held = self.training.model, self.training.validation, self.orders[1]
        base = cache.identity(store.root, [source.single_file or source.component(spec.denoiser)])
        scheduler = source.find("scheduler")
        sampler = [] if scheduler is None else [cache.identity(store.root, [scheduler])]
        sampler += [f"{name}={value}" for name, value in sorted(self.variant.scheduler.items())]
        held_in = [model.dtype, model.qtype if model.quantize else None]
        how = [self.process.adapter.sample_steps, self.guidance, sampler]
        by = _hash(_VERSION, spec.name, base, keys.text, held_in, how)
        compared = _hash(held.fingerprint, checks.times, self.training.train.seed)
        return replace(keys, vae=by), {"base_sha256": base, HELD_OUT: compared}

    # --- the file ----------------------------------------------------------------------------------------------------

    def file_spec(self, spec: ArchSpec) -> ArchSpec:
        """The architecture with LoRA files as readers of training adapters know them: no alpha, a scale of 1."""
        return replace(spec, lora_keys=replace(spec.lora_keys, alpha_in=()))

    def header(self, base_sha256: str, losses: Sequence[float]) -> dict[str, str]:
        """What the file says of how it was made. Prompts and paths are private."""
        chosen = self.process.adapter
        made = {
            "pictures": len(self.drawings) - chosen.stop.held_out,
            "held_out": chosen.stop.held_out,
            "prompts": len({drawing.prompt for drawing in self.drawings}),
            "sizes": [f"{size.width}x{size.height}" for size in chosen.sizes],
            "sample_steps": chosen.sample_steps,
            "guidance": self.guidance,
            "seed": chosen.seed,
            "held_out_loss": [losses[0], losses[-1]] if losses else None,
        }
        return {KIND_KEY: KIND, "detour.base_sha256": base_sha256, "detour.made": json.dumps(made)}


# --- drawing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Painter:
    """The distilled model at work, without what is trained on it."""

    arch: Arch
    model: Deployment
    condition: Callable[[str], Condition]
    """Of a prompt."""

    def draw(self, drawing: Drawing, steps: int, guidance: float) -> Tensor:
        """latents_CHW, float32: those that `detour sample` decodes for this prompt, seed and size."""
        request = sample.Request(
            prompt=drawing.prompt,
            seed=drawing.seed,
            width=drawing.width,
            height=drawing.height,
            frames=drawing.frames,
            steps=steps,
            guidance=guidance,
        )
        model, told = self.model, [self.condition(drawing.prompt)]
        noise = sample.initial_noise(self.arch.spec, request).to(model.device)
        with model.untouched():
            return sample.denoise(self.arch, model.denoiser, model.scheduler, noise, request, told)[0].float()


def draw_missing(
    making: Making, painter: Painter, store: cache.Store, keys: cache.Keys, sink: Sink, pause: Callable[[], None]
) -> None:
    """Draw the pictures that are not there yet, and keep each at once. `pause` is called between two of them.

    RefusedError where the disk has no room for them; UserError where the model draws values that are not finite.
    """
    training, held = making.orders
    steps = making.process.adapter.sample_steps
    assert steps is not None and store.latents is not None  # resolved
    items = [*((item, held.datasets[0]) for item in held.items), *((i, training.datasets[0]) for i in training.items)]
    named = [keys.latents(item, config, 0) for item, config in items]
    store.remove_leftovers()
    write_record(store.latents.with_name(RECORD), making, named)
    missing = [place for place, key in enumerate(named) if not store.has(cache.LATENTS, key)]
    _require_space(store, [making.drawings[place] for place in missing], painter.arch.spec)
    meter = Meter(sink, "own pictures", len(named))
    meter.add(len(named) - len(missing))
    for place in missing:
        pause()
        drawing = making.drawings[place]
        latents = painter.draw(drawing, steps, making.guidance)
        if not bool(torch.isfinite(latents).all()):
            raise UserError(
                f"the model drew values that are not finite: {drawing.prompt[:80]!r}, seed {drawing.seed}; bf16 and "
                f"fp32 (model.dtype) have the range that others lack"
            )
        store.put(cache.LATENTS, named[place], {"latents_CHW" if latents.ndim == 3 else "latents_CFHW": latents})
        meter.add(1)
    meter.finish()


def write_record(path: Path, making: Making, keys: Sequence[str]) -> None:
    """Write what each picture is drawn from: with it a picture, or its noise, can be made again."""
    chosen, held_out = making.process.adapter, making.process.adapter.stop.held_out
    how = {"steps": chosen.sample_steps, "guidance": making.guidance}
    records = [
        asdict(drawing) | how | {"held_out": place < held_out, "latents": f"{FOLDER}/{key[:2]}/{key}.safetensors"}
        for place, (drawing, key) in enumerate(zip(making.drawings, keys, strict=True))
    ]
    files.write_bytes(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def _require_space(store: cache.Store, missing: Sequence[Drawing], spec: ArchSpec) -> None:
    assert store.latents is not None
    needed = sum(4 * prod(spec.latent_shape(drawing.width, drawing.height, drawing.frames)) for drawing in missing)
    if needed > (free := files.free_bytes(store.latents)):
        raise RefusedError(
            f"{store.latents} has no room for the pictures, which need {needed / 2**30:.1f} GiB, {free / 2**30:.1f} "
            f"GiB are free; free some, choose another config.output_folder, or fewer adapter.pictures"
        )


# --- proof -----------------------------------------------------------------------------------------------------------


def prove(path: Path, lora: LoraFile, trained: nn.Module, spec: ArchSpec, dtype: torch.dtype) -> str:
    """Load a written file as `model.assistant_lora_path` would be, for both modes; what was found.

    `trained` is the model that it was trained on, `dtype` what its weights are held in. Raises NotProvenError.
    """
    try:
        pairs = read_adapter(path, layer_shapes(trained), spec.lora_keys)
    except UserError as error:
        raise NotProvenError(f"it is not accepted as a training adapter: {error}") from error
    if set(pairs) != set(lora.modules):
        raise NotProvenError(f"as a training adapter it has {len(pairs)} layers of {len(lora.modules)}")
    device = next(trained.parameters()).device
    here = {name: replace(pair, A=pair.A.to(device), B=pair.B.to(device)) for name, pair in pairs.items()}
    merged, weight = TrainingAdapter(here, "merged", dtype=dtype), base_weights(trained)
    for name, pair in here.items():
        A, B = (lora.tensors[f"{name}.lora_{half}.weight"].to(device).float() for half in "AB")
        trained_OI = lora.scale(name) * (B @ A)
        if float((pair.delta() - trained_OI).norm()) > _TOLERANCE * float(trained_OI.norm()):
            raise NotProvenError(f"as a training adapter it adds something else to {name} than was trained")
        merged.patch(f"{name}.weight", weight(name))
    assert merged.merge_error is not None
    return f"as a training adapter {len(pairs)} layers; merged, {merged.merge_error.kept:.1%} of it survives"


def _hash(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def is_blank(lora: LoraFile) -> bool:
    """Does it add nothing yet? A warm-up begins at a learning rate of 0."""
    return not any(bool(tensor.any()) for name, tensor in lora.tensors.items() if name.endswith("lora_B.weight"))
