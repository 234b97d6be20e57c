"""FLUX.1 and its relatives Flex.1 and Flex.2: a transformer with double blocks (a stream of its own for image and for
text) and single blocks (one stream), CLIP-L for one vector of the prompt, T5 for its tokens, a 16-channel VAE.

Latents are packed: each token holds 2 x 2 positions. Guidance is a number that the model is told where its weights have
an embedding for it; training tells FLUX.1 dev 1, its own way of no guidance. Flex was taught without: in training its
embedding is left out of the sum, in sampling it takes part, as its maker asks.
Flex.2 takes 33 more channels: a picture with a hole, the hole's mask, and a control picture, zeros where none is given.

Shapes: B batch, C channels, H W latent height and width (of pictures: pixels), L tokens, D features.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from detour import UserError
from detour.archs import flux_parts, parts
from detour.archs.base import ArchSpec, DynamicShift, Variant
from detour.nn.lora_keys import LoraKeys

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import torch
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
    from torch import Tensor

    from detour.archs.base import Arch, Condition, Framing
    from detour.archs.parts import TextModels
    from detour.config.job import ModelArch
    from detour.weights import ModelSource, Placement

_ATTENTION = r"attn\.(to_(q|k|v|out\.0|add_out)|add_(q|k|v)_proj)"
_DOUBLE = rf"transformer_blocks\.\d+\.({_ATTENTION}|ff(_context)?\.net\.(0\.proj|2)|norm1(_context)?\.linear)"
_SINGLE = r"single_transformer_blocks\.\d+\.(attn\.to_(q|k|v)|proj_mlp|proj_out|norm\.linear)"
_EMBEDDERS = (
    r"(time_text_embed\.(timestep|guidance|text)_embedder\.linear_[12]|context_embedder|x_embedder|norm_out\.linear"
    r"|proj_out)"
)

_DEV = "black-forest-labs/FLUX.1-dev"
_SHIFT = DynamicShift()  # 256 to 4096 tokens, mu 0.5 to 1.15: what the published schedulers say
_NOT_APACHE = "FLUX.1 [dev] Non-Commercial License"

FLUX = ArchSpec(
    name="flux",
    title="FLUX.1",
    objective="flow",
    variants={
        "dev": Variant(
            repo=_DEV,
            distilled=False,
            steps=28,
            guidance=3.5,
            timestep_type="sigmoid",
            config={"guidance_embeds": True},
        ),
        "schnell": Variant(
            repo="black-forest-labs/FLUX.1-schnell",
            distilled=True,
            steps=4,
            guidance=1.0,
            fixed_guidance=True,
            timestep_type="sigmoid",
            adapter="ostris/FLUX.1-schnell-training-adapter/pytorch_lora_weights.safetensors",
            config={"guidance_embeds": False},
            shift=1.0,
            text_tokens=256,
            modelspec="flux-1-schnell",
            licence="Apache-2.0",
        ),
    },
    default_variant="dev",
    latent_channels=16,
    spatial_factor=8,
    bucket_divisibility=16,
    text_tokens=512,
    text_multiple=512,  # every prompt is padded to one length, and the padding is attended to
    shift=_SHIFT,
    lora_blocks=f"({_DOUBLE}|{_SINGLE})",
    lora_all=f"({_DOUBLE}|{_SINGLE}|{_EMBEDDERS})",
    quantize_exclude=rf"^{_EMBEDDERS}$",
    lora_keys=LoraKeys(
        # ComfyUI maps diffusers' names after `transformer.` onto its own (model_lora_keys_unet in comfy/lora.py, which
        # takes flux_to_diffusers from comfy/utils.py) and reads alpha beside them; so does diffusers. It reads the
        # original names after `diffusion_model.` too, but those hold q, k and v as one layer.
        comfy_prefix="transformer.",
        diffusers_prefix="transformer.",
        kohya_prefix="lora_unet_",
        original=flux_parts.ORIGINAL,
        original_in=("kohya",),
        whole_blocks=flux_parts.KOHYA_BLOCKS,
    ),
    modelspec="flux-1-dev",
    licence=_NOT_APACHE,
    components=(
        "transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler",
    ),
    diffusers_loader="FluxLoraLoaderMixin",
    diffusers_kinds=("lora", "dora"),
    guidance_kind="embedded",
)  # fmt: skip

FLEX1 = replace(
    FLUX,
    name="flex1",
    title="Flex.1",
    variants={
        "alpha": Variant(
            repo="ostris/Flex.1-alpha",
            distilled=False,
            steps=28,
            guidance=3.5,
            timestep_type="shift",
            config={"guidance_embeds": True, "num_layers": 8},
        )
    },
    default_variant="alpha",
    modelspec="flex-1-alpha",
    licence="Apache-2.0",
)

FLEX2 = replace(
    FLEX1,
    name="flex2",
    title="Flex.2",
    variants={
        "preview": Variant(
            repo="ostris/Flex.2-preview",
            distilled=False,
            steps=28,
            guidance=3.5,
            timestep_type="shift",
            config={"guidance_embeds": True},
        )
    },
    default_variant="preview",
    modelspec="flex-2-preview",
    controls=("control", "inpaint"),
)


class Flux:
    """Behaviour of FLUX.1, and of Flex.1 and Flex.2, by their specs."""

    def __init__(self, spec: ArchSpec, *, channels: int = 64, guided_training: bool = True) -> None:
        """`channels`: of a token, packed. `guided_training`: training tells guidance 1, else none at all."""
        self.spec = spec
        self._channels, self._guided_training = channels, guided_training

    def build_denoiser(self, source: ModelSource) -> FluxTransformer2DModel:
        """The transformer on the meta device, as its config says, or, for a single file, as the shapes in it say."""
        from diffusers import FluxTransformer2DModel

        config = flux_parts.config_of(source, self.spec.title)
        flux_parts.check_channels(source.name, config, self.spec.title, self._channels)
        model = parts.on_meta(lambda: FluxTransformer2DModel.from_config(config))
        if not self._guided_training and model.config.guidance_embeds:
            dims = {"embedding_dim": model.inner_dim, "pooled_projection_dim": model.config.pooled_projection_dim}
            model.time_text_embed = parts.on_meta(lambda: flux_parts.optional_guidance()(**dims))
        return model

    def denoiser_tensors(self, source: ModelSource) -> Iterator[tuple[str, Tensor]]:
        """The transformer's weights under diffusers' names, from either layout."""
        from detour.weights import component_files, stream_tensors

        single = source.single_file
        for name, tensor in stream_tensors([single] if single else component_files(source.component("transformer"))):
            yield from flux_parts.ORIGINAL.tensors(name, tensor)

    def load_text_encoders(self, source: ModelSource, placement: Placement) -> TextModels:
        """CLIP-L and T5, streamed in like the denoiser, with their tokenizers. How long T5's prompts are depends on the
        variant (512 tokens, for schnell 256), which the transformer's config tells."""
        from transformers import CLIPTokenizer, T5TokenizerFast

        clip = parts.load_text_model("CLIPTextModel", source.component("text_encoder"), placement, parts.clip_name)
        t5 = parts.load_text_model("T5EncoderModel", source.component("text_encoder_2"), placement)
        tokens = self._variant(source).text_tokens or self.spec.text_tokens
        tokenizers = {
            "tokenizer": CLIPTokenizer.from_pretrained(source.component("tokenizer")),
            "tokenizer_2": T5TokenizerFast.from_pretrained(source.component("tokenizer_2"), model_max_length=tokens),
        }
        return parts.TextModels({"text_encoder": clip, "text_encoder_2": t5}, tokenizers)

    def _variant(self, source: ModelSource) -> Variant:
        config = flux_parts.config_of(source, self.spec.title)
        fitting = [variant for variant in self.spec.variants.values() if variant.fits(config)]
        return fitting[0] if fitting else self.spec.default

    def load_vae(self, source: ModelSource, dtype: torch.dtype, device: torch.device) -> AutoencoderKL:
        """The VAE, frozen and in eval mode."""
        return parts.load_vae("AutoencoderKL", source, dtype, device)

    def load_scheduler(
        self, source: ModelSource, changes: Mapping[str, object] | None = None
    ) -> FlowMatchEulerDiscreteScheduler:
        """The model's own scheduler. Without one: FLUX.1 dev's shift by the picture's size, or none, by the variant."""
        dynamic = self._variant(source).shift is None
        defaults = {"num_train_timesteps": 1000, "shift": 3.0 if dynamic else 1.0, "use_dynamic_shifting": dynamic}
        return parts.load_scheduler(source, "FlowMatchEulerDiscreteScheduler", defaults, changes)

    def set_timesteps(
        self, scheduler: FlowMatchEulerDiscreteScheduler, steps: int, latent_HW: tuple[int, int], device: torch.device
    ) -> None:
        """The pipeline's grid, in the double precision that it is counted in there."""
        import numpy as np

        mu = parts.mu_of(scheduler, tokens=(latent_HW[0] // 2) * (latent_HW[1] // 2))
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu, device=device)
        scheduler.set_begin_index(0)

    def encode_prompts(self, text: TextModels, prompts: Sequence[str]) -> list[Condition]:
        """For each prompt CLIP's `pooled_D`, and T5's `tokens_LD`, padded to one length as in the pipeline."""
        import torch

        clip, t5 = text.models["text_encoder"], text.models["text_encoder_2"]
        device = next(clip.parameters()).device
        conditions: list[Condition] = []
        for prompt in prompts:
            ids_BL, long_ids_BL = (
                tokenizer([prompt], padding="max_length", truncation=True, return_tensors="pt").input_ids.to(device)
                for tokenizer in (text.tokenizers["tokenizer"], text.tokenizers["tokenizer_2"])
            )
            with torch.no_grad():
                pooled_D, tokens_LD = clip(ids_BL).pooler_output[0], t5(long_ids_BL)[0][0]
            conditions.append({"pooled_D": pooled_D, "tokens_LD": tokens_LD})
        return conditions

    def picture_condition(self, framing: Framing, guidance: float | None) -> Condition:
        """The guidance; in training 1, or nothing where the model was trained without."""
        import torch

        if guidance is None and not self._guided_training:
            return {}
        return {"guidance": torch.tensor(1.0 if guidance is None else guidance)}

    def encode_images(self, vae: AutoencoderKL, pixels_B3HW: Tensor) -> Tensor:
        """Pixels in [-1, 1] to normalised latents (the mean of the posterior), float32."""
        return parts.encode_images(vae, pixels_B3HW)

    def decode(self, vae: AutoencoderKL, latents_BCHW: Tensor) -> Tensor:
        """Normalised latents to pixels in [-1, 1], float32."""
        return parts.decode(vae, latents_BCHW)

    def predict(
        self, denoiser: FluxTransformer2DModel, latents_BCHW: Tensor, t_B: Tensor, conditions: Sequence[Condition]
    ) -> Tensor:
        """v = eps - z_0 at (z_t, t), float32."""
        import torch

        if len(conditions) != len(latents_BCHW):
            raise ValueError(f"{len(latents_BCHW)} pictures, {len(conditions)} conditions")
        dtype, device = denoiser.dtype, latents_BCHW.device
        latent_HW = (latents_BCHW.shape[-2], latents_BCHW.shape[-1])
        tokens_BLD, pooled_BD = (
            torch.stack([condition[name] for condition in conditions]).to(device, dtype)
            for name in ("tokens_LD", "pooled_D")
        )
        state_BCHW = latents_BCHW
        if self.spec.controls:
            told_BCHW = torch.stack([flux_parts.told(condition, latent_HW) for condition in conditions])
            state_BCHW = torch.cat([latents_BCHW, told_BCHW.to(latents_BCHW)], dim=1)
        out_BLD = denoiser(
            hidden_states=flux_parts.packed(state_BCHW).to(dtype),
            # The scheduler's timestep is float32 and the pipeline computes from it: so do we, to get the same bits.
            timestep=(t_B * 1000).float().to(device) / 1000,
            guidance=_guidance(denoiser, conditions, device),
            pooled_projections=pooled_BD,
            encoder_hidden_states=tokens_BLD,
            txt_ids=torch.zeros(tokens_BLD.shape[1], 3, device=device),
            img_ids=flux_parts.positions(latent_HW).to(device),
            return_dict=False,
        )[0]
        return flux_parts.unpacked(out_BLD.float(), latent_HW)

    def guided(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance in this project's counting: 1 leaves `positive` as it is."""
        return parts.classifier_free(positive, negative, scale)


def _guidance(denoiser: Any, conditions: Sequence[Condition], device: torch.device) -> Tensor | None:  # noqa: ANN401
    """guidance_B, or None where the model is told none."""
    import torch

    given = [condition["guidance"] for condition in conditions if "guidance" in condition]
    if denoiser.config.guidance_embeds:
        return torch.stack(given).to(device) if given else None
    if any(float(guidance) > 1 for guidance in given):
        raise UserError("guidance above 1 has no effect on a model without an embedding for it; use 1")
    return None


ARCHS: dict[ModelArch, Arch] = {
    "flux": Flux(FLUX),
    "flex1": Flux(FLEX1, guided_training=False),
    "flex2": Flux(FLEX2, channels=196, guided_training=False),
}
