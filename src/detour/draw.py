"""`detour sample`: load a model, put LoRAs on it, draw."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from detour import UserError, archs, export, files, sample, weights
from detour.config.job import ModelConfig, TrainProcess
from detour.data import controls
from detour.lora_formats import by_module, with_adapter
from detour.nn.adapter_file import Pair
from detour.nn.together import Together, from_file, to_file, with_encoders
from detour.nn.training_adapter import TrainingAdapter, linear_shapes

if TYPE_CHECKING:
    from detour.archs.base import Arch, Condition, Variant
    from detour.export.reading import Shapes
    from detour.lora_formats import LoraFile

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """What to draw, as the command line says it. `size` is width and height in pixels; `guidance` 1 means none."""

    model: str
    arch: str
    prompts: list[str]
    extras: str | None = None
    loras: list[str]
    """`FILE` or `FILE:scale`."""
    negative: str = ""
    steps: int | None = None
    guidance: float | None = None
    seed: int = 42
    size: tuple[int, int] = (1024, 1024)
    frames: int = 1
    fps: float | None = None
    """None plays a clip as fast as the model's own."""
    control: str | None = None
    """A picture to follow, for models that take one."""
    inpaint: str | None = None
    """A picture whose transparent parts are to be filled, for models that do."""
    dtype: str = "bf16"
    device: str = "auto"


def pick_device(name: str) -> torch.device:
    """The device by its name; `auto` takes the first CUDA card, else Apple's, else the processor."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind = name.split(":", 1)[0]
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if not there.get(kind, False):
        raise UserError(
            f"device: {name!r} is not there; this machine has {', '.join(key for key, found in there.items() if found)}"
        )
    return torch.device(name)


def draw(drawing: Drawing, out: Path) -> list[Path]:
    """Draw one picture or clip for each prompt into `out` and return the files."""
    arch = archs.get(archs.name_of(drawing.arch))
    name, variant = _variant(drawing)
    requests = [
        sample.Request(
            prompt=prompt,
            negative=drawing.negative,
            seed=drawing.seed,
            width=drawing.size[0],
            height=drawing.size[1],
            frames=drawing.frames,
            fps=drawing.fps or arch.spec.fps or sample.FPS,
            steps=drawing.steps or variant.steps,
            guidance=drawing.guidance or variant.guidance,
            control=drawing.control,
            inpaint=drawing.inpaint,
        )
        for prompt in drawing.prompts
    ]
    for request in requests:
        sample.check_request(arch.spec, request)
        controls.check(request)
        if (problem := variant.guidance_problem(request.guidance)) is not None:
            raise UserError(f"--guidance: {arch.spec.title} {name}: {problem}")
    device, dtype = pick_device(drawing.device), DTYPES[drawing.dtype]
    source = weights.find_model(
        drawing.model,
        components=arch.spec.components,
        denoiser=arch.spec.denoiser,
        optional=arch.spec.optional,
        extras=drawing.extras or variant.extras_repo,
    )
    denoiser = arch.build_denoiser(source)
    archs.check_variant(arch.spec, name, denoiser.config)  # type: ignore[arg-type]  # every diffusers model has it
    shapes = lora_shapes(arch, denoiser, source) if drawing.loras else {}
    loras = [read_lora(text, arch, shapes) for text in drawing.loras]
    files.make_folder(out)

    conditions = _conditions(arch, source, requests, loras, weights.Placement(dtype, device))
    placement = weights.Placement(
        dtype,
        device,
        patch=lambda name, tensor: _with_loras(name, tensor, loras),
        keep_float32=arch.spec.keep_float32,
    )
    weights.materialise(denoiser, arch.denoiser_tensors(source), placement, where=source.name)
    for added in loras:
        _attach_branches(added, denoiser, dtype)
    scheduler, vae = arch.load_scheduler(source, variant.scheduler), arch.load_vae(source, dtype, device)

    facts = {f"lora_{index}_sha256": files.sha256_file(added.path) for index, added in enumerate(loras)}
    paths: list[Path] = []
    for index, (request, wanted) in enumerate(zip(requests, conditions, strict=True)):
        noise = sample.initial_noise(arch.spec, request).to(device)
        pictures = controls.told(arch, vae, request, device)
        told = [condition | pictures for condition in wanted]
        latents_BCHW = sample.denoise(arch, denoiser, scheduler, noise, request, told)
        path = out / f"{index:02d}-seed{request.seed}.png"
        sample.save_picture(path, sample.to_frames(arch, vae, latents_BCHW), request, arch.spec, facts)
        paths.append(path)
    return paths


@torch.no_grad()
def _conditions(
    arch: Arch,
    source: weights.ModelSource,
    requests: list[sample.Request],
    loras: list[Added],
    placement: weights.Placement,
) -> list[list[Condition]]:
    """Of each picture's prompts, embedded by the text encoders with what the LoRAs have for them."""
    text = arch.load_text_encoders(source, placement)
    if arch.spec.lora_keys.text:
        encoders = Together("", {name: text.models[name] for name in arch.spec.lora_keys.text})
        for name, layer in encoders.named_modules():
            if isinstance(layer, nn.Linear):
                layer.weight.copy_(_with_loras(f"{encoders.to_file(name)}.weight", layer.weight, loras))
        for added in loras:
            _attach_branches(added, encoders, placement.dtype)
    return [arch.encode_prompts(text, request.prompts(arch.spec)) for request in requests]


