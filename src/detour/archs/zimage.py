"""Z-Image: a single-stream transformer over image and caption tokens, Qwen3 as text encoder, a 16-channel VAE.

Its conventions differ from this project's and are converted in `predict` and nowhere else: it runs time backwards
(0 noise, 1 clean), returns z_0 - eps instead of eps - z_0, and takes lists of single pictures with a frame axis.
Its pipeline in diffusers counts guidance from 0 and is off there; here 1 is off (`ArchSpec.diffusers_guidance`).

Shapes: B batch, C channels, H W latent height and width (of pictures: pixels), L tokens, D features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from detour.archs import parts
from detour.archs.base import ArchSpec, Variant
from detour.nn.lora_keys import LoraKeys
from detour.nn.original import Layout, in_blocks

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    import torch
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
    from torch import Tensor

    from detour.archs.base import Arch, Condition, Framing
    from detour.archs.parts import TextModels
    from detour.config.job import ModelArch
    from detour.weights import ModelSource, Placement

_TURBO, _BASE, _DETURBO = "Tongyi-MAI/Z-Image-Turbo", "Tongyi-MAI/Z-Image", "ostris/Z-Image-De-Turbo"
_LINEARS = r"(attention\.to_(q|k|v|out\.0)|feed_forward\.w[123]|adaLN_modulation\.0)"
_FINAL = r"all_final_layer\.2-1\.(linear|adaLN_modulation\.1)"
_EMBEDDERS = rf"(t_embedder\.mlp\.[02]|cap_embedder\.1|all_x_embedder\.2-1|{_FINAL})"

_ATTENTION = {
    "attention.qkv": "attention.to_q attention.to_k attention.to_v /1",
    "attention.out": "attention.to_out.0",
    "attention.q_norm": "attention.norm_q",
    "attention.k_norm": "attention.norm_k",
}
_ORIGINAL = Layout(
    {
        "x_embedder": "all_x_embedder.2-1",
        "final_layer.linear": "all_final_layer.2-1.linear",
        "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
        "norm_final": "",  # in some files, and used by nobody
    }
    | in_blocks("layers.{}", "layers.{}", _ATTENTION)
    | in_blocks("noise_refiner.{}", "noise_refiner.{}", _ATTENTION)
    | in_blocks("context_refiner.{}", "context_refiner.{}", _ATTENTION),
    foreign=("vae.", "first_stage_model.", "text_encoders.", "cond_stage_model."),
)

SPEC = ArchSpec(
    name="zimage",
    title="Z-Image",
    objective="flow",
    variants={
        "turbo": Variant(
            repo=_TURBO,
            distilled=True,
            steps=8,
            guidance=1.0,
            timestep_type="weighted",
            adapter="ostris/zimage_turbo_training_adapter/zimage_turbo_training_adapter_v2.safetensors",
        ),
        "base": Variant(repo="Tongyi-MAI/Z-Image", distilled=False, steps=30, guidance=4.0, timestep_type="weighted"),
        "deturbo": Variant(
            repo=_DETURBO, distilled=False, steps=25, guidance=3.0, timestep_type="weighted", extras_repo=_TURBO
        ),
    },
    default_variant="turbo",
    latent_channels=16,
    spatial_factor=8,
    bucket_divisibility=32,
    text_tokens=512,
    text_multiple=32,  # the transformer pads captions to it with learnt tokens that are attended to
    shift=3.0,
    lora_blocks=rf"layers\.\d+\.{_LINEARS}",
    lora_all=rf"((layers|noise_refiner|context_refiner)\.\d+\.{_LINEARS}|{_EMBEDDERS})",
    quantize_exclude=rf"^{_EMBEDDERS}$",
    lora_keys=LoraKeys(
        comfy_prefix="diffusion_model.",
        diffusers_prefix="transformer.",
        kohya_prefix="lora_unet_",
        original=_ORIGINAL,
    ),
    modelspec="Z-Image",
    licence="Apache-2.0",
    diffusers_loader="ZImageLoraLoaderMixin",
    diffusers_kinds=("lora", "dora", "lokr"),
    diffusers_guidance_offset=1.0,
    picture_tokens="tokens_LD",  # the trained miniature; the published models have no encoder of pictures
)


class ZImage:
    """Behaviour of Z-Image and its variants, which differ in their weights alone."""

    spec = SPEC

    def build_denoiser(self, source: ModelSource) -> ZImageTransformer2DModel:
        """The transformer on the meta device, as its config says, or, for a single file, as the shapes in it say."""
        from diffusers import ZImageTransformer2DModel

        if (file := source.single_file) is not None:
            config = _config_of(file)
            return parts.on_meta(lambda: ZImageTransformer2DModel.from_config(config))
        return parts.diffusers_module("ZImageTransformer2DModel", source.component("transformer"))

    def denoiser_tensors(self, source: ModelSource) -> Iterator[tuple[str, Tensor]]:
        """The transformer's weights under diffusers' names, from either layout."""
        from detour.weights import component_files, stream_tensors

        single = source.single_file
        for name, tensor in stream_tensors([single] if single else component_files(source.component("transformer"))):
            yield from original_keys(name, tensor)

    def load_text_encoders(self, source: ModelSource, placement: Placement) -> TextModels:
        """Qwen3 without its language head, streamed in like the denoiser, and its tokenizer.

        The same from a folder saved as `Qwen3Model` and from one saved as `Qwen3ForCausalLM`.
        """
        from transformers import AutoTokenizer

        def rename(key: str) -> str | None:
            return None if key.startswith("lm_head.") else key.removeprefix("model.")

        model = parts.load_text_model("Qwen3Model", source.component("text_encoder"), placement, rename)
        tokenizer = AutoTokenizer.from_pretrained(source.component("tokenizer"))
        return parts.TextModels({"text_encoder": model}, {"tokenizer": tokenizer})

    def load_vae(self, source: ModelSource, dtype: torch.dtype, device: torch.device) -> AutoencoderKL:
        """The VAE, frozen and in eval mode."""
        return parts.load_vae("AutoencoderKL", source, dtype, device)

    def load_scheduler(
        self, source: ModelSource, changes: Mapping[str, object] | None = None
    ) -> FlowMatchEulerDiscreteScheduler:
        """The model's own scheduler; Z-Image's (shift 3, static) where the model comes without one."""
        defaults = {"num_train_timesteps": 1000, "shift": SPEC.shift}
        return parts.load_scheduler(source, "FlowMatchEulerDiscreteScheduler", defaults, changes)

    def set_timesteps(
        self, scheduler: FlowMatchEulerDiscreteScheduler, steps: int, latent_HW: tuple[int, int], device: torch.device
    ) -> None:
        """The pipeline's grid: evenly spaced from 1 to 1 / steps before the shift; the last step goes to 0.

        `mu` matters only to a scheduler with dynamic shifting, which the published ones do not have.
        """
        mu = parts.mu_of(scheduler, tokens=(latent_HW[0] // 2) * (latent_HW[1] // 2))
        parts.flow_grid(scheduler, steps, mu, device)

    def encode_prompts(self, text: TextModels, prompts: Sequence[str]) -> list[Condition]:
        """`tokens_LD` for each prompt: Qwen's last hidden state but one, L its true length (at most 512).

        One prompt at a time and padded to 512 as in the pipeline: the result does not depend on what else is embedded,
        and equals the pipeline's bit for bit (another padding gives another rounding).
        """
        import torch

        model, tokenizer = text.models["text_encoder"], text.tokenizers["tokenizer"]
        device = next(model.parameters()).device
        conditions: list[Condition] = []
        for prompt in prompts:
            templated = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=True
            )
            inputs = tokenizer(
                [templated], padding="max_length", max_length=SPEC.text_tokens, truncation=True, return_tensors="pt"
            )
            mask_BL = inputs.attention_mask.to(device).bool()
            with torch.no_grad():
                ids_BL = inputs.input_ids.to(device)
                out = model(input_ids=ids_BL, attention_mask=mask_BL, output_hidden_states=True)
            conditions.append({"tokens_LD": out.hidden_states[-2][0][mask_BL[0]]})
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
        self, denoiser: ZImageTransformer2DModel, latents_BCHW: Tensor, t_B: Tensor, conditions: Sequence[Condition]
    ) -> Tensor:
        """v = eps - z_0 at (z_t, t), float32. Captions of one padded length share a batch without a mask."""
        import torch

        if len(conditions) != len(latents_BCHW):
            raise ValueError(f"{len(latents_BCHW)} pictures, {len(conditions)} conditions")
        dtype, device = denoiser.dtype, latents_BCHW.device
        # The scheduler's timestep is float32 and the pipeline computes from it: so do we, to get the same bits.
        timestep_B = (t_B * 1000).float().to(device)
        pictures = list(latents_BCHW.to(dtype).unsqueeze(2).unbind(0))
        captions = [condition["tokens_LD"].to(device, dtype) for condition in conditions]
        out = denoiser(pictures, (1000 - timestep_B) / 1000, captions, return_dict=False)[0]
        return -torch.stack([picture.float() for picture in out]).squeeze(2)

    def guided(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance in this project's counting: 1 leaves `positive` as it is."""
        return positive + (scale - 1) * (positive - negative)


