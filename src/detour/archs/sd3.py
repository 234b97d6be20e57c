"""Stable Diffusion 3 and 3.5: a transformer over image and text in joint blocks, three text encoders, a 16-channel VAE.

CLIP-L and CLIP-G give a vector of the prompt and 77 tokens (the last layer but one, side by side), T5 gives 256 more;
CLIP's are padded with zeros to T5's width. A model may be made without T5, which saves 9.5 GB: its tokens are zeros
then, which are attended to, as in the pipeline. A folder that merely misses T5 is an error.

A checkpoint that is one file is in the original layout (`joint_blocks...`) and may hold the VAE and encoders besides,
which then come from it; or it is the transformer alone, in either layout.

Shapes: B batch, C channels, H W latent height and width (of pictures: pixels), L tokens, D features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from detour.archs import ldm, parts, sd3_parts
from detour.archs.base import ArchSpec, Variant
from detour.nn.lora_keys import LoraKeys

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import torch
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
    from torch import Tensor

    from detour.archs.base import Arch, Condition, Framing
    from detour.archs.parts import TextModels
    from detour.config.job import ModelArch
    from detour.weights import ModelSource, Placement

_BLOCKS = (
    r"transformer_blocks\.\d+\.(attn2?\.to_(q|k|v|out\.0)|attn\.(add_(q|k|v)_proj|to_add_out)"
    r"|ff(_context)?\.net\.(0\.proj|2)|norm1(_context)?\.linear)"
)
_EMBEDDERS = r"(time_text_embed\.(timestep|text)_embedder\.linear_[12]|context_embedder|norm_out\.linear|proj_out)"

SPEC = ArchSpec(
    name="sd3",
    title="Stable Diffusion 3",
    objective="flow",
    variants={
        "medium": Variant(
            repo="stabilityai/stable-diffusion-3-medium-diffusers",
            distilled=False,
            steps=28,
            guidance=7.0,
            timestep_type="sigmoid",
            config={"qk_norm": None},
            modelspec="stable-diffusion-3-m",
        ),
        "3.5-medium": Variant(
            repo="stabilityai/stable-diffusion-3.5-medium",
            distilled=False,
            steps=40,
            guidance=4.5,
            timestep_type="sigmoid",
            config={"qk_norm": "rms_norm"},
            modelspec="stable-diffusion-3-5-medium",
        ),
        "3.5-large": Variant(
            repo="stabilityai/stable-diffusion-3.5-large",
            distilled=False,
            steps=28,
            guidance=3.5,
            timestep_type="sigmoid",
            config={"qk_norm": "rms_norm"},
        ),
        "3.5-large-turbo": Variant(
            repo="stabilityai/stable-diffusion-3.5-large-turbo",
            distilled=True,
            steps=4,
            guidance=1.0,
            timestep_type="sigmoid",
            config={"qk_norm": "rms_norm"},
            modelspec="stable-diffusion-3-5-large-turbo",
        ),
    },
    default_variant="3.5-large",
    latent_channels=16,
    spatial_factor=8,
    bucket_divisibility=32,
    text_tokens=256,
    text_multiple=256,  # every prompt is padded to one length, and the padding is attended to
    shift=3.0,
    lora_blocks=_BLOCKS,
    lora_all=rf"({_BLOCKS}|{_EMBEDDERS})",
    quantize_exclude=rf"^{_EMBEDDERS}$",
    # ComfyUI maps diffusers' names after `transformer.` onto its own (comfy/lora.py, mmdit_to_diffusers). diffusers
    # reads the same names but refuses alpha beside them, so the scale is multiplied in and both take the file.
    # Kohya's way of names is what OneTrainer writes; it is read here.
    lora_keys=LoraKeys(
        comfy_prefix="transformer.",
        diffusers_prefix="transformer.",
        kohya_prefix="lora_transformer_",
        formats=("comfy", "diffusers"),
        alpha_in=("kohya",),
    ),
    modelspec="stable-diffusion-3-5-large",
    licence="Stability AI Community License",
    components=(
        "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3",
        "tokenizer", "tokenizer_2", "tokenizer_3", "scheduler",
    ),
    optional=("text_encoder_3", "tokenizer_3"),
    diffusers_loader="SD3LoraLoaderMixin",
    bundled=("vae", "text_encoder", "text_encoder_2", "text_encoder_3"),
)  # fmt: skip

_CLIP_TOKENS = 77


class StableDiffusion3:
    """Behaviour of the models of both generations, which differ in structure as their configs say."""

    spec = SPEC

    def build_denoiser(self, source: ModelSource) -> SD3Transformer2DModel:
        """The transformer on the meta device, as its config says, or, for a single file, as the shapes in it say."""
        from diffusers import SD3Transformer2DModel

        if (file := source.single_file) is not None:
            config = sd3_parts.config_of(file, SPEC.title)
            return parts.on_meta(lambda: SD3Transformer2DModel.from_config(config))
        return parts.diffusers_module("SD3Transformer2DModel", source.component("transformer"))

    def denoiser_tensors(self, source: ModelSource) -> Iterator[tuple[str, Tensor]]:
        """The transformer's weights under diffusers' names, from either layout."""
        if (file := source.single_file) is not None:
            return sd3_parts.tensors(file)
        return parts.folder_tensors(source.component("transformer"))

    def load_text_encoders(self, source: ModelSource, placement: Placement) -> TextModels:
        """CLIP-L, CLIP-G and, unless the model is made without it, T5, streamed in like the denoiser."""
        clip, t5 = "CLIPTextModelWithProjection", "T5EncoderModel"
        classes = {"text_encoder": clip, "text_encoder_2": clip, "text_encoder_3": t5}
        if source.lacks("text_encoder_3"):
            del classes["text_encoder_3"]
        models = {name: sd3_parts.load_text_model(source, name, cls, placement) for name, cls in classes.items()}
        names = [name.replace("text_encoder", "tokenizer") for name in classes]
        return parts.TextModels(models, {name: parts.load_tokenizer(source.component(name)) for name in names})

    def load_vae(self, source: ModelSource, dtype: torch.dtype, device: torch.device) -> AutoencoderKL:
        """The VAE, frozen and in eval mode: from the single file if it is in there."""
        return ldm.load_vae(source, dtype, device)

    def load_scheduler(
        self, source: ModelSource, changes: Mapping[str, object] | None = None
    ) -> FlowMatchEulerDiscreteScheduler:
        """The model's own scheduler; the published one's shift where the model comes without one."""
        defaults = {"num_train_timesteps": 1000, "shift": SPEC.shift}
        return parts.load_scheduler(source, "FlowMatchEulerDiscreteScheduler", defaults, changes)

    def set_timesteps(
        self, scheduler: FlowMatchEulerDiscreteScheduler, steps: int, latent_HW: tuple[int, int], device: torch.device
    ) -> None:
        """The scheduler's own grid. `mu` matters only to one with dynamic shifting, unlike the published ones."""
        mu = parts.mu_of(scheduler, tokens=(latent_HW[0] // 2) * (latent_HW[1] // 2))
        scheduler.set_timesteps(steps, device=device, mu=mu)
        scheduler.set_begin_index(0)

    def encode_prompts(self, text: TextModels, prompts: Sequence[str]) -> list[Condition]:
        """For each prompt `pooled_D` and `clip_LD` of both CLIPs, and `t5_LD` where there is a T5.

        L is 77 for CLIP and 256 for T5: all are padded to one length, without a mask, as in the pipeline.
        """
        import torch

        device = next(text.models["text_encoder"].parameters()).device

        def ids(prompt: str, number: str, length: int) -> Tensor:
            tokenizer = text.tokenizers[f"tokenizer{number}"]
            asked = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
            ids_BL: Tensor = tokenizer([prompt], **asked).input_ids
            return ids_BL.to(device)

        conditions: list[Condition] = []
        for prompt in prompts:
            with torch.no_grad():
                first, second = (
                    text.models[f"text_encoder{number}"](ids(prompt, number, _CLIP_TOKENS), output_hidden_states=True)
                    for number in ("", "_2")
                )
                condition = {
                    "pooled_D": torch.cat([first[0][0], second[0][0]]),
                    "clip_LD": torch.cat([first.hidden_states[-2][0], second.hidden_states[-2][0]], dim=-1),
                }
                if "text_encoder_3" in text.models:
                    condition["t5_LD"] = text.models["text_encoder_3"](ids(prompt, "_3", SPEC.text_tokens))[0][0]
            conditions.append(condition)
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
        self, denoiser: SD3Transformer2DModel, latents_BCHW: Tensor, t_B: Tensor, conditions: Sequence[Condition]
    ) -> Tensor:
        """v = eps - z_0 at (z_t, t), float32."""
        import torch

        if len(conditions) != len(latents_BCHW):
            raise ValueError(f"{len(latents_BCHW)} pictures, {len(conditions)} conditions")
        config = denoiser.config
        parts.check_sides(SPEC, latents_BCHW, 2 * config.pos_embed_max_size)
        state_BCHW = latents_BCHW.to(denoiser.dtype)
        text_BLD = torch.stack([_text(condition, config.joint_attention_dim) for condition in conditions])
        velocity_BCHW: Tensor = denoiser(
            hidden_states=state_BCHW,
            timestep=(t_B * 1000).float().to(state_BCHW.device),
            encoder_hidden_states=text_BLD.to(state_BCHW),
            pooled_projections=ldm.together(conditions, "pooled_D", state_BCHW).to(state_BCHW.dtype),
            return_dict=False,
        )[0]
        return velocity_BCHW.float()

    def guided(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance as the pipeline computes it: 1 leaves `positive` as it is."""
        return parts.classifier_free(positive, negative, scale)


def _text(condition: Condition, width: int) -> Tensor:
    """tokens_LD of both CLIPs, made as wide as T5's, and of T5: zeros where the model is made without."""
    import torch
    from torch.nn import functional as F

    clip_LD = condition["clip_LD"]
    t5_LD = condition["t5_LD"] if "t5_LD" in condition else clip_LD.new_zeros(SPEC.text_tokens, width)
    return torch.cat([F.pad(clip_LD, (0, width - clip_LD.shape[-1])), t5_LD])


ARCHS: dict[ModelArch, Arch] = {"sd3": StableDiffusion3()}
