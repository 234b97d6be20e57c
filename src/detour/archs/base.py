"""What the engine asks of an architecture: `ArchSpec` is data, `Arch` is behaviour.

Shapes: B batch, C channels, H W height and width (latent unless named), L tokens, D features. Where a model draws video
(`ArchSpec.frame_factor`), latents named BCHW are BCFHW and pixels named B3HW are B3FHW, F frames.
Time t is in [0, 1]: 0 clean, 1 noise. Flow models: z_t = (1 - t) z_0 + t eps, target v = eps - z_0. Of the 1000 noise
levels of a diffusion model (`eps`, `v`: what it predicts), the k-th is at t = k / 1000.
This module imports no torch, so that listing and checking stay instant.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import exp
from typing import TYPE_CHECKING, Any, Literal, Protocol

from detour.nn.lora_keys import LoraKeys

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import torch
    from torch import Tensor, nn

    from detour.config.job import ModelArch, TimestepType
    from detour.weights import ModelSource, Placement

    Condition = dict[str, Tensor]
    """What one prompt becomes: named tensors without a batch axis, e.g. `{"tokens_LD": ...}`."""


Control = Literal["control", "inpaint"]
TextEncoders = Any
"""An architecture's text encoders with their tokenizers: whatever it likes, with `.to(device)`."""
Scheduler = Any
"""A diffusers scheduler: each is a class of its own, with `timesteps` and `step` in common."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DynamicShift:
    """A shift of the flow schedule that grows with the picture: exp(mu), mu linear in the number of image tokens.

    The figures are `base_image_seq_len`, `max_image_seq_len`, `base_shift` and `max_shift` of diffusers' schedulers.
    """

    tokens: tuple[int, int] = (256, 4096)
    mu: tuple[float, float] = (0.5, 1.15)

    def mu_at(self, tokens: int) -> float:
        """What diffusers calls `mu`, for a picture of so many tokens (patches of 2 x 2 latent positions)."""
        slope = (self.mu[1] - self.mu[0]) / (self.tokens[1] - self.tokens[0])
        return tokens * slope + (self.mu[0] - slope * self.tokens[0])


@dataclass(frozen=True, kw_only=True, slots=True)
class Framing:
    """How a picture was cut, which some models are told besides its caption. Pairs are width and height, in pixels."""

    original: tuple[int, int]
    """Of the file, before it was scaled."""
    crop: tuple[int, int]
    """Left and top of what is kept, in the scaled picture."""
    size: tuple[int, int]
    """Of what is kept: the size that the model sees."""

    @classmethod
    def whole(cls, width: int, height: int) -> Framing:
        """Of a picture that is drawn: nothing cut away."""
        return cls(original=(width, height), crop=(0, 0), size=(width, height))


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """A published set of weights of an architecture; what differs between them is listed as values."""

    repo: str
    """Hub id, or `user/repo/file.safetensors`."""
    distilled: bool
    steps: int
    """Denoising steps when sampling."""
    guidance: float
    """1 means none, for every architecture."""
    timestep_type: TimestepType
    adapter: str | None = None
    """The training adapter its users take, `user/repo/file.safetensors`."""
    extras_repo: str | None = None
    """Where VAE, text encoder, tokenizer and scheduler come from when `repo` holds the denoiser alone."""
    scheduler: Mapping[str, object] = field(default_factory=dict)
    """Settings in which it is sampled otherwise than its scheduler's config says."""
    config: Mapping[str, object] = field(default_factory=dict)
    """Entries of the denoiser's config by which it is told from the other variants."""
    shift: float | DynamicShift | None = None
    """Where it was trained with another shift than the architecture's other variants."""
    text_tokens: int | None = None
    """Most tokens of a prompt, where they are others than the architecture's."""
    fixed_guidance: bool = False
    """It has no guidance of any kind: a number other than `guidance` would be passed over in silence, so is refused."""
    modelspec: str | None = None
    """Architecture id in metadata, where it is another than the architecture's."""
    licence: str | None = None
    """Of these weights, where it is another than the architecture's."""
    objective: Literal["eps", "v"] | None = None
    """What it predicts, where that is not what the architecture's other variants do. For metadata: see `ArchSpec`."""

    def fits(self, config: Mapping[str, object]) -> bool:
        """Could a denoiser of that config be this variant?"""
        return all(config.get(key) == value for key, value in self.config.items())

    def guidance_problem(self, guidance: float | None) -> str | None:
        """Why it cannot be drawn with that guidance, or None where it can."""
        if not self.fixed_guidance or guidance in (None, self.guidance):
            return None
        return f"{guidance:g} would have no effect, since this model knows no guidance; use {self.guidance:g}"


