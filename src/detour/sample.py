"""The denoise loop: used by the command line and by previews in training, so that both draw the same picture.

The grid of times comes from the model's own diffusers scheduler, the initial noise from a CPU generator: the same seed
gives the picture that the architecture's diffusers pipeline draws with a CPU generator of that seed.

Shapes: B batch (1 here), C channels, H W latent height and width, F frames. Tensors named BCHW are BCFHW where the
model draws video (`ArchSpec.frame_factor`).
"""

from __future__ import annotations

import inspect
import json
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from detour import UserError, __version__, files
from detour.archs.base import Framing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor, nn

    from detour.archs.base import Arch, ArchSpec, Condition, Control, Scheduler

    Predict = Callable[[Tensor, Tensor, Sequence[Condition]], Tensor]
    """The model's answer to states, times and conditions: `Arch.predict` without its first argument."""


FPS = 16.0
"""Frames a second at which clips are played where nothing else is said."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One picture or clip to draw. `guidance` counts 1 as none; sizes are pixels."""

    prompt: str
    seed: int
    width: int
    height: int
    steps: int
    guidance: float = 1.0
    negative: str = ""
    lora_scale: float = 1.0
    frames: int = 1
    """1 is a picture; models of video alone draw more."""
    fps: float = FPS
    """Frames a second at which a clip is played; the model draws the same at any."""
    control: str | None = None
    """File of a picture to follow, for models that take one."""
    inpaint: str | None = None
    """File of a picture whose transparent parts are to be filled, for models that do."""

    def prompts(self, spec: ArchSpec) -> list[str]:
        """The texts that must be embedded to draw it."""
        if self.guidance > 1 and spec.guidance_kind == "negative":
            return [self.prompt, spec.negative_mark + self.negative]
        return [self.prompt]


def check_request(spec: ArchSpec, request: Request) -> None:
    """Refuse a size that the model's patches do not divide, frames that it cannot draw, a seed beyond any generator."""
    problem = spec.size_problem(request.width, request.height)
    if problem is not None:
        raise UserError(f"a picture of {problem}")
    problem = spec.frames_problem(request.frames)
    if problem is not None:
        raise UserError(f"a clip of {problem}")
    if not 0 <= request.seed < 2**63:
        raise UserError(f"the seed {request.seed} of a picture is not a whole number from 0 to 2^63 - 1")
    asked: dict[Control, str | None] = {"control": request.control, "inpaint": request.inpaint}
    for kind, file in asked.items():
        if file is not None and kind not in spec.controls:
            raise UserError(f"{kind}: {spec.title} is told of no such pictures; leave out {file}")


def initial_noise(spec: ArchSpec, request: Request) -> Tensor:
    """noise_BCHW, float32 on the CPU: what diffusers draws for that seed."""
    return _drawn(spec, request, torch.Generator("cpu").manual_seed(request.seed))


def _drawn(spec: ArchSpec, request: Request, generator: torch.Generator) -> Tensor:
    shape = (1, *spec.latent_shape(request.width, request.height, request.frames))
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
    latents_BCHW = noise_BCHW
    predict = partial(arch.predict, denoiser)
    for _, latents_BCHW in trajectory(arch, predict, scheduler, noise_BCHW, request, conditions):  # noqa: B007
        pass
    return latents_BCHW


