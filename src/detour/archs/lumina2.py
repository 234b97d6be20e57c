"""Lumina Image 2.0: a single-stream transformer over caption and image tokens, Gemma 2 as text encoder, FLUX's VAE.

Its conventions differ from this project's and are converted in `predict` and nowhere else: it runs time backwards
(0 noise, 1 clean) and returns z_0 - eps instead of eps - z_0.
A prompt stands behind a system prompt; a negative prompt stands alone, as in the pipeline, and so does the empty
caption of caption dropout, which is what the model was taught to be the absence of a prompt.

Shapes: B batch, C channels, H W latent height and width (of pictures: pixels), L tokens, D features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from detour.archs import parts
from detour.archs.base import ArchSpec, Variant
from detour.nn.lora_keys import LoraKeys, WholeBlocks
from detour.nn.original import Layout, in_blocks

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    import torch
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, Lumina2Transformer2DModel
    from torch import Tensor

    from detour.archs.base import Arch, Condition, Framing
    from detour.archs.parts import TextModels
    from detour.config.job import ModelArch
    from detour.weights import ModelSource, Placement

SYSTEM_PROMPT = (
    "You are an assistant designed to generate superior images with the superior degree of image-text alignment based "
    "on textual prompts or user prompts. <Prompt Start> "
)
_LINEARS = r"(attn\.to_(q|k|v|out\.0)|feed_forward\.linear_[123]|norm1\.linear)"
_BLOCKS = rf"(layers|noise_refiner|context_refiner)\.\d+\.{_LINEARS}"
_EMBEDDERS = (
    r"(x_embedder|time_caption_embed\.(timestep_embedder\.linear_[12]|caption_embedder\.1)|norm_out\.linear_[12])"
)

_BLOCK = {
    "attention.qkv": "attn.to_q:3 attn.to_k attn.to_v /3",  # 24 heads share 8 of keys and values
    "attention.out": "attn.to_out.0",
    "attention.q_norm": "attn.norm_q",
    "attention.k_norm": "attn.norm_k",
    "attention_norm2": "norm2",
    "feed_forward.w1": "feed_forward.linear_1",
    "feed_forward.w2": "feed_forward.linear_2",
    "feed_forward.w3": "feed_forward.linear_3",
}
_MODULATED = _BLOCK | {"adaLN_modulation.1": "norm1.linear", "attention_norm1": "norm1.norm"}
_ORIGINAL = Layout(
    {
        "cap_embedder.0": "time_caption_embed.caption_embedder.0",
        "cap_embedder.1": "time_caption_embed.caption_embedder.1",
        "t_embedder.mlp.0": "time_caption_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_caption_embed.timestep_embedder.linear_2",
        "final_layer.linear": "norm_out.linear_2",
        "final_layer.adaLN_modulation.1": "norm_out.linear_1",
        "norm_final": "",  # in the published file, and used by nobody
    }
    | in_blocks("layers.{}", "layers.{}", _MODULATED)
    | in_blocks("noise_refiner.{}", "noise_refiner.{}", _MODULATED)
    | in_blocks("context_refiner.{}", "context_refiner.{}", _BLOCK | {"attention_norm1": "norm1"}),
    foreign=("vae.", "first_stage_model.", "text_encoders.", "cond_stage_model."),
)
_LORA = ("attention.qkv", "attention.out", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")

SPEC = ArchSpec(
    name="lumina2",
    title="Lumina 2",
    objective="flow",
    # No distilled weights of it are published. 30 steps are the pipeline's default.
    variants={
        "base": Variant(
            repo="Alpha-VLLM/Lumina-Image-2.0", distilled=False, steps=30, guidance=4.0, timestep_type="sigmoid"
        )
    },
    default_variant="base",
    latent_channels=16,
    spatial_factor=8,
    bucket_divisibility=16,
    text_tokens=256,
    text_multiple=256,  # captions of any lengths share a batch: the model masks what is missing
    shift=6.0,
    lora_blocks=_BLOCKS,
    lora_all=rf"({_BLOCKS}|{_EMBEDDERS})",
    quantize_exclude=rf"^{_EMBEDDERS}$",
    lora_keys=LoraKeys(
        # ComfyUI reads the names of its own weights, which are the original ones, with q, k and v in one layer
        # (model_lora_keys_unet in comfy/lora.py). Its names of Z-Image's parts, which it tries on this model too, cut
        # q, k and v into equal parts, which they are not here. diffusers' loader reads the original names without alpha
        # and of whole blocks (_convert_non_diffusers_lumina2_lora_to_diffusers); kohya's it passes over in silence.
        comfy_prefix="diffusion_model.",
        diffusers_prefix="transformer.",
        kohya_prefix="lora_unet_",
        formats=("comfy", "diffusers"),
        original=_ORIGINAL,
        original_in=("comfy",),
        alpha_in=(),
        whole_blocks=WholeBlocks(
            formats=("comfy",),
            layers={
                "layers": (*_LORA, "adaLN_modulation.1"),
                "noise_refiner": (*_LORA, "adaLN_modulation.1"),
                "context_refiner": _LORA,
            },
            rows={"attn.to_q": 2304, "attn.to_k": 768, "attn.to_v": 768},
        ),
    ),
    modelspec="lumina-2",  # as kohya's programs name it
    licence="Apache-2.0 (its text encoder, Gemma 2 2B: Gemma Terms of Use)",
    diffusers_loader="Lumina2LoraLoaderMixin",
    guidance_batched=False,
    negative_mark="\x00",
)


class Lumina2:
    """Behaviour of Lumina Image 2.0 and of models fine-tuned from it."""

    spec = SPEC

    def build_denoiser(self, source: ModelSource) -> Lumina2Transformer2DModel:
        """The transformer on the meta device, as its config says, or, for a single file, as the shapes in it say."""
        from diffusers import Lumina2Transformer2DModel

        if (file := source.single_file) is not None:
            config = _config_of(file)
            return parts.on_meta(lambda: Lumina2Transformer2DModel.from_config(config))
        return parts.diffusers_module("Lumina2Transformer2DModel", source.component("transformer"))

    def denoiser_tensors(self, source: ModelSource) -> Iterator[tuple[str, Tensor]]:
        """The transformer's weights under diffusers' names, from either layout."""
        from detour.weights import stream_tensors

        if (file := source.single_file) is None:
            yield from parts.folder_tensors(source.component("transformer"))
            return
        for name, tensor in stream_tensors([file]):
            yield from _ORIGINAL.tensors(name, tensor)

    def load_text_encoders(self, source: ModelSource, placement: Placement) -> TextModels:
        """Gemma 2 without its language head, streamed in like the denoiser, and its tokenizer.

        The same from a folder saved as `Gemma2Model` and from one saved as `Gemma2ForCausalLM`.
        """
        from transformers import AutoTokenizer

        def rename(key: str) -> str | None:
            return None if key.startswith("lm_head.") else key.removeprefix("model.")

        model = parts.load_text_model("Gemma2Model", source.component("text_encoder"), placement, rename)
        tokenizer = AutoTokenizer.from_pretrained(source.component("tokenizer"))
        tokenizer.padding_side = "right"  # as the pipeline sets it; Gemma's own is left
        return parts.TextModels({"text_encoder": model}, {"tokenizer": tokenizer})

    def load_vae(self, source: ModelSource, dtype: torch.dtype, device: torch.device) -> AutoencoderKL:
        """The VAE, frozen and in eval mode."""
        return parts.load_vae("AutoencoderKL", source, dtype, device)

    def load_scheduler(
        self, source: ModelSource, changes: Mapping[str, object] | None = None
    ) -> FlowMatchEulerDiscreteScheduler:
        """The model's own scheduler; the published one's values (shift 6, static) where it comes without one."""
        defaults = {"num_train_timesteps": 1000, "shift": SPEC.shift}
        return parts.load_scheduler(source, "FlowMatchEulerDiscreteScheduler", defaults, changes)

    def set_timesteps(
        self, scheduler: FlowMatchEulerDiscreteScheduler, steps: int, latent_HW: tuple[int, int], device: torch.device
    ) -> None:
        """The pipeline's grid: evenly spaced from 1 to 1 / steps before the shift; the last step goes to 0.

        `mu` matters only to a scheduler with dynamic shifting, which the published one is not. The pipeline computes it
        from the number of channels where it means that of tokens, so that it is the same for every size.
        """
        import numpy as np

        mu = parts.mu_of(scheduler, tokens=SPEC.latent_channels)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps).tolist(), mu=mu, device=device)
        scheduler.set_begin_index(0)

    def encode_prompts(self, text: TextModels, prompts: Sequence[str]) -> list[Condition]:
        """`tokens_LD` for each prompt: Gemma's last hidden state but one, L its true length (at most 256).

        One prompt at a time and padded to 256 as in the pipeline, for the same bits. What Gemma makes of the padding is
        left out of the cache: the transformer masks it.
        """
        import torch

        model, tokenizer = text.models["text_encoder"], text.tokenizers["tokenizer"]
        device = next(model.parameters()).device
        conditions: list[Condition] = []
        for prompt in prompts:
            alone = prompt == "" or prompt.startswith(SPEC.negative_mark)
            inputs = tokenizer(
                [prompt.removeprefix(SPEC.negative_mark) if alone else SYSTEM_PROMPT + prompt],
                padding="max_length",
                max_length=SPEC.text_tokens,
                truncation=True,
                return_tensors="pt",
            )
            mask_BL = inputs.attention_mask.to(device)
            with torch.no_grad():
                out = model(inputs.input_ids.to(device), attention_mask=mask_BL, output_hidden_states=True)
            conditions.append({"tokens_LD": out.hidden_states[-2][0][mask_BL[0].bool()]})
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
        self, denoiser: Lumina2Transformer2DModel, latents_BCHW: Tensor, t_B: Tensor, conditions: Sequence[Condition]
    ) -> Tensor:
        """v = eps - z_0 at (z_t, t), float32. Captions of different lengths share a batch through the model's mask."""
        if len(conditions) != len(latents_BCHW):
            raise ValueError(f"{len(latents_BCHW)} pictures, {len(conditions)} conditions")
        latents_BCHW = latents_BCHW.to(denoiser.dtype)
        tokens_BLD, mask_BL = parts.padded(conditions, SPEC.text_tokens, like=latents_BCHW)
        # The scheduler's timestep is float32 and the pipeline computes from it: so do we, to get the same bits.
        timestep_B = (t_B * 1000).float().to(latents_BCHW.device)
        field_BCHW: Tensor = denoiser(
            hidden_states=latents_BCHW,
            timestep=1 - timestep_B / 1000,
            encoder_hidden_states=tokens_BLD,
            encoder_attention_mask=mask_BL.long(),
            return_dict=False,
        )[0]
        return -field_BCHW.float()

    def guided(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance as the pipeline's defaults have it: each row keeps the length it has without."""
        import torch

        if scale == 1:
            return positive
        field = parts.classifier_free(positive, negative, scale)
        lengths: list[Tensor] = [torch.norm(one, dim=-1, keepdim=True) for one in (positive, field)]
        return field * (lengths[0] / lengths[1])


def _config_of(file: Path) -> dict[str, object]:
    import torch

    from detour.weights import tensor_shapes

    stored = tensor_shapes([file])
    shapes: dict[str, torch.Size] = {}
    try:
        for key, shape in stored.items():
            shapes |= {name: t.shape for name, t in _ORIGINAL.tensors(key, torch.empty(shape, device="meta"))}
        width, patch_features = shapes["x_embedder.weight"]
        query, keys = shapes["layers.0.attn.to_q.weight"][0], shapes["layers.0.attn.to_k.weight"][0]
        head = shapes["layers.0.attn.norm_q.weight"][0]
        feed_forward = shapes["layers.0.feed_forward.linear_1.weight"][0]
        text = shapes["time_caption_embed.caption_embedder.1.weight"][1]
        refiners = {name.split(".")[1] for name in shapes if name.startswith("noise_refiner.")}
        layers = {name.split(".")[1] for name in shapes if name.startswith("layers.")}
    except (KeyError, ValueError) as error:
        raise parts.not_a_checkpoint(file, stored, SPEC.title) from error
    if query != width or 3 * keys != query:  # Z-Image has almost the same names
        raise parts.not_a_checkpoint(file, stored, SPEC.title)
    return {
        "in_channels": patch_features // 4,  # patches of 2 x 2
        "hidden_size": width,
        "num_layers": len(layers),
        "num_refiner_layers": len(refiners),
        "num_attention_heads": query // head,
        "num_kv_heads": keys // head,
        "multiple_of": feed_forward,
        "axes_dim_rope": [head // 3] * 3,
        "axes_lens": [300, 512, 512],
        "cap_feat_dim": text,
    }


ARCHS: dict[ModelArch, Arch] = {"lumina2": Lumina2()}