def lora_shapes(arch: Arch, denoiser: nn.Module, source: weights.ModelSource) -> dict[str, tuple[int, int]]:
    """(out, in) of every layer that a LoRA file may name: the denoiser's, and those of text encoders where they can be
    trained. No weight is read."""
    encoders: dict[str, nn.Module] = {}
    if arch.spec.lora_keys.text:
        text = arch.load_text_encoders(source, weights.Placement(torch.float32, torch.device("meta")))
        encoders = {name: text.models[name] for name in arch.spec.lora_keys.text}
    trained = with_encoders(arch.spec.denoiser, denoiser, encoders)
    return to_file(trained, linear_shapes(trained))


def _variant(drawing: Drawing) -> tuple[str, Variant]:
    model = ModelConfig.model_validate({"arch": drawing.arch, "name_or_path": drawing.model})
    return archs.variant_of(TrainProcess.model_construct(model=model))


@dataclass(frozen=True)
class Added:
    """A LoRA that is put on the model, at a strength."""

    path: Path
    file: LoraFile
    strength: float

    def pairs(self) -> dict[str, Pair]:
        """What a plain LoRA adds to each layer."""
        return {
            name: Pair(parts["lora_A.weight"], parts["lora_B.weight"], self.file.scale(name) * self.strength)
            for name, parts in by_module(self.file.tensors).items()
        }


def read_lora(text: str, arch: Arch, shapes: Shapes, option: str = "--lora") -> Added:
    """`FILE` or `FILE:scale`, read and checked against the model's layers; `option` names it in errors."""
    name, _, strength = text.rpartition(":")
    try:
        path, scale = (name, float(strength)) if name else (text, 1.0)
    except ValueError:  # a colon inside the path
        path, scale = text, 1.0
    if not math.isfinite(scale):
        raise UserError(f"{option} {text}: the scale {scale} is not a finite number; 1 is full strength, 0 is none")
    file = weights.find_file(path, what=option)
    return Added(file, export.read_lora(file, arch.spec, shapes), scale)


def _attach_branches(added: Added, model: nn.Module, dtype: torch.dtype) -> None:
    """A plain LoRA stays a branch beside the weights: exact in any type, as it was trained.

    `model` is the denoiser or the text encoders together; it gets what the file has for its layers.
    """
    if added.file.kind != "lora":
        return
    own = to_file(model, linear_shapes(model))
    pairs = {name: pair for name, pair in added.pairs().items() if name in own}
    TrainingAdapter(from_file(model, pairs), "factored", dtype=dtype).attach(model)


def _with_loras(name: str, tensor: torch.Tensor, loras: list[Added]) -> torch.Tensor:
    """The weight with every adapter that is not a plain LoRA, computed in float32."""
    module = name.removesuffix(".weight")
    for added in loras:
        if added.file.kind != "lora" and module in added.file.ranks:
            parts = by_module(added.file.tensors)[module]
            tensor = with_adapter(tensor.float(), parts, added.file.scale(module), added.strength)
    return tensor