@torch.no_grad()
def trajectory(
    arch: Arch,
    predict: Predict,
    scheduler: Scheduler,
    noise_BCHW: Tensor,
    request: Request,
    conditions: list[Condition],
) -> Iterator[tuple[float, Tensor]]:
    """The states that `denoise` passes, each with its time: the first before any step, the last (time 0) is the result.

    The next step is taken only when it is asked for, with what `predict` answers to it.
    """
    device = noise_BCHW.device
    framing = arch.picture_condition(Framing.whole(request.width, request.height), request.guidance)
    order = -1 if arch.spec.negative_first else 1
    conditions = [condition | framing for condition in conditions][::order]
    arch.set_timesteps(scheduler, request.steps, (noise_BCHW.shape[-2], noise_BCHW.shape[-1]), device)
    step = _stepper(arch.spec, scheduler, request)
    diffusion = arch.spec.objective != "flow"  # their schedulers have scales of their own for noise and states
    latents_BCHW = noise_BCHW * scheduler.init_noise_sigma if diffusion else noise_BCHW
    for timestep in scheduler.timesteps:
        yield float(timestep) / 1000, latents_BCHW
        # In double (on the CPU: Apple's devices have none), so that an architecture that multiplies by 1000 again gets
        # the scheduler's own timestep back to the last bit.
        t_B = torch.full((len(conditions),), float(timestep) / 1000, dtype=torch.float64)
        state_BCHW = scheduler.scale_model_input(latents_BCHW, timestep) if diffusion else latents_BCHW
        if arch.spec.guidance_batched:
            field = predict(torch.cat([state_BCHW] * len(conditions)), t_B, conditions)
        else:
            field = torch.cat([predict(state_BCHW, t_B[:1], [told]) for told in conditions])
        if len(conditions) == 2:
            positive, negative = (field[:1], field[1:])[::order]
            field = arch.guided(positive, negative, request.guidance)
        latents_BCHW = step(field, timestep, latents_BCHW)
    yield 0.0, latents_BCHW


def _stepper(spec: ArchSpec, scheduler: Scheduler, request: Request) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The scheduler's step. What a stochastic one draws goes on after the initial noise, as in diffusers."""
    options: dict[str, object] = {"return_dict": False}
    if "generator" in inspect.signature(scheduler.step).parameters:
        generator = torch.Generator("cpu").manual_seed(request.seed)
        _drawn(spec, request, generator)
        options["generator"] = generator
    return lambda field, timestep, latents: scheduler.step(field, timestep, latents, **options)[0]


@torch.no_grad()
def to_frames(arch: Arch, vae: nn.Module, latents_BCHW: Tensor) -> list[Image.Image]:
    """The frames of the first clip of a batch of latents; of a picture, the one that it is."""
    pixels_B3HW = arch.decode(vae, latents_BCHW)
    pixels_3FHW = pixels_B3HW[0] if arch.spec.frame_factor is not None else pixels_B3HW[0].unsqueeze(1)
    levels_FHW3 = (pixels_3FHW * 0.5 + 0.5).clamp(0, 1).permute(1, 2, 3, 0).float().cpu().numpy()
    return [Image.fromarray(levels_HW3) for levels_HW3 in (levels_FHW3 * 255).round().astype(np.uint8)]


def save_picture(
    path: Path, frames: Sequence[Image.Image], request: Request, spec: ArchSpec, facts: dict[str, str]
) -> None:
    """Write a PNG, animated where there are several frames. Its text says how to draw it again, here and elsewhere."""
    text = PngInfo()
    asked = {name: value for name, value in asdict(request).items() if value is not None}
    asked |= {name: Path(asked[name]).name for name in ("control", "inpaint") if name in asked}  # folders are private
    settings = asked | {"software": f"detour {__version__}", "architecture": spec.name} | facts
    if len(frames) == 1:
        del settings["frames"], settings["fps"]
    # Both countings of guidance, so that the picture can be drawn again elsewhere (docs/design.md §3).
    settings["guidance_diffusers"] = spec.diffusers_guidance(request.guidance)
    for key, value in settings.items():
        text.add_itxt(f"detour:{key}", str(value))
    text.add_itxt("parameters", json.dumps(settings, ensure_ascii=False))  # the field that picture browsers show
    # Milliseconds are whole, so each frame ends at the rounded time of the next: 62, 63, 62, ... at 16 a second.
    ends = [round(1000 * count / request.fps) for count in range(len(frames) + 1)]
    animation = {
        "save_all": True,
        "append_images": frames[1:],
        "duration": [end - start for start, end in pairwise(ends)],
        "loop": 0,
    }
    with files.new_file(path) as temporary:
        frames[0].save(temporary, format="PNG", pnginfo=text, **(animation if len(frames) > 1 else {}))