def original_keys(key: str, tensor: Tensor) -> Sequence[tuple[str, Tensor]]:
    """What one tensor of the original layout is in diffusers; a name that is diffusers' already stays.

    The fused `qkv` becomes three. Parts of an all-in-one file other than the transformer become nothing.
    """
    return _ORIGINAL.tensors(key, tensor)


def _config_of(file: Path) -> dict[str, object]:
    import torch

    from detour.weights import tensor_shapes

    stored = tensor_shapes([file])
    shapes: dict[str, torch.Size] = {}

    def count(blocks: str) -> int:
        return len({name.split(".")[1] for name in shapes if name.startswith(blocks)})

    try:
        for key, shape in stored.items():
            shapes |= {name: t.shape for name, t in original_keys(key, torch.empty(shape, device="meta"))}
        dim, patch_features = shapes["all_x_embedder.2-1.weight"]
        head = shapes["layers.0.attention.norm_q.weight"][0]
        text = shapes["cap_embedder.1.weight"][1]
        query = shapes["layers.0.attention.to_q.weight"][0]
    except (KeyError, ValueError) as error:
        raise parts.not_a_checkpoint(file, stored, SPEC.title) from error
    if query != dim:  # Lumina 2 has almost the same names, and fewer keys and values than queries
        raise parts.not_a_checkpoint(file, stored, SPEC.title)
    return {
        "dim": dim,
        "in_channels": patch_features // 4,  # patches of 2 x 2
        "n_layers": count("layers."),
        "n_refiner_layers": count("noise_refiner."),
        "n_heads": dim // head,
        "n_kv_heads": dim // head,
        "cap_feat_dim": text,
        "axes_dims": [head // 4, head * 3 // 8, head * 3 // 8],  # 32, 48, 48 of 128
        "axes_lens": [1536, 512, 512],
    }


ARCHS: dict[ModelArch, Arch] = {"zimage": ZImage()}
