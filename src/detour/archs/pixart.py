"""PixArt-alpha and PixArt-Sigma: a small diffusion transformer with cross-attention to T5, and a 4-channel VAE.

It predicts noise and, in as many channels again, a variance that no sampler of today asks for and that is dropped. The
alpha model for 1024 pixels is also told how large the picture is and how wide it is for its height.

Prompts go to T5 as the pipeline sends them with `clean_caption=False`: in lower case, without space around them. (Its
default also takes HTML and the like out of captions where the packages beautifulsoup4 and ftfy are installed.) They are
cached at their true length; what `predict` pads them with is behind a mask, so that captions of any length share a
batch and the result is the pipeline's bit for bit.

Shapes: B batch, C channels, H W latent height and width (of pictures: pixels), L tokens, D features.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from detour import UserError
from detour.archs import ldm, parts
from detour.archs.base import ArchSpec, Variant
from detour.nn.lora_keys import LoraKeys

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import torch
    from diffusers import AutoencoderKL, PixArtTransformer2DModel
    from torch import Tensor

    from detour.archs.base import Arch, Condition, Framing, Scheduler
    from detour.archs.parts import TextModels
    from detour.config.job import ModelArch, TimestepType
    from detour.weights import ModelSource, Placement

_SIGMA = "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS"
_PLAIN = Variant(
    repo=_SIGMA,
    distilled=False,
    steps=20,
    guidance=4.5,
    timestep_type="linear",
    config={"sample_size": 128},  # latent positions along a side at which it was trained
)
_BLOCKS = r"transformer_blocks\.\d+\.(attn[12]\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2))"
_EMBEDDERS = (
    r"(adaln_single\.(linear|emb\.(timestep|resolution|aspect_ratio)_embedder\.linear_[12])"
    r"|caption_projection\.linear_[12]|proj_out)"
)
_TIMESTEP_TYPES: tuple[TimestepType, ...] = (
    "linear", "sigmoid", "lognorm_blend", "one_step", "two_step", "four_step", "eight_step",
)  # fmt: skip
# ComfyUI reads diffusers' names after `transformer.` with alpha keys beside them (comfy/lora.py, pixart_to_diffusers).
# diffusers has no loader for PixArt; its users load a LoRA with PEFT's `PeftModel`, whose names begin as below. Kohya's
# way of names is what ai-toolkit and OneTrainer write for it, and only they read.
_KEYS = LoraKeys(
    comfy_prefix="transformer.",
    diffusers_prefix="base_model.model.",
    kohya_prefix="lora_transformer_",
    formats=("comfy", "diffusers"),
)

ALPHA = ArchSpec(
    name="pixart",
    title="PixArt-alpha",
    objective="eps",
    variants={
        "1024": replace(_PLAIN, repo="PixArt-alpha/PixArt-XL-2-1024-MS"),
        "512": replace(_PLAIN, repo="PixArt-alpha/PixArt-XL-2-512x512", config={"sample_size": 64}),
        # Latent consistency distillation of the 1024 model.
        "lcm": replace(
            _PLAIN,
            repo="PixArt-alpha/PixArt-LCM-XL-2-1024-MS",
            distilled=True,
            steps=4,
            guidance=1.0,
            scheduler={"_class_name": "LCMScheduler"},
        ),
    },
    default_variant="1024",
    latent_channels=4,
    spatial_factor=8,
    bucket_divisibility=32,
    text_tokens=120,
    text_multiple=120,  # every prompt is padded to one length, behind a mask
    shift=1.0,
    lora_blocks=_BLOCKS,
    lora_all=rf"({_BLOCKS}|{_EMBEDDERS})",
    quantize_exclude=rf"^{_EMBEDDERS}$",
    lora_keys=_KEYS,
    modelspec="pixart-alpha",
    licence="CreativeML Open RAIL++-M",
    timestep_types=_TIMESTEP_TYPES,
)

SIGMA = replace(
    ALPHA,
    name="pixart_sigma",
    title="PixArt-Sigma",
    variants={
        "1024": replace(_PLAIN, repo=_SIGMA),
        # Of these two the transformer is taken; the rest is the 1024 model's.
        "512": replace(
            _PLAIN,
            repo="PixArt-alpha/PixArt-Sigma-XL-2-512-MS",
            extras_repo=_SIGMA,
            config={"sample_size": 64},
        ),
        "2k": replace(
            _PLAIN,
            repo="PixArt-alpha/PixArt-Sigma-XL-2-2K-MS",
            extras_repo=_SIGMA,
            config={"sample_size": 256},
        ),
    },
    default_variant="1024",
    text_tokens=300,
    text_multiple=300,
    modelspec="pixart-sigma",
)

_CLASS, _FORMER_CLASS = "PixArtTransformer2DModel", "Transformer2DModel"
"""Folders saved before diffusers 0.28, the published ones among them, name the class that PixArt shared then."""


class PixArt:
    """Behaviour of both generations, which differ in what they are told, in their VAE, and in the length of prompts."""

    def __init__(self, spec: ArchSpec, told_size: bool) -> None:
        """`told_size`: the model for 1024 pixels (`sample_size` 128) is told the picture's size."""
        self.spec, self._told_size = spec, told_size

    def build_denoiser(self, source: ModelSource) -> PixArtTransformer2DModel:
        """The transformer on the meta device, as its config says."""
        from diffusers import PixArtTransformer2DModel

        from detour.weights import component_config

        if source.single_file is not None:
            raise parts.only_as_folder(source, self.spec.title)
        folder = source.component("transformer")
        config = component_config(folder, "_class_name", _CLASS, _FORMER_CLASS)
        if config.get("norm_type", "ada_norm_single") != "ada_norm_single":
            raise UserError(f"{folder}: this transformer has norms of another model than PixArt; is model.arch right?")
        denoiser = parts.on_meta(lambda: PixArtTransformer2DModel.from_config(config))
        self._check_generation(source, denoiser)
        return denoiser

    def _check_generation(self, source: ModelSource, denoiser: PixArtTransformer2DModel) -> None:
        """Both have the same layers, and either would train as the other, to no good."""
        said = _GENERATIONS.get(source.index().get("_class_name", ""))
        if said is None and denoiser.config.sample_size == 128:
            said = ALPHA if denoiser.use_additional_conditions else SIGMA
        if said is not None and said.name != self.spec.name:
            raise UserError(f"{source.name}: this is {said.title}, not {self.spec.title}; set model.arch: {said.name}")

    def denoiser_tensors(self, source: ModelSource) -> Iterator[tuple[str, Tensor]]:
        """The transformer's weights."""
        return parts.folder_tensors(source.component("transformer"))

    def load_text_encoders(self, source: ModelSource, placement: Placement) -> TextModels:
        """T5-XXL's encoder, streamed in like the denoiser, and its tokenizer."""
        model = parts.load_text_model("T5EncoderModel", source.component("text_encoder"), placement)
        tokenizer = parts.load_tokenizer(source.component("tokenizer"))
        return parts.TextModels({"text_encoder": model}, {"tokenizer": tokenizer})

    def load_vae(self, source: ModelSource, dtype: torch.dtype, device: torch.device) -> AutoencoderKL:
        """The VAE (Stable Diffusion's for alpha, that of XL for Sigma), frozen and in eval mode; never in float16, in
        which that of XL overflows."""
        import torch

        return ldm.load_vae(source, dtype, device, upcast=dtype == torch.float16)

    def load_scheduler(self, source: ModelSource, changes: Mapping[str, object] | None = None) -> Scheduler:
        """The model's own scheduler: DPM-Solver++ on noise levels with linear betas, except where it was distilled."""
        defaults = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
        return parts.load_scheduler(source, "DPMSolverMultistepScheduler", defaults, changes)

    def set_timesteps(self, scheduler: Scheduler, steps: int, latent_HW: tuple[int, int], device: torch.device) -> None:
        """The scheduler's own grid, whatever the picture's size."""
        scheduler.set_timesteps(steps, device=device)

    def encode_prompts(self, text: TextModels, prompts: Sequence[str]) -> list[Condition]:
        """`tokens_LD` for each prompt: T5's output, L its true length (at most 120, for Sigma 300).

        One prompt at a time and padded to that most, as in the pipeline.
        """
        import torch

        model, tokenizer = text.models["text_encoder"], text.tokenizers["tokenizer"]
        device = next(model.parameters()).device
        conditions: list[Condition] = []
        for prompt in prompts:
            inputs = tokenizer(
                [prompt.lower().strip()],
                padding="max_length",
                max_length=self.spec.text_tokens,
                truncation=True,
                return_tensors="pt",
            )
            mask_BL = inputs.attention_mask.to(device)
            with torch.no_grad():
                states_BLD = model(inputs.input_ids.to(device), attention_mask=mask_BL)[0]
            conditions.append({"tokens_LD": states_BLD[0][mask_BL[0].bool()]})
        return conditions

    def picture_condition(self, framing: Framing, guidance: float | None) -> Condition:
        """Height and width in pixels as the model sees the picture, and their ratio, which alpha is told.

        Sampling tells the size that is drawn; training, here and in diffusers' script, the size that is trained.
        """
        import torch

        if not self._told_size:
            return {}
        width, height = framing.size
        size_D = torch.tensor([height, width], dtype=torch.float32)
        return {"resolution_D": size_D, "aspect_ratio_D": torch.tensor([height / width], dtype=torch.float32)}

    def encode_images(self, vae: AutoencoderKL, pixels_B3HW: Tensor) -> Tensor:
        """Pixels in [-1, 1] to normalised latents (the mean of the posterior), float32."""
        return parts.encode_images(vae, pixels_B3HW)

    def decode(self, vae: AutoencoderKL, latents_BCHW: Tensor) -> Tensor:
        """Normalised latents to pixels in [-1, 1], float32."""
        return parts.decode(vae, latents_BCHW)

    def predict(
        self, denoiser: PixArtTransformer2DModel, latents_BCHW: Tensor, t_B: Tensor, conditions: Sequence[Condition]
    ) -> Tensor:
        """The noise in z at noise level 1000 t, float32, without the variance that is predicted beside it."""
        if len(conditions) != len(latents_BCHW):
            raise ValueError(f"{len(latents_BCHW)} pictures, {len(conditions)} conditions")
        state_BCHW = latents_BCHW.to(denoiser.dtype)
        tokens_BLD, mask_BL = parts.padded(conditions, self.spec.text_tokens, like=state_BCHW)
        out_BCHW = denoiser(
            state_BCHW,
            encoder_hidden_states=tokens_BLD,
            encoder_attention_mask=mask_BL,
            timestep=parts.levels(t_B).to(state_BCHW.device),
            added_cond_kwargs=_told(denoiser, conditions, like=state_BCHW),
            return_dict=False,
        )[0]
        noise_BCHW: Tensor = out_BCHW[:, : latents_BCHW.shape[1]].float()
        return noise_BCHW

    def guided(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance as the pipeline computes it: 1 leaves `positive` as it is."""
        return parts.classifier_free(positive, negative, scale)


def _told(
    denoiser: PixArtTransformer2DModel, conditions: Sequence[Condition], like: Tensor
) -> dict[str, Tensor | None]:
    """What the weights at hand want to know of the pictures' sizes."""
    import torch

    if not denoiser.use_additional_conditions:
        return {"resolution": None, "aspect_ratio": None}
    return {
        name: torch.stack([condition[f"{name}_D"] for condition in conditions]).to(like)
        for name in ("resolution", "aspect_ratio")
    }


_GENERATIONS = {"PixArtAlphaPipeline": ALPHA, "PixArtSigmaPipeline": SIGMA}
ARCHS: dict[ModelArch, Arch] = {"pixart": PixArt(ALPHA, told_size=True), "pixart_sigma": PixArt(SIGMA, told_size=False)}
