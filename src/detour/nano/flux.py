"""Random FLUX.1, Flex.1 and Flex.2 in miniature, in the folder layout of the real ones.

Every part is of the real class: transformer, CLIP, T5, AutoencoderKL, their tokenizers, the flow scheduler. Flex.1 has
its real numbers of blocks (8 double, 38 single), the others a few. Transformers are scaled so that every block takes
part; the VAE is built by hand and gives back exact 8 x 8 block means (`parts.build_vae`).

Files are a pure function of the seed, byte for byte; the global random state is left as it was."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from detour import UserError
from detour.archs import flux_parts
from detour.nano import parts
from detour.nn.quiet import without_bars

if TYPE_CHECKING:
    from pathlib import Path

    from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

DTYPE = torch.bfloat16  # what the published weights are stored in
TEXT_DIM = 32
HEAD = 32  # of which 4, 14, 14 turn with the position: the real 16, 56, 56 of 128
_BLOCKS = {"flux": (2, 3, 2), "flex1": (8, 38, 1), "flex2": (2, 3, 2)}
"""Double blocks, single blocks, heads."""
_CHANNELS = {"flux": 64, "flex1": 64, "flex2": 196}
_VARIANTS = {"flux": ("", "dev", "schnell"), "flex1": ("", "alpha"), "flex2": ("", "preview")}


def write(folder: Path, arch: str, variant: str = "", *, seed: int = 0) -> None:
    """Write the miniature into `folder` in the diffusers layout. `flux:schnell` has no embedding of guidance."""
    if variant not in _VARIANTS[arch]:
        allowed = ", ".join(name for name in _VARIANTS[arch] if name)
        raise UserError(f"detour nano: {arch}:{variant} is not known here; variants of {arch}: {allowed}")
    from diffusers import FluxPipeline
    from transformers import CLIPTextModel, T5EncoderModel

    with torch.random.fork_rng(devices=[]):  # constructors draw initial weights, all of which are replaced
        tokenizer, tokenizer_2 = parts.clip_tokenizer(), parts.t5_tokenizer(512)
        key = ("nano flux", arch, seed)
        pipeline = FluxPipeline(
            scheduler=_scheduler(dynamic=variant != "schnell"),
            vae=parts.build_vae(16, scaling=0.3611, shift=0.1159).to(DTYPE),
            text_encoder=parts.clip_text(CLIPTextModel, len(tokenizer), *key, "clip", width=TEXT_DIM).to(DTYPE),
            tokenizer=tokenizer,
            text_encoder_2=parts.t5_encoder(T5EncoderModel, len(tokenizer_2), *key, "t5", width=TEXT_DIM).to(DTYPE),
            tokenizer_2=tokenizer_2,
            transformer=_transformer(arch, variant, *key).to(DTYPE),
        )
    with without_bars():
        pipeline.save_pretrained(folder)


def write_original(path: Path, folder: Path, prefix: str = "") -> None:
    """Write the transformer in `folder` as a single file in the original layout (fused layers, original names).

    `prefix` is put before every key; checkpoints for ComfyUI have `model.diffusion_model.`.
    """
    tensors = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    original: dict[str, Tensor] = {}
    for name in list(flux_parts.ORIGINAL.table):
        for number in range(64) if "{}" in name else ("",):
            held = flux_parts.ORIGINAL.find(theirs := name.replace("{}", str(number)))
            assert held is not None
            for ending in ("weight", "bias"):
                given = [tensors.pop(f"{layer}.{ending}", None) for layer in held.layers]
                whole = torch.cat([part for part in given if part is not None]) if given[0] is not None else None
                if whole is not None:
                    whole = whole.roll(len(whole) // 2, 0) if held.swapped else whole
                    original[f"{prefix}{theirs}.{'scale' if '_norm' in theirs else ending}"] = whole
    assert not tensors, f"names without a place in the original layout: {list(tensors)}"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(original, path, metadata={"format": "pt"})


def _scheduler(*, dynamic: bool) -> FlowMatchEulerDiscreteScheduler:
    """With the settings of the published ones: dev (and Flex) shift by the picture's size, schnell not at all."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        shift=3.0 if dynamic else 1.0,
        use_dynamic_shifting=dynamic,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )


def _transformer(arch: str, variant: str, *key: int | str) -> FluxTransformer2DModel:
    """Variance-preserving weights, gates half open, an output of a standard deviation of about one half."""
    from diffusers import FluxTransformer2DModel

    double, single, heads = _BLOCKS[arch]
    model = FluxTransformer2DModel(
        in_channels=_CHANNELS[arch],
        out_channels=64,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=HEAD,
        num_attention_heads=heads,
        joint_attention_dim=TEXT_DIM,
        pooled_projection_dim=TEXT_DIM,
        guidance_embeds=variant != "schnell",
        axes_dims_rope=(HEAD // 8, HEAD * 7 // 16, HEAD * 7 // 16),
    ).eval()
    dim = heads * HEAD
    # Shift, scale, gate of attention and of feed-forward (of single blocks: of both at once).
    gates = {6 * dim: torch.tensor([0.0, 0.0, 0.5] * 2), 3 * dim: torch.tensor([0.0, 0.0, 0.5])}
    for name, parameter, draw in parts.drawn(model, *key, "transformer"):
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
            if "transformer_blocks" in name and ".linear.bias" in name:
                parameter.copy_(gates[len(parameter)].repeat_interleave(dim))
        elif parameter.ndim == 1:
            nn.init.ones_(parameter)
        else:
            gain = 0.5 if name.startswith("proj_out") or ".linear." in name else 1.0
            parameter.copy_(draw * gain / math.sqrt(parameter.shape[-1]))
    return model
