"""Pictures that a preview is told of besides its prompt: one to follow, and one with a hole to fill.

Shapes: C channels, H W latent height and width.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from detour import UserError
from detour.data import images
from detour.data.images import BadPictureError, Budget, Facts, Transform

if TYPE_CHECKING:
    from detour.archs.base import Arch, Condition
    from detour.sample import Request


def check(request: Request) -> None:
    """Read the pictures that a request names; UserError where one cannot be used."""
    for option, name in (("control", request.control), ("inpaint", request.inpaint)):
        if name is None:
            continue
        facts = _facts(option, name, request)
        if option == "inpaint" and not facts.alpha:
            raise UserError(f"inpaint: {name} has no transparent part; erase what is to be filled")


def told(arch: Arch, vae: nn.Module, request: Request, device: torch.device) -> Condition:
    """What the model is told of them: latents of the picture's size, and where its hole is."""
    condition: Condition = {}
    if request.control is not None:
        condition["control_CHW"] = _encoded(arch, vae, "control", request.control, request, device)
    if request.inpaint is not None:
        facts = _facts("inpaint", request.inpaint, request)
        clean_CHW = _encoded(arch, vae, "inpaint", request.inpaint, request, device)
        (opaque,) = images.mask_pixels(Path(request.inpaint), facts.sha256, [_cover(facts, request, False)], alpha=True)
        kept_1HW = nn.functional.avg_pool2d(torch.from_numpy(opaque)[None].float() / 255, arch.spec.spatial_factor)
        condition |= {"inpaint_CHW": clean_CHW * kept_1HW, "hole_1HW": 1 - kept_1HW}
    return condition


def _facts(option: str, name: str, request: Request) -> Facts:
    try:
        return images.check(Path(name), Budget(), max(request.width, request.height))
    except BadPictureError as error:
        raise UserError(f"{option}: {name} {error}") from error


def _cover(facts: Facts, request: Request, flatten: bool) -> Transform:
    """Scaled so that it covers the picture to draw, and cut in the middle, as pictures to train on are."""
    scale = max(request.width / facts.width, request.height / facts.height)
    scaled_w, scaled_h = (
        max(request.width, round(facts.width * scale)),
        max(request.height, round(facts.height * scale)),
    )
    return Transform(
        scaled_w=scaled_w,
        scaled_h=scaled_h,
        left=(scaled_w - request.width) // 2,
        top=(scaled_h - request.height) // 2,
        width=request.width,
        height=request.height,
        flip_x=False,
        flip_y=False,
        flatten=flatten,
    )


def _encoded(arch: Arch, vae: nn.Module, option: str, name: str, request: Request, device: torch.device) -> Tensor:
    facts = _facts(option, name, request)
    # A hole's colours do not matter, but what lies next to it must not be mixed with white.
    (array,) = images.pixels(Path(name), facts.sha256, [_cover(facts, request, flatten=option == "control")])
    pixels_3HW = torch.from_numpy(array).movedim(-1, 0).float() / 127.5 - 1.0
    return arch.encode_images(vae, pixels_3HW[None].to(device))[0].cpu()
