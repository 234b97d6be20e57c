"""Random Stable Diffusion 1 and 2 in miniature, in the folder layout of the real ones: about 2 M parameters.

Every part is of the real class, and the UNet has the real blocks (four stages of two layers, 16 transformers); 8 heads
everywhere in 1.x, heads of one width in 2.x. Of 2.x there are the published three: 2.1 predicts velocity with DDIM, its
base noise with PNDM, and sd-turbo noise with Euler's steps. The VAE is built by hand (`parts.build_vae`).

Files are a pure function of the seed, byte for byte; the global random state is left as it was.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from detour import UserError
from detour.nano import ldm, parts
from detour.nn.quiet import without_bars

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

DTYPE = torch.bfloat16
TEXT_DIM = 32
_LEVELS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
_PNDM = {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "set_alpha_to_one": False}
_SCHEDULERS: dict[tuple[str, str], Mapping[str, object]] = {
    ("sd1", "v1-5"): _PNDM,
    ("sd1", "lcm"): {"_class_name": "LCMScheduler", "clip_sample": False, "set_alpha_to_one": False},
    ("sd2", "v2-1"): {
        "_class_name": "DDIMScheduler",
        "prediction_type": "v_prediction",
        "clip_sample": False,
        "set_alpha_to_one": False,
    },
    ("sd2", "v2-1-base"): _PNDM,
    ("sd2", "turbo"): {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"},
}
_DEFAULT = {"sd1": "v1-5", "sd2": "v2-1"}
_UNETS: dict[str, dict[str, Any]] = {
    "sd1": {"attention_head_dim": 8},
    "sd2": {"attention_head_dim": [2, 2, 3, 3], "use_linear_projection": True},
}
ORIGINAL_TEXT = {"sd1": "cond_stage_model.transformer.", "sd2": "cond_stage_model.model."}


def write(folder: Path, arch: str = "sd1", variant: str = "", *, seed: int = 0) -> None:
    """Write the miniature into `folder` in the diffusers layout, ready for `from_pretrained`."""
    scheduler = _SCHEDULERS.get((arch, variant or _DEFAULT.get(arch, "")))
    if scheduler is None:
        allowed = ", ".join(f"{name}:{kind}" for name, kind in _SCHEDULERS)
        raise UserError(f"detour nano: {arch}:{variant} is not known here; allowed: {allowed}")
    import diffusers
    from transformers import CLIPTextModel

    key = (f"nano {arch}", seed)
    with torch.random.fork_rng(devices=[]):  # constructors draw initial weights, all of which are replaced
        tokenizer = parts.clip_tokenizer("!" if arch == "sd2" else "<|endoftext|>")
        unet = ldm.unet(*key, "unet", block_out_channels=ldm.CHANNELS, cross_attention_dim=TEXT_DIM, **_UNETS[arch])
        pipeline = diffusers.StableDiffusionPipeline(
            scheduler=getattr(diffusers, str(scheduler["_class_name"])).from_config(_LEVELS | dict(scheduler)),
            vae=parts.build_vae(4, scaling=0.18215, shift=None, quant_conv=True).to(DTYPE),
            text_encoder=parts.clip_text(CLIPTextModel, len(tokenizer), *key, "text", width=TEXT_DIM).to(DTYPE),
            tokenizer=tokenizer,
            unet=unet.to(DTYPE),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    with without_bars():
        pipeline.save_pretrained(folder)


def write_original(path: Path, folder: Path, arch: str, *, bundled: bool = True) -> None:
    """Write the model in `folder` as a single file in the original layout; `bundled` with VAE and text encoder."""
    tensors = ldm.original_unet(folder)
    if bundled:
        tensors |= ldm.original_vae(folder) | ldm.original_clip(folder, "text_encoder", ORIGINAL_TEXT[arch])
    ldm.save(path, tensors)