@dataclass(frozen=True, kw_only=True, slots=True)
class ArchSpec:
    """The facts about an architecture. Feeds defaults, the command line's listing, the docs and the web form."""

    name: ModelArch
    title: str
    objective: Literal["flow", "eps", "v"]
    """What it predicts. Of diffusion models (`eps`, `v`) the scheduler that comes with them has the last word."""
    variants: Mapping[str, Variant]
    default_variant: str
    latent_channels: int
    spatial_factor: int
    """Pixels for each latent position, along a side."""
    bucket_divisibility: int
    """Pixels by which both sides of a training picture must be divisible."""
    text_tokens: int
    """Most tokens of a prompt."""
    text_multiple: int
    """Captions whose lengths round up to the same multiple of this may share a batch without a mask."""
    shift: float | DynamicShift
    """Shift of the flow schedule that the model was trained with; 1 where it was none."""
    lora_blocks: str
    """Regular expression of the linear layers trained with `transformer_only: true`."""
    lora_all: str
    """Regular expression of the linear layers trained with `transformer_only: false`."""
    quantize_exclude: str
    """Regular expression of linear layers too sensitive (or too small) to quantise."""
    lora_keys: LoraKeys
    modelspec: str
    """Architecture id in a LoRA's modelspec metadata, without `/lora`."""
    licence: str
    components: tuple[str, ...] = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
    optional: tuple[str, ...] = ()
    """Components that a model may be made without, which its index then says."""
    denoiser: str = "transformer"
    """The component that is trained."""
    diffusers_loader: str = ""
    """The class in `diffusers.loaders` that loads its LoRAs; empty where diffusers has none (then PEFT loads them)."""
    diffusers_kinds: tuple[str, ...] = ("lora", "dora")
    """The kinds of adapter that this class loads: most refuse keys without `lora` in them."""
    controls: tuple[Control, ...] = ()
    """What pictures it can be told besides the prompt: one to follow, and one with a hole to fill."""
    told_by: tuple[str, int] | None = None
    """How its LoRAs are told from those of relatives with layers of the same names: one's last name, and its inputs."""
    guidance_kind: Literal["negative", "embedded"] = "negative"
    """How guidance comes about: from a second prediction for the negative prompt, or as a number given to the model."""
    guidance_batched: bool = True
    """Both predictions of guidance are made in one batch. False where the pipeline makes two calls, which needs half
    the memory for activations; the last bits differ."""
    negative_first: bool = False
    """In that batch the negative prompt comes before the prompt, as in the pipeline. At sizes whose rows do not fill a
    kernel's blocks, the last bits hang on it."""
    negative_mark: str = ""
    """Put before a negative prompt, so that `encode_prompts` knows it from a prompt: where its pipeline embeds the two
    in different ways. Empty where they are embedded alike."""
    diffusers_guidance_offset: float = 0.0
    """What diffusers' pipeline counts less than this project: its scale is ours minus this."""
    size_unit: int = 16
    """Pixels by which both sides of a drawn picture must be divisible: a patch is mostly two latent positions wide."""
    frame_factor: int | None = None
    """Video: frames for each latent position after the first. None: the model knows pictures only."""
    fps: float | None = None
    """Video: frames a second of the clips that it was trained with."""
    keep_float32: str = ""
    """Regular expression of parameters that stay float32 whatever `model.dtype` says; empty for none."""
    bundled: tuple[str, ...] = ()
    """Components that a single file in the original layout may hold besides the denoiser."""
    options: Mapping[str, object] = field(default_factory=dict)
    """Settings in a model's `model_index.json` that decide how prompts are embedded, as they are where it has none."""
    picture_tokens: str = ""
    """The tensor of a prompt's condition before which a picture's own tokens stand (`nn.picture_tokens`), for models
    whose text encoder's config says `picture_tokens`. Empty: no model of the architecture reads pictures."""
    timestep_types: tuple[TimestepType, ...] = field(
        default=(
            "sigmoid", "weighted", "linear", "shift", "lognorm_blend", "next_sample",
            "one_step", "two_step", "four_step", "eight_step",
        )
    )  # fmt: skip

    def diffusers_guidance(self, guidance: float) -> float:
        """The `guidance_scale` to give to the diffusers pipeline for this project's `guidance` (1 = none)."""
        return guidance - self.diffusers_guidance_offset

    def size_problem(self, width: int, height: int) -> str | None:
        """Why a picture of that size (pixels) cannot be drawn, or None where it can."""
        unit = self.size_unit
        if width > 0 and height > 0 and width % unit == 0 and height % unit == 0:
            return None
        fits = " x ".join(str(max(unit, round(side / unit) * unit)) for side in (width, height))
        return f"{width} x {height} pixels cannot be drawn: {self.name} needs sides divisible by {unit}; try {fits}"

    def frames_problem(self, frames: int) -> str | None:
        """Why a clip of so many frames cannot be trained or drawn, or None where it can. 1 frame is a picture."""
        if frames == 1:
            return None
        if self.frame_factor is None:
            return f"{frames} frames: {self.name} knows pictures only; leave it out, or take a model of video"
        below = max((frames - 1) // self.frame_factor * self.frame_factor + 1, 1)
        if frames == below:
            return None
        unit = f"{self.frame_factor} k + 1"
        return f"{frames} frames: {self.name} needs {unit} of them; try {below} or {below + self.frame_factor}"

    def latent_shape(self, width: int, height: int, frames: int = 1) -> tuple[int, ...]:
        """Shape of the latents of a picture (C, H, W) or, where the model draws video, of a clip (C, F, H, W)."""
        sides = (height // self.spatial_factor, width // self.spatial_factor)
        if self.frame_factor is None:
            return (self.latent_channels, *sides)
        return (self.latent_channels, (frames - 1) // self.frame_factor + 1, *sides)

    def shift_at(self, latent_HW: tuple[int, int], variant: Variant | None = None) -> float:
        """Shift of the flow schedule for latents of that height and width, of a variant."""
        shift = self.shift if variant is None or variant.shift is None else variant.shift
        if isinstance(shift, DynamicShift):
            return exp(shift.mu_at((latent_HW[0] // 2) * (latent_HW[1] // 2)))
        return shift

    @property
    def default(self) -> Variant:
        """The variant that is meant when none is named."""
        return self.variants[self.default_variant]


class Arch(Protocol):
    """The behaviour of an architecture. Stateless: models are passed in, so that the engine decides where they live."""

    spec: ArchSpec

    def build_denoiser(self, source: ModelSource) -> nn.Module:
        """The denoiser on the meta device: its structure, without any weight read."""
        ...

    def denoiser_tensors(self, source: ModelSource) -> Iterator[tuple[str, Tensor]]:
        """The denoiser's weights one by one, under the names that `build_denoiser`'s module has."""
        ...

    def load_text_encoders(self, source: ModelSource, placement: Placement) -> TextEncoders:
        """Text encoders with their tokenizers; an object with `.to(device)`, passed to `encode_prompts`."""
        ...

    def load_vae(self, source: ModelSource, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """The VAE, frozen and in eval mode."""
        ...

    def load_scheduler(self, source: ModelSource, changes: Mapping[str, object] | None = None) -> Scheduler:
        """The diffusers scheduler that samples this model, from the model's own folder where it has one.

        `changes` are the variant's (`Variant.scheduler`).
        """
        ...

    def set_timesteps(self, scheduler: Scheduler, steps: int, latent_HW: tuple[int, int], device: torch.device) -> None:
        """Set the scheduler's grid exactly as the architecture's diffusers pipeline does."""
        ...

    def encode_prompts(self, text: TextEncoders, prompts: Sequence[str]) -> list[Condition]:
        """One condition for each prompt; the list is left alone. Gradients pass where encoders are trained."""
        ...

    def picture_condition(self, framing: Framing, guidance: float | None) -> Condition:
        """What the model is told of a picture besides its prompt, under names that no prompt's condition has.

        `guidance` is that of the picture to draw, None in training. Most models are told nothing.
        """
        ...

    def encode_images(self, vae: nn.Module, pixels_B3HW: Tensor) -> Tensor:
        """Pixels in [-1, 1] to normalised latents (the mean of the posterior), float32."""
        ...

    def decode(self, vae: nn.Module, latents_BCHW: Tensor) -> Tensor:
        """Normalised latents to pixels in [-1, 1], float32."""
        ...

    def predict(
        self, denoiser: nn.Module, latents_BCHW: Tensor, t_B: Tensor, conditions: Sequence[Condition]
    ) -> Tensor:
        """The model's field at (z_t, t) in this project's convention, float32.

        That is v = eps - z_0 for flow models; for diffusion models what they predict, at noise level 1000 t.
        """
        ...

    def guided(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance in this project's counting (1 = none), as the diffusers pipeline computes it."""
        ...
