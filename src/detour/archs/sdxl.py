"""Stable Diffusion XL, and its two smaller kin by Segmind: SSD-1B and Vega, from whose UNet blocks were taken out.

The UNet attends to the last hidden states but one of two text encoders, side by side, and is told the pooled embedding
of the second, the picture's size before it was scaled, where it was cropped, and its size. An empty prompt is embedded
as zeros if the model's `model_index.json` says so (`force_zeros_for_empty_prompt`, true where it says nothing): so were
captions left out in its training, and so does the pipeline where it is given no negative prompt. (Given an empty string
as the *positive* prompt the pipeline embeds it; ComfyUI embeds it as negative prompt too.)

Shapes: B batch, C channels, H W latent height and width (of pictures: pixels), L tokens, D features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from detour import UserError
from detour.archs import ldm, parts
from detour.archs.base import ArchSpec, Variant
from detour.archs.unet_names import ORIGINAL
from detour.nn.lora_keys import CLIP_LAYERS, LoraKeys

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from torch import Tensor

    from detour.archs.base import Arch, Condition, Framing, Scheduler
    from detour.config.job import ModelArch
    from detour.weights import ModelSource, Placement

_BASE = "stabilityai/stable-diffusion-xl-base-1.0"
_ZEROS = "force_zeros_for_empty_prompt"


def _spec(
    name: ModelArch, title: str, modelspec: str, licence: str, variants: dict[str, Variant], default: str
) -> ArchSpec:
    return ArchSpec(
        name=name,
        title=title,
        objective="eps",
        variants=variants,
        default_variant=default,
        latent_channels=4,
        spatial_factor=8,
        bucket_divisibility=64,  # the sizes it was trained at
        text_tokens=77,
        text_multiple=77,  # every prompt is padded to it
        shift=1.0,
        lora_blocks=ldm.LORA_BLOCKS,
        lora_all=ldm.LORA_ALL,
        quantize_exclude=ldm.QUANTIZE_EXCLUDE,
        lora_keys=LoraKeys(
            comfy_prefix="lora_unet_",
            diffusers_prefix="unet.",
            kohya_prefix="lora_unet_",
            original=ORIGINAL,
            original_in=("comfy", "kohya"),
            text={"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"},
            text_layers=CLIP_LAYERS,
        ),
        modelspec=modelspec,
        licence=licence,
        components=("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"),
        denoiser="unet",
        diffusers_loader="StableDiffusionXLLoraLoaderMixin",
        negative_first=True,
        size_unit=8,
        bundled=("vae", "text_encoder", "text_encoder_2"),
        options={_ZEROS: True},
        timestep_types=ldm.TIMESTEP_TYPES,
    )


def _plain(repo: str, steps: int, guidance: float) -> dict[str, Variant]:
    return {
        "base": Variant(repo=repo, distilled=False, steps=steps, guidance=guidance, timestep_type="linear"),
    }


def _distilled(repo: str, steps: int, licence: str, **scheduler: object) -> Variant:
    extras = _BASE if repo.endswith(".safetensors") else None
    return Variant(
        repo=repo,
        distilled=True,
        steps=steps,
        guidance=1.0,
        timestep_type="linear",
        extras_repo=extras,
        scheduler=scheduler,
        licence=licence,
    )


_SDXL = {
    # Drawn in one to four steps, at 512 x 512.
    "turbo": _distilled("stabilityai/sdxl-turbo", 4, "Stability AI Non-Commercial"),
    "lightning": _distilled(
        "ByteDance/SDXL-Lightning/sdxl_lightning_4step_unet.safetensors",
        4,
        "CreativeML Open RAIL++-M",
        timestep_spacing="trailing",
    ),
    # One step, from level 800: the largest multiple of 1000 // 801 below 801. The 2- to 8-step versions are LoRAs.
    "hyper": _distilled(
        "ByteDance/Hyper-SD/Hyper-SDXL-1step-Unet.safetensors",
        1,
        "as SDXL base; none is stated",
        _class_name="LCMScheduler",
        original_inference_steps=801,
    ),
}

SPECS: dict[ModelArch, ArchSpec] = {
    "sdxl": _spec(
        "sdxl",
        "Stable Diffusion XL",
        "stable-diffusion-xl-v1-base",
        "CreativeML Open RAIL++-M",
        _plain(_BASE, 30, 7.0) | _SDXL,
        "base",
    ),
    "vega": _spec(
        "vega", "Segmind Vega", "segmind-vega", "Apache-2.0", _plain("segmind/Segmind-Vega", 25, 9.0), "base"
    ),
    "ssd": _spec("ssd", "Segmind SSD-1B", "segmind-ssd-1b", "Apache-2.0", _plain("segmind/SSD-1B", 25, 9.0), "base"),
}

_PUBLISHED: Mapping[str, object] = {
    "sample_size": 128,
    "attention_head_dim": [5, 10, 20],  # heads, in spite of its name; 64 channels each
    "norm_num_groups": 32,
    "addition_time_embed_dim": 256,
}
_Depths = tuple[list[list[int]], int | None, list[list[int]]]
_DEPTHS: dict[ModelArch, _Depths] = {
    "sdxl": ([[], [2, 2], [10, 10]], 10, [[10, 10, 10], [2, 2, 2], []]),
    "ssd": ([[], [2, 2], [4, 4]], None, [[4, 4, 10], [2, 1, 1], []]),
    "vega": ([[], [1, 1], [2, 2]], None, [[2, 2, 2], [1, 1, 1], []]),
}
"""Transformer blocks of each attention: down, middle (None: a single residual block without attention), up."""


class Texts(parts.TextModels):
    """Both encoders with their tokenizers, and whether an empty prompt is embedded as zeros."""

    empty_is_zero = True


class StableDiffusionXL:
    """Behaviour of Stable Diffusion XL and its kin, which differ in their UNet's blocks alone."""

    def __init__(self, spec: ArchSpec) -> None:
        self.spec = spec

    def build_denoiser(self, source: ModelSource) -> UNet2DConditionModel:
        """The UNet on the meta device, as its config says, or, for a single file, as the shapes in it say."""
        unet = ldm.build_unet(source, self.spec.title, _PUBLISHED)
        self._check(unet.config, source)
        return unet

    def _check(self, config: Mapping[str, Any], source: ModelSource) -> None:
        """Refuse the UNet of another architecture, saying of which."""
        if config["addition_embed_type"] != "text_time":
            raise UserError(
                f"{source.name}: its UNet is not told the picture's size, so it is that of a Stable Diffusion 1 or 2, "
                f"not of {self.spec.title}; set model.arch: sd1 or sd2"
            )
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        if pooled != (width := _pooled_width(source, pooled)):
            raise UserError(
                f"{source.name}: its UNet is told {pooled} numbers besides six for sizes, where the second text "
                f"encoder gives {width}: that is not {self.spec.title}, but perhaps SDXL's refiner, which cannot be "
                f"trained here"
            )
        for name, depths in _DEPTHS.items():
            if depths == _depths(config) and name != self.spec.name:
                looks = f"this is the UNet of {SPECS[name].title}, not of {self.spec.title}"
                raise UserError(f"{source.name}: {looks}; set model.arch: {name}")

    def denoiser_tensors(self, source: ModelSource) -> Iterator[tuple[str, Tensor]]:
        """The UNet's weights under diffusers' names, from either layout."""
        return ldm.unet_tensors(source, self.spec.title)

    def load_text_encoders(self, source: ModelSource, placement: Placement) -> Texts:
        """CLIP-L and OpenCLIP-bigG (768 and 1280 features), from the single file if they are in there."""
        from transformers import CLIPTokenizer

        found = (
            ("text_encoder", "CLIPTextModel", "conditioner.embedders.0.transformer."),
            ("text_encoder_2", "CLIPTextModelWithProjection", "conditioner.embedders.1.model."),
        )
        models = {part: ldm.load_clip(source, part, cls, prefix, placement) for part, cls, prefix in found}
        names = ("tokenizer", "tokenizer_2")
        texts = Texts(models, {name: CLIPTokenizer.from_pretrained(source.component(name)) for name in names})
        texts.empty_is_zero = bool(source.options(self.spec.options)[_ZEROS])
        return texts

    def load_vae(self, source: ModelSource, dtype: torch.dtype, device: torch.device) -> AutoencoderKL:
        """The VAE, frozen and in eval mode: in float32 whatever `dtype` says, unless its config says it need not."""
        vae = ldm.load_vae(source, dtype, device, upcast=True)
        if vae.config.latents_mean is not None:
            raise UserError(
                f"{source.name}: its VAE shifts latents by a mean of their own, as that of Playground 2.5, which is "
                f"not built; a model with SDXL's VAE can be trained"
            )
        return vae

    def load_scheduler(self, source: ModelSource, changes: Mapping[str, object] | None = None) -> Scheduler:
        """The model's own scheduler; Euler steps on SDXL's noise levels where the model comes without one."""
        return parts.load_scheduler(source, "EulerDiscreteScheduler", ldm.SCHEDULER, changes)

    def set_timesteps(self, scheduler: Scheduler, steps: int, latent_HW: tuple[int, int], device: torch.device) -> None:
        """The scheduler's own grid, whatever the size."""
        scheduler.set_timesteps(steps, device=device)

    def encode_prompts(self, text: Texts, prompts: Sequence[str]) -> list[Condition]:
        """`tokens_LD` and `pooled_D` for each prompt, L = 77; one at a time, so that no other prompt has a part in it.

        Gradients go through where an encoder is trained.
        """
        import torch

        conditions: list[Condition] = []
        for prompt in prompts:
            outs = []
            for which in ("", "_2"):
                model, tokenizer = text.models[f"text_encoder{which}"], text.tokenizers[f"tokenizer{which}"]
                inputs = tokenizer(prompt, padding="max_length", truncation=True, return_tensors="pt")  # to 77
                ids = inputs.input_ids.to(next(model.parameters()).device)
                outs.append(model(ids, output_hidden_states=True))
            tokens_LD = torch.cat([out.hidden_states[-2] for out in outs], dim=-1)[0]
            pooled_D = outs[1].text_embeds[0]
            if not prompt and text.empty_is_zero:
                tokens_LD, pooled_D = torch.zeros_like(tokens_LD), torch.zeros_like(pooled_D)
            conditions.append({"tokens_LD": tokens_LD, "pooled_D": pooled_D})
        return conditions

    def picture_condition(self, framing: Framing, guidance: float | None) -> Condition:
        """`sizes_6`: height and width before scaling, top and left of the crop, height and width."""
        import torch

        pairs = (framing.original, framing.crop, framing.size)
        return {"sizes_6": torch.tensor([float(number) for pair in pairs for number in reversed(pair)])}

    def encode_images(self, vae: AutoencoderKL, pixels_B3HW: Tensor) -> Tensor:
        """Pixels in [-1, 1] to normalised latents (the mean of the posterior), float32."""
        return parts.encode_images(vae, pixels_B3HW)

    def decode(self, vae: AutoencoderKL, latents_BCHW: Tensor) -> Tensor:
        """Normalised latents to pixels in [-1, 1], float32."""
        return parts.decode(vae, latents_BCHW)

    def predict(
        self, denoiser: UNet2DConditionModel, latents_BCHW: Tensor, t_B: Tensor, conditions: Sequence[Condition]
    ) -> Tensor:
        """eps (or v, if the weights are such) at noise level 1000 t, float32."""
        added = {
            "text_embeds": ldm.together(conditions, "pooled_D", latents_BCHW).to(denoiser.dtype),
            "time_ids": ldm.together(conditions, "sizes_6", latents_BCHW),
        }
        return ldm.predict(denoiser, latents_BCHW, t_B, conditions, added)

    def guided(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance."""
        return parts.classifier_free(positive, negative, scale)


def _depths(config: Mapping[str, Any]) -> _Depths:
    """As in `_DEPTHS`, of a UNet's config."""
    layers, per_block = config["layers_per_block"], config["transformer_layers_per_block"]
    down = [per_block] * len(config["down_block_types"]) if isinstance(per_block, int) else list(per_block)
    up = config["reverse_transformer_layers_per_block"] or down[::-1]

    def each(blocks: Sequence[Any], types: Sequence[str], count: int) -> list[list[int]]:
        spread = [[depth] * count if isinstance(depth, int) else list(depth) for depth in blocks]
        return [depths if kind.startswith("CrossAttn") else [] for depths, kind in zip(spread, types, strict=True)]

    middle = down[-1] if config["mid_block_type"] == "UNetMidBlock2DCrossAttn" else None
    return each(down, config["down_block_types"], layers), middle, each(up, config["up_block_types"], layers + 1)


def _pooled_width(source: ModelSource, otherwise: int) -> int:
    """Features that the second text encoder gives for a whole prompt, where it is at hand."""
    from detour.weights import component_config

    folder = source.find("text_encoder_2")
    if folder is None:
        return otherwise
    return cast("int", component_config(folder, "model_type", "clip_text_model").get("projection_dim", 512))


ARCHS: dict[ModelArch, Arch] = {name: StableDiffusionXL(spec) for name, spec in SPECS.items()}
