"""The denoise loop: used by the command line and by previews in training, so that both draw the same picture.

The grid of times comes from the model's own diffusers scheduler, the initial noise from a CPU generator: the same seed
gives the picture that the architecture's diffusers pipeline draws with a CPU generator of that seed.

Shapes: B batch (1 here), C channels, H W latent height and width.
"""

from __future__ import annotations

import inspect
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from detour import UserError, __version__, files
from detour.archs.base import Framing

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor, nn

    from detour.archs.base import Arch, ArchSpec, Condition, Scheduler


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One picture to draw. `guidance` counts 1 as none; sizes are pixels."""

    prompt: str
    seed: int
    width: int
    height: int
    steps: int
    guidance: float = 1.0
    negative: str = ""
    lora_scale: float = 1.0

    def prompts(self, spec: ArchSpec) -> list[str]:
        """The texts that must be embedded to draw it."""
        return [self.prompt, self.negative] if self.guidance > 1 and spec.guidance_kind == "negative" else [self.prompt]


def check_request(spec: ArchSpec, request: Request) -> None:
    """Refuse a size that the model's patches do not divide, and a seed that no generator takes."""
    problem = spec.size_problem(request.width, request.height)
    if problem is not None:
        raise UserError(f"a picture of {problem}")
    if not 0 <= request.seed < 2**63:
        raise UserError(f"the seed {request.seed} of a picture is not a whole number from 0 to 2^63 - 1")


def initial_noise(spec: ArchSpec, request: Request) -> Tensor:
    """noise_BCHW, float32 on the CPU: what diffusers draws for that seed."""
    return _drawn(spec, request, torch.Generator("cpu").manual_seed(request.seed))


def _drawn(spec: ArchSpec, request: Request, generator: torch.Generator) -> Tensor:
    shape = (1, *spec.latent_shape(request.width, request.height))
    return torch.randn(shape, generator=generator, dtype=torch.float32)


@torch.no_grad()
def denoise(
    arch: Arch,
    denoiser: nn.Module,
    scheduler: Scheduler,
    noise_BCHW: Tensor,
    request: Request,
    conditions: list[Condition],
) -> Tensor:
    """latents_BCHW, float32, from noise. `conditions` hold the prompt's and, with guidance, the negative prompt's.

    Source of the order of operations: diffusers' pipeline of the architecture, which this equals bit for bit on a CPU.
    """
    device = noise_BCHW.device
    told = arch.picture_condition(Framing.whole(request.width, request.height), request.guidance)
    conditions = [condition | told for condition in conditions]
    arch.set_timesteps(scheduler, request.steps, (noise_BCHW.shape[-2], noise_BCHW.shape[-1]), device)
    step = _stepper(arch.spec, scheduler, request)
    diffusion = arch.spec.objective != "flow"  # their schedulers have scales of their own for noise and states
    latents_BCHW = noise_BCHW * scheduler.init_noise_sigma if diffusion else noise_BCHW
    for timestep in scheduler.timesteps:
        # In double (on the CPU: Apple's devices have none), so that an architecture that multiplies by 1000 again gets
        # the scheduler's own timestep back to the last bit.
        t_B = torch.full((len(conditions),), float(timestep) / 1000, dtype=torch.float64)
        state_BCHW = scheduler.scale_model_input(latents_BCHW, timestep) if diffusion else latents_BCHW
        field = arch.predict(denoiser, torch.cat([state_BCHW] * len(conditions)), t_B, conditions)
        if len(conditions) == 2:
            field = arch.guided(field[:1], field[1:], request.guidance)
        latents_BCHW = step(field, timestep, latents_BCHW)
    return latents_BCHW


def _stepper(spec: ArchSpec, scheduler: Scheduler, request: Request) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The scheduler's step. What a stochastic one draws goes on after the initial noise, as in diffusers."""
    options: dict[str, object] = {"return_dict": False}
    if "generator" in inspect.signature(scheduler.step).parameters:
        generator = torch.Generator("cpu").manual_seed(request.seed)
        _drawn(spec, request, generator)
        options["generator"] = generator
    return lambda field, timestep, latents: scheduler.step(field, timestep, latents, **options)[0]


@torch.no_grad()
def to_picture(arch: Arch, vae: nn.Module, latents_BCHW: Tensor) -> Image.Image:
    """The first picture of a batch of latents."""
    pixels_B3HW = arch.decode(vae, latents_BCHW)
    levels_HW3 = (pixels_B3HW[0] * 0.5 + 0.5).clamp(0, 1).permute(1, 2, 0).float().cpu().numpy()
    return Image.fromarray((levels_HW3 * 255).round().astype(np.uint8))


def save_picture(path: Path, picture: Image.Image, request: Request, spec: ArchSpec, facts: dict[str, str]) -> None:
    """Write a PNG whose text says how to draw it again, here and in diffusers."""
    text = PngInfo()
    settings = asdict(request) | {"software": f"detour {__version__}", "architecture": spec.name} | facts
    # Both countings of guidance, so that the picture can be drawn again elsewhere (docs/design.md §3).
    settings["guidance_diffusers"] = spec.diffusers_guidance(request.guidance)
    for key, value in settings.items():
        text.add_itxt(f"detour:{key}", str(value))
    text.add_itxt("parameters", json.dumps(settings, ensure_ascii=False))  # the field that picture browsers show
    with files.new_file(path) as temporary:
        picture.save(temporary, format="PNG", pnginfo=text)
