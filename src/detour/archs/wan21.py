"""Wan 2.1 text to video: a transformer over patches of a clip, UMT5 as text encoder, a causal video VAE of 16 channels.

A picture is a clip of one frame. The VAE keeps the first frame and then makes one latent position of every four frames,
so clips have 4 k + 1 frames. Prompts are tidied as the pipeline does (ftfy), and the text that the transformer sees is
always 512 tokens long: what the prompt leaves open is zeros.

Shapes: B batch, C channels, F frames (latent, of clips: frames), H W latent height and width (of clips: pixels), L
tokens, D features.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from detour import UserError
from detour.archs import parts
from detour.archs.base import ArchSpec, Variant
from detour.nn.lora_keys import LoraKeys, WholeBlocks
from detour.nn.original import Layout, in_blocks

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    import torch
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from torch import Tensor

    from detour.archs.base import Arch, Condition, Framing, Scheduler
    from detour.archs.parts import TextModels
    from detour.config.job import ModelArch
    from detour.weights import ModelSource, Placement

_SMALL, _LARGE = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan-AI/Wan2.1-T2V-14B-Diffusers"
_ATTENTION = (("self_attn", "attn1"), ("cross_attn", "attn2"))
_LINEARS = r"(attn[12]\.to_(q|k|v|out\.0)|ffn\.net\.(0\.proj|2))"
_EMBEDDERS = r"(condition_embedder\.(time_proj|(time|text)_embedder\.linear_[12])|proj_out)"
_BLOCK = {f"{there}.{part}": f"{here}.to_{part}" for there, here in _ATTENTION for part in "qkv"}
_BLOCK |= {f"{there}.o": f"{here}.to_out.0" for there, here in _ATTENTION}
_BLOCK |= {"ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2"}
_ORIGINAL = Layout(
    in_blocks("blocks.{}", "blocks.{}", _BLOCK)
    | {
        "time_embedding.0": "condition_embedder.time_embedder.linear_1",
        "time_embedding.2": "condition_embedder.time_embedder.linear_2",
        "text_embedding.0": "condition_embedder.text_embedder.linear_1",
        "text_embedding.2": "condition_embedder.text_embedder.linear_2",
        "time_projection.1": "condition_embedder.time_proj",
        "head.head": "proj_out",
    }
)
"""The linear layers' names in Wan's own program, and what they are here."""
_HEAD = 128
"""Width of an attention head in every published Wan: 12 heads in the small model, 40 in the large one."""

SPEC = ArchSpec(
    name="wan21",
    title="Wan 2.1",
    objective="flow",
    variants={
        "1.3b": Variant(repo=_SMALL, distilled=False, steps=50, guidance=5.0, timestep_type="sigmoid"),
        "14b": Variant(repo=_LARGE, distilled=False, steps=50, guidance=5.0, timestep_type="sigmoid"),
        # LightX2V's distillation of steps and guidance, by self-forcing. Euler's steps from even times, at shift 5.
        "14b_4step": Variant(
            repo="lightx2v/Wan2.1-Distill-Models/wan2.1_t2v_14b_lightx2v_4step.safetensors",
            distilled=True,
            steps=4,
            guidance=1.0,
            timestep_type="sigmoid",
            extras_repo=_LARGE,
            scheduler={"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 5.0},
            shift=5.0,
        ),
    },
    default_variant="1.3b",
    latent_channels=16,
    spatial_factor=8,
    bucket_divisibility=16,
    text_tokens=512,
    text_multiple=512,
    shift=3.0,
    lora_blocks=rf"blocks\.\d+\.{_LINEARS}",
    lora_all=rf"(blocks\.\d+\.{_LINEARS}|{_EMBEDDERS})",
    quantize_exclude=rf"^{_EMBEDDERS}$",
    lora_keys=LoraKeys(
        # ComfyUI reads the original names. diffusers reads them too, dotted without alpha outside of the blocks
        # (_convert_non_diffusers_wan_lora_to_diffusers), and kohya's with alpha and of whole blocks alone
        # (_convert_musubi_wan_lora_to_diffusers).
        comfy_prefix="diffusion_model.",
        diffusers_prefix="transformer.",
        kohya_prefix="lora_unet_",
        original=_ORIGINAL,
        original_in=("comfy", "kohya"),
        alpha_in=("kohya",),
        whole_blocks=WholeBlocks(formats=("kohya",), layers={"blocks": tuple(_BLOCK)}),
    ),
    modelspec="wan2.1",
    licence="Apache-2.0",
    diffusers_loader="WanLoraLoaderMixin",
    guidance_batched=False,
    frame_factor=4,
    fps=16.0,
    keep_float32=r"(^|\.)(rope|time_embedder|scale_shift_table|norm[123])(\.|$)",
)

_ORIGINAL_PREFIX = re.compile(r"^(model\.)?diffusion_model\.")


class Wan21:
    """Behaviour of the text-to-video models of Wan 2.1, which differ in size and weights alone."""

    spec = SPEC

    def build_denoiser(self, source: ModelSource) -> WanTransformer3DModel:
        """The transformer on the meta device, as its config says, or, for a single file, as the shapes in it say."""
        from diffusers import WanTransformer3DModel

        if (file := source.single_file) is not None:
            config = _config_of(file)
            return parts.on_meta(lambda: WanTransformer3DModel.from_config(config))
        denoiser = parts.diffusers_module("WanTransformer3DModel", source.component("transformer"))
        _require_channels(denoiser.config.in_channels, source.name)
        return denoiser

    def denoiser_tensors(self, source: ModelSource) -> Iterator[tuple[str, Tensor]]:
        """The transformer's weights under diffusers' names, from either layout."""
        from detour.weights import stream_tensors

        if (file := source.single_file) is None:
            yield from parts.folder_tensors(source.component("transformer"))
            return
        names = _diffusers_names(file)
        for name, tensor in stream_tensors([file]):
            yield names[name], tensor

    def load_text_encoders(self, source: ModelSource, placement: Placement) -> TextModels:
        """UMT5's encoder, streamed in like the denoiser, and its tokenizer."""
        from transformers import AutoTokenizer

        model = parts.load_text_model("UMT5EncoderModel", source.component("text_encoder"), placement)
        tokenizer = AutoTokenizer.from_pretrained(source.component("tokenizer"))
        return parts.TextModels({"text_encoder": model}, {"tokenizer": tokenizer})

    def load_vae(self, source: ModelSource, dtype: torch.dtype, device: torch.device) -> AutoencoderKLWan:
        """The VAE, frozen and in eval mode."""
        return parts.load_vae("AutoencoderKLWan", source, dtype, device)

    def load_scheduler(self, source: ModelSource, changes: Mapping[str, object] | None = None) -> Scheduler:
        """The model's own scheduler, UniPC in the published folders (shift 3, static)."""
        defaults = {
            "num_train_timesteps": 1000,
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "flow_shift": SPEC.shift,
        }
        return parts.load_scheduler(source, "UniPCMultistepScheduler", defaults, changes)

    def set_timesteps(self, scheduler: Scheduler, steps: int, latent_HW: tuple[int, int], device: torch.device) -> None:
        """The pipeline's grid; for the distilled variants' Euler steps, times that are even before the shift."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            parts.flow_grid(scheduler, steps, None, device)
        else:
            scheduler.set_timesteps(steps, device=device)
            scheduler.set_begin_index(0)

    def encode_prompts(self, text: TextModels, prompts: Sequence[str]) -> list[Condition]:
        """`tokens_LD` for each prompt: UMT5's output, L its true length (at most 512).

        One prompt at a time and padded to 512 as in the pipeline, which then puts zeros where the padding was: so does
        `predict`, so that the cache need not hold them (4 MB a caption in bf16).
        """
        import torch
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean

        model, tokenizer = text.models["text_encoder"], text.tokenizers["tokenizer"]
        device = next(model.parameters()).device
        conditions: list[Condition] = []
        for prompt in prompts:
            inputs = tokenizer(
                [prompt_clean(prompt)],
                padding="max_length",
                max_length=SPEC.text_tokens,
                truncation=True,
                return_tensors="pt",
            )
            mask_BL = inputs.attention_mask.to(device)
            with torch.no_grad():
                states_BLD = model(inputs.input_ids.to(device), mask_BL).last_hidden_state
            conditions.append({"tokens_LD": states_BLD[0, : int(mask_BL.sum())].clone()})
        return conditions

    def picture_condition(self, framing: Framing, guidance: float | None) -> Condition:
        """Nothing: the caption is all that it is told."""
        return {}

    def encode_images(self, vae: AutoencoderKLWan, pixels_B3HW: Tensor) -> Tensor:
        """Clips (B, 3, F, H, W) in [-1, 1] to normalised latents (the mean of the posterior), float32."""
        import torch

        with torch.no_grad():
            latents_BCFHW: Tensor = vae.encode(pixels_B3HW.to(vae.device, vae.dtype)).latent_dist.mode().float()
        mean, scale = (statistic.to(latents_BCFHW) for statistic in _statistics(vae))
        return (latents_BCFHW - mean) * scale

    def decode(self, vae: AutoencoderKLWan, latents_BCHW: Tensor) -> Tensor:
        """Normalised latents to clips (B, 3, F, H, W) in [-1, 1], float32. The arithmetic is the pipeline's."""
        import torch

        latents_BCFHW = latents_BCHW.to(vae.device, vae.dtype)
        mean, scale = (statistic.to(latents_BCFHW) for statistic in _statistics(vae))
        with torch.no_grad():
            pixels_B3FHW: Tensor = vae.decode(latents_BCFHW / scale + mean, return_dict=False)[0]
        return pixels_B3FHW.float()

    def predict(
        self, denoiser: WanTransformer3DModel, latents_BCHW: Tensor, t_B: Tensor, conditions: Sequence[Condition]
    ) -> Tensor:
        """v = eps - z_0 at (z_t, t), float32."""
        import torch

        dtype, device = denoiser.dtype, latents_BCHW.device
        tokens = [condition["tokens_LD"] for condition in conditions]
        text_BLD = torch.zeros(len(tokens), SPEC.text_tokens, tokens[0].shape[1], dtype=dtype, device=device)
        for padded_LD, tokens_LD in zip(text_BLD, tokens, strict=True):
            padded_LD[: len(tokens_LD)] = tokens_LD
        out = denoiser(
            hidden_states=latents_BCHW.to(dtype),
            timestep=(t_B * 1000).float().to(device),
            encoder_hidden_states=text_BLD,
            return_dict=False,
        )
        velocity_BCFHW: Tensor = out[0].float()
        return velocity_BCFHW

    def guided(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance as the pipeline computes it: 1 leaves `positive` as it is."""
        return parts.classifier_free(positive, negative, scale)


def _statistics(vae: AutoencoderKLWan) -> tuple[Tensor, Tensor]:
    """Mean of each latent channel and one over its deviation, (1, C, 1, 1, 1)."""
    import torch

    published = (vae.config.latents_mean, vae.config.latents_std)
    mean, deviation = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in published)
    return mean, 1.0 / deviation


def _diffusers_names(file: Path) -> dict[str, str]:
    """What each tensor of a single file is called in diffusers."""
    import torch
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    from detour.weights import tensor_shapes

    plain = {name: _ORIGINAL_PREFIX.sub("", name) for name in tensor_shapes([file])}
    if not any(".self_attn." in name for name in plain.values()):
        return plain  # diffusers' own layout already
    empty = torch.empty(0)  # the converter does nothing but rename, one by one
    return {name: next(iter(convert_wan_transformer_to_diffusers({own: empty}))) for name, own in plain.items()}


def _config_of(file: Path) -> dict[str, object]:
    from detour.weights import tensor_shapes

    names = _diffusers_names(file)
    shapes = {names[name]: shape for name, shape in tensor_shapes([file]).items()}
    try:
        dim, channels, *patch = shapes["patch_embedding.weight"]
        feed_forward = shapes["blocks.0.ffn.net.0.proj.weight"][0]
        text = shapes["condition_embedder.text_embedder.linear_1.weight"][1]
        frequencies = shapes["condition_embedder.time_embedder.linear_1.weight"][1]
    except (KeyError, ValueError) as error:
        raise parts.not_a_checkpoint(file, shapes, SPEC.title) from error
    _require_channels(channels, str(file))
    return {
        "patch_size": patch,
        "num_attention_heads": dim // _HEAD,
        "attention_head_dim": _HEAD,
        "in_channels": channels,
        "out_channels": shapes["proj_out.weight"][0] // (patch[0] * patch[1] * patch[2]),
        "text_dim": text,
        "freq_dim": frequencies,
        "ffn_dim": feed_forward,
        "num_layers": len({name.split(".")[1] for name in shapes if name.startswith("blocks.")}),
    }


def _require_channels(channels: int, where: str) -> None:
    if channels != SPEC.latent_channels:
        raise UserError(
            f"{where}: this Wan takes {channels} channels, so it starts from pictures or is of another generation; "
            f"wan21 trains the text-to-video models of Wan 2.1, which take {SPEC.latent_channels} (such as {_SMALL})"
        )


ARCHS: dict[ModelArch, Arch] = {"wan21": Wan21()}
