"""Rows of FLUX.1, Flex.1 and Flex.2 in the table of architectures."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from arch_row import Row
from detour.archs.base import ArchSpec
from detour.archs.flux_parts import packed, unpacked
from detour.sample import Request


class _FluxTruth(nn.Module):
    """Noise minus clean in tokens of 2 x 2 positions: what a perfect FLUX returns."""

    def __init__(self, clean_BCHW: Tensor, noise_BCHW: Tensor) -> None:
        super().__init__()
        self.field_BLD = packed(noise_BCHW - clean_BCHW)
        self.dtype = clean_BCHW.dtype
        self.config = SimpleNamespace(guidance_embeds=True)

    def forward(self, hidden_states: Tensor, timestep: Tensor, return_dict: bool, **_: Any) -> Any:
        assert hidden_states.shape[1] == self.field_BLD.shape[1]
        assert not return_dict and timestep.max() <= 1
        return (self.field_BLD.expand(len(hidden_states), -1, -1),)


def _draw(pipeline: Any, request: Request, spec: ArchSpec) -> Tensor:
    """Latents that diffusers' FLUX pipeline draws, unpacked."""
    tokens_BLD = pipeline(
        prompt=request.prompt,
        width=request.width,
        height=request.height,
        num_inference_steps=request.steps,
        guidance_scale=spec.diffusers_guidance(request.guidance),
        generator=torch.Generator("cpu").manual_seed(request.seed),
        output_type="latent",
        max_sequence_length=spec.text_tokens,
    ).images
    return unpacked(tokens_BLD, (request.height // 8, request.width // 8))


def flex2_pipeline() -> Any:
    """A plain pipeline for Flex.2, since none of diffusers' takes 196 channels: its loop with nothing left out.

    The pictures that it is told of are by default those of the pipeline in the model's repository: zeros, where to fill
    ones, zeros.
    """
    import numpy as np
    from diffusers import FluxPipeline

    class Flex2Pipeline(FluxPipeline):
        @torch.no_grad()
        def __call__(self, prompt: str, *, told_B33HW: Tensor | None = None, **options: Any) -> Any:
            height, width, steps = (options[name] for name in ("height", "width", "num_inference_steps"))
            rows, columns = height // 16, width // 16
            tokens, pooled, text_ids = self.encode_prompt(prompt, None, max_sequence_length=512)
            noise = torch.randn(1, 16, 2 * rows, 2 * columns, generator=options["generator"])
            latents = self._pack_latents(noise, 1, 16, 2 * rows, 2 * columns)
            if told_B33HW is None:
                told_B33HW = torch.cat(
                    [torch.zeros_like(noise), torch.ones_like(noise[:, :1]), torch.zeros_like(noise)], 1
                )
            inpaint, hole, control = (
                self._pack_latents(part, 1, part.shape[1], 2 * rows, 2 * columns)
                for part in told_B33HW.split([16, 1, 16], dim=1)
            )
            ids = self._prepare_latent_image_ids(1, rows, columns, latents.device, latents.dtype)
            config = self.scheduler.config
            slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
            mu = rows * columns * slope + (config.base_shift - slope * config.base_image_seq_len)
            self.scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
            for t in self.scheduler.timesteps:
                field = self.transformer(
                    hidden_states=torch.cat([latents, inpaint, hole, control], dim=2),
                    timestep=t.expand(1) / 1000,
                    guidance=torch.full([1], options["guidance_scale"]),
                    pooled_projections=pooled,
                    encoder_hidden_states=tokens,
                    txt_ids=text_ids,
                    img_ids=ids,
                    return_dict=False,
                )[0]
                latents = self.scheduler.step(field, t, latents, return_dict=False)[0]
            return SimpleNamespace(images=latents)

    return Flex2Pipeline


def _full(**config: Any) -> Any:
    """`transformer/config.json` of FLUX.1-dev as published; Flex.1-alpha and Flex.2-preview say what they have else."""
    from diffusers import FluxTransformer2DModel

    published = {
        "in_channels": 64,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,  # T5 v1.1 XXL: 24 layers, 64 heads of 64, feed-forward 10240
        "pooled_projection_dim": 768,  # CLIP-L: 12 layers, 12 heads, feed-forward 3072
        "guidance_embeds": True,
        "axes_dims_rope": (16, 56, 56),
    }
    return lambda: FluxTransformer2DModel(**(published | config))


ROWS = [
    Row(
        name="flux",
        pipeline="FluxPipeline",
        native_truth=_FluxTruth,
        lora_blocks=2 * 14 + 3 * 6,
        lora_all=2 * 14 + 3 * 6 + 10,
        full_size=_full(),
        full_parameters=11_901_408_320,  # the sizes in the repository's index; schnell: 11,891,178,560
        full_lora_blocks=19 * 14 + 38 * 6,
        draw=_draw,
    ),
    Row(
        name="flex1",
        pipeline="FluxPipeline",
        native_truth=_FluxTruth,
        lora_blocks=8 * 14 + 38 * 6,
        lora_all=8 * 14 + 38 * 6 + 10,
        full_size=_full(num_layers=8),
        full_parameters=8_163_264_064,  # "8 billion" on its page
        full_lora_blocks=8 * 14 + 38 * 6,
        draw=_draw,
    ),
    Row(
        name="flex2",
        pipeline="Flex2Pipeline",
        pipeline_class=flex2_pipeline,
        native_truth=_FluxTruth,
        lora_blocks=2 * 14 + 3 * 6,
        lora_all=2 * 14 + 3 * 6 + 10,
        full_size=_full(num_layers=8, in_channels=196, out_channels=64),
        full_parameters=8_163_669_568,
        full_lora_blocks=8 * 14 + 38 * 6,
        draw=_draw,
    ),
]
