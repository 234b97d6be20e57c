"""AuraFlow: a transformer with joint blocks (a stream of its own for image and for text) and single blocks (one
stream), Pile-T5 in the shape of UMT5 as text encoder, the 4-channel VAE of Stable Diffusion XL.

Prompts are always 256 tokens long: what a prompt leaves open is zeros, which are attended to. Positions of the image
are learnt, a square of them of which the middle is used: that limits the sides of a picture (1536 pixels for 0.3).

Shapes: B batch, C channels, H W latent height and width (of pictures: pixels), L tokens, D features.
"""

from __future__ import annotations

from math import isqrt
from typing import TYPE_CHECKING

from detour.archs import ldm, parts
from detour.archs.base import ArchSpec, Variant
from detour.nn.lora_keys import LoraKeys

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import torch
    from diffusers import AuraFlowTransformer2DModel, AutoencoderKL, FlowMatchEulerDiscreteScheduler
    from torch import Tensor

    from detour.archs.base import Arch, Condition, Framing
    from detour.archs.parts import TextModels
    from detour.config.job import ModelArch
    from detour.weights import ModelSource, Placement

_IMAGE_ATTENTION = r"attn\.to_(q|k|v|out\.0)"
_FEED_FORWARD = r"(linear_[12]|out_projection)"
_JOINT = (
    rf"joint_transformer_blocks\.\d+\.({_IMAGE_ATTENTION}|attn\.(add_(q|k|v)_proj|to_add_out)"
    rf"|ff(_context)?\.{_FEED_FORWARD}|norm1(_context)?\.linear)"
)
_SINGLE = rf"single_transformer_blocks\.\d+\.({_IMAGE_ATTENTION}|ff\.{_FEED_FORWARD}|norm1\.linear)"
_EMBEDDERS = r"(pos_embed\.proj|context_embedder|time_step_proj\.linear_[12]|norm_out\.linear|proj_out)"

SPEC = ArchSpec(
    name="auraflow",
    title="AuraFlow",
    objective="flow",
    variants={
        "0.3": Variant(repo="fal/AuraFlow-v0.3", distilled=False, steps=50, guidance=3.5, timestep_type="sigmoid"),
        "0.2": Variant(repo="fal/AuraFlow-v0.2", distilled=False, steps=50, guidance=3.5, timestep_type="sigmoid"),
        "pony-v7": Variant(
            repo="purplesmartai/pony-v7-base",
            distilled=False,
            steps=40,
            guidance=3.5,
            timestep_type="sigmoid",
            licence="Pony License",
        ),
    },
    default_variant="0.3",
    latent_channels=4,
    spatial_factor=8,
    bucket_divisibility=32,
    text_tokens=256,
    text_multiple=256,
    shift=1.73,
    lora_blocks=rf"({_JOINT}|{_SINGLE})",
    lora_all=rf"({_JOINT}|{_SINGLE}|{_EMBEDDERS})",
    quantize_exclude=rf"^{_EMBEDDERS}$",
    # ComfyUI maps diffusers' names after `transformer.` onto its own (comfy/lora.py, auraflow_to_diffusers). diffusers
    # reads the same names but refuses alpha beside them, so the scale is multiplied in and both take the file.
    # Kohya's way of names is what OneTrainer writes (of AuraFlow ai-toolkit too); it is read here.
    lora_keys=LoraKeys(
        comfy_prefix="transformer.",
        diffusers_prefix="transformer.",
        kohya_prefix="lora_transformer_",
        formats=("comfy", "diffusers"),
        alpha_in=("kohya",),
    ),
    modelspec="auraflow",
    licence="Apache-2.0",
    diffusers_loader="AuraFlowLoraLoaderMixin",
)


class AuraFlow:
    """Behaviour of AuraFlow, whose versions differ in their weights and in how large a picture may be."""

    spec = SPEC

    def build_denoiser(self, source: ModelSource) -> AuraFlowTransformer2DModel:
        """The transformer on the meta device, as its config says."""
        if source.single_file is not None:
            raise parts.only_as_folder(source, SPEC.title)
        return parts.diffusers_module("AuraFlowTransformer2DModel", source.component("transformer"))

    def denoiser_tensors(self, source: ModelSource) -> Iterator[tuple[str, Tensor]]:
        """The transformer's weights."""
        return parts.folder_tensors(source.component("transformer"))

    def load_text_encoders(self, source: ModelSource, placement: Placement) -> TextModels:
        """Pile-T5's encoder (`UMT5EncoderModel`), streamed in like the denoiser, and its tokenizer (Llama's)."""
        model = parts.load_text_model("UMT5EncoderModel", source.component("text_encoder"), placement)
        tokenizer = parts.load_tokenizer(source.component("tokenizer"))
        return parts.TextModels({"text_encoder": model}, {"tokenizer": tokenizer})

    def load_vae(self, source: ModelSource, dtype: torch.dtype, device: torch.device) -> AutoencoderKL:
        """The VAE, frozen and in eval mode; never in float16, in which it overflows."""
        import torch

        return ldm.load_vae(source, dtype, device, upcast=dtype == torch.float16)

    def load_scheduler(
        self, source: ModelSource, changes: Mapping[str, object] | None = None
    ) -> FlowMatchEulerDiscreteScheduler:
        """The model's own scheduler; the published one's shift where the model comes without one."""
        defaults = {"num_train_timesteps": 1000, "shift": SPEC.shift}
        return parts.load_scheduler(source, "FlowMatchEulerDiscreteScheduler", defaults, changes)

    def set_timesteps(
        self, scheduler: FlowMatchEulerDiscreteScheduler, steps: int, latent_HW: tuple[int, int], device: torch.device
    ) -> None:
        """The scheduler's own grid, whatever the picture's size."""
        scheduler.set_timesteps(steps, device=device)
        scheduler.set_begin_index(0)

    def encode_prompts(self, text: TextModels, prompts: Sequence[str]) -> list[Condition]:
        """`tokens_LD` for each prompt: the encoder's output, L always 256, zeros where there is no token.

        One prompt at a time, and padded on the side that the tokenizer pads on, as in the pipeline.
        """
        import torch

        model, tokenizer = text.models["text_encoder"], text.tokenizers["tokenizer"]
        device = next(model.parameters()).device
        conditions: list[Condition] = []
        for prompt in prompts:
            inputs = tokenizer(
                [prompt], truncation=True, max_length=SPEC.text_tokens, padding="max_length", return_tensors="pt"
            )
            mask_BL = inputs.attention_mask.to(device)
            with torch.no_grad():
                states_BLD = model(inputs.input_ids.to(device), attention_mask=mask_BL)[0]
            conditions.append({"tokens_LD": states_BLD[0] * mask_BL[0][:, None]})
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
        self, denoiser: AuraFlowTransformer2DModel, latents_BCHW: Tensor, t_B: Tensor, conditions: Sequence[Condition]
    ) -> Tensor:
        """v = eps - z_0 at (z_t, t), float32. The model is told t itself, each picture its own."""
        import torch

        if len(conditions) != len(latents_BCHW):
            raise ValueError(f"{len(latents_BCHW)} pictures, {len(conditions)} conditions")
        # Beyond its positions the model would take others without a word: those of the end of the row before.
        parts.check_sides(SPEC, latents_BCHW, 2 * isqrt(denoiser.config.pos_embed_max_size))
        dtype, device = denoiser.dtype, latents_BCHW.device
        tokens_BLD = torch.stack([condition["tokens_LD"] for condition in conditions]).to(device, dtype)
        # By way of the scheduler's float32 timestep, from which the pipeline computes, to get the same bits.
        velocity_BCHW: Tensor = denoiser(
            latents_BCHW.to(dtype),
            encoder_hidden_states=tokens_BLD,
            timestep=(t_B * 1000).float().to(device) / 1000,
            return_dict=False,
        )[0]
        return velocity_BCHW.float()

    def guided(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance as the pipeline computes it: 1 leaves `positive` as it is."""
        return parts.classifier_free(positive, negative, scale)


ARCHS: dict[ModelArch, Arch] = {"auraflow": AuraFlow()}
