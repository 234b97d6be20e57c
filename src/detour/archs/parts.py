"""Pieces that several architectures share: loading the classes of diffusers and transformers, VAE arithmetic, grids.

Every module is built with its parameters on the meta device and streamed in (`weights.materialise`): memory never holds
a model twice. Buffers are computed when a module is built, so that those which no file stores are there.

Shapes: B batch, C channels, H W height and width (latent, of pictures: pixels).
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    import torch
    from torch import Tensor, nn

    from detour import UserError
    from detour.archs.base import ArchSpec, Condition, Scheduler
    from detour.weights import ModelSource, Placement


def on_meta(build: Callable[[], Any]) -> Any:  # noqa: ANN401  whatever class of diffusers or transformers it is
    """A module whose parameters are on the meta device and whose buffers are real; in eval mode, frozen."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        module = build()
    return module.eval().requires_grad_(False)


def diffusers_module(name: str, folder: Path) -> Any:  # noqa: ANN401
    """The structure of a component from its config, which must be of diffusers' class `name`. No weight is read."""
    import diffusers

    from detour.weights import component_config

    config = component_config(folder, "_class_name", name)
    return on_meta(lambda: getattr(diffusers, name).from_config(dict(config)))


def folder_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The weights of a component, streamed."""
    from detour.weights import component_files, stream_tensors

    return stream_tensors(component_files(folder))


def load_vae(name: str, source: ModelSource, dtype: torch.dtype, device: torch.device) -> Any:  # noqa: ANN401
    """The VAE of diffusers' class `name`, frozen and in eval mode."""
    from detour.weights import Placement, materialise

    folder = source.component("vae")
    vae = diffusers_module(name, folder)
    materialise(vae, folder_tensors(folder), Placement(dtype, device), where=str(folder))
    return vae


def load_text_model(
    name: str,
    folder: Path,
    placement: Placement,
    rename: Callable[[str], str | None] = lambda key: key,
    tensors: Iterable[tuple[str, Tensor]] | None = None,
) -> Any:  # noqa: ANN401
    """A text encoder of transformers' class `name`, streamed in.

    `rename` turns a stored tensor's name into the module's, or into None where the module has no place for it.
    `tensors` are the weights where they are not the folder's, as in an all-in-one file.
    """
    import transformers

    from detour.weights import component_config, materialise

    cls = getattr(transformers, name)
    component_config(folder, "model_type", cls.config_class.model_type)
    config = cls.config_class.from_pretrained(folder)
    model = on_meta(lambda: cls(config))
    model.tie_weights()  # T5's two names of its embeddings: building on the meta device has parted them
    stored = folder_tensors(folder) if tensors is None else tensors
    renamed = ((rename(key), tensor) for key, tensor in stored)
    placement = _as_transformers_places(cls._keep_in_fp32_modules or (), placement)
    materialise(model, ((key, tensor) for key, tensor in renamed if key), placement, where=str(folder))
    return model


def load_tokenizer(folder: Path) -> Any:  # noqa: ANN401
    """The tokenizer of a component folder. UserError where a package is missing that reads it."""
    from transformers import AutoTokenizer
    from transformers.utils import is_protobuf_available, is_sentencepiece_available

    from detour import UserError

    packed = not (folder / "tokenizer.json").is_file() and any(folder.glob("*.model"))
    if packed and not (is_sentencepiece_available() and is_protobuf_available()):
        raise UserError(
            f"{folder}: this tokenizer is stored as a SentencePiece model, which takes two packages to read, and they "
            f"are not (both) installed; install them with: pip install sentencepiece protobuf"
        )
    return AutoTokenizer.from_pretrained(folder)


def only_as_folder(source: ModelSource, title: str) -> UserError:
    """The error for a single file of a model that is read from a folder alone."""
    from detour import UserError

    return UserError(
        f"{source.single_file}: {title} is not read from a single file; give a folder in the diffusers layout, or a "
        f"hub id"
    )


def _as_transformers_places(sensitive: Iterable[str], placement: Placement) -> Placement:
    """The placement, with layers of these names (T5's `wo`) in float32 where the rest is float16, as in transformers.

    T5 casts what goes into `wo` to the type of its weight, which would be bytes for a weight held in 4 bits: such a
    layer stays as it is.
    """
    import torch

    if not sensitive:
        return placement
    pattern, quantizer = rf"(^|\.)({'|'.join(sensitive)})\.", placement.quantizer

    def quantise(name: str, linear: nn.Linear) -> nn.Module:
        assert quantizer is not None
        done = quantizer(name, linear)
        floats = isinstance(done.weight, torch.Tensor) and done.weight.is_floating_point()
        return done if floats or not re.search(pattern, f"{name}.") else linear

    return replace(
        placement,
        quantizer=None if quantizer is None else quantise,
        keep_float32=pattern if placement.dtype == torch.float16 else placement.keep_float32,
    )


def clip_name(key: str) -> str | None:
    """The module's name of a tensor stored for a `CLIPTextModel`: published files have a prefix, and a buffer."""
    return None if key.endswith(".position_ids") else key.removeprefix("text_model.")


def load_scheduler(
    source: ModelSource, default: str, defaults: Mapping[str, object], changes: Mapping[str, object] | None = None
) -> Scheduler:
    """The scheduler of the class that its config names, else `default` with `defaults`; `changes` go over either.

    `changes` may hold another class under `_class_name`, which then takes over the rest of the config.
    """
    import diffusers

    from detour import UserError

    folder = source.find("scheduler")
    config: dict[str, Any] = dict(defaults)
    if folder is not None:
        config = dict(getattr(diffusers, default).load_config(folder))
    config |= changes or {}
    name = str(config.get("_class_name", default))
    if name not in dir(diffusers) or not name.endswith("Scheduler"):
        raise UserError(f"{folder}: {name!r} is not a scheduler of diffusers; is this a model folder?")
    return getattr(diffusers, name).from_config(config)


def encode_images(vae: Any, pixels_B3HW: Tensor) -> Tensor:  # noqa: ANN401
    """Pixels in [-1, 1] to normalised latents (the mean of the posterior), float32."""
    import torch

    with torch.no_grad():
        mean_BCHW: Tensor = vae.encode(pixels_B3HW.to(vae.device, vae.dtype)).latent_dist.mode().float()
    normalised_BCHW: Tensor = (mean_BCHW - (vae.config.shift_factor or 0)) * vae.config.scaling_factor
    return normalised_BCHW


def decode(vae: Any, latents_BCHW: Tensor) -> Tensor:  # noqa: ANN401
    """Normalised latents to pixels in [-1, 1], float32. The arithmetic is the pipelines', in the VAE's type."""
    import torch

    config = vae.config
    with torch.no_grad():
        latents_BCHW = latents_BCHW.to(vae.device, vae.dtype) / config.scaling_factor
        if config.shift_factor:
            latents_BCHW = latents_BCHW + config.shift_factor
        pixels_B3HW: Tensor = vae.decode(latents_BCHW, return_dict=False)[0]
    return pixels_B3HW.float()


def flow_grid(scheduler: Scheduler, steps: int, mu: float | None, device: torch.device) -> None:
    """The usual flow grid: evenly spaced from 1 to 1 / steps before the shift; the last step goes to 0.

    `mu` matters only to a scheduler with dynamic shifting.
    """
    import torch

    sigmas = torch.linspace(1.0, 1 / steps, steps).tolist()
    scheduler.set_timesteps(sigmas=sigmas, mu=mu, device=device)
    scheduler.set_begin_index(0)


def mu_of(scheduler: Scheduler, tokens: int) -> float:
    """What the pipelines pass to `set_timesteps` as `mu` for a picture of so many tokens, by the scheduler's config."""
    from detour.archs.base import DynamicShift

    config = scheduler.config
    return DynamicShift(
        tokens=(config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)),
        mu=(config.get("base_shift", 0.5), config.get("max_shift", 1.15)),
    ).mu_at(tokens)


def classifier_free(positive: Tensor, negative: Tensor, scale: float) -> Tensor:
    """Guidance as most pipelines compute it: 1 leaves `positive` as it is."""
    return positive if scale == 1 else negative + scale * (positive - negative)


def levels(t_B: Tensor) -> Tensor:
    """The noise levels (0 to 1000) of times, float32: whole numbers where they are meant, as a model was trained on.

    A level k that went through float32 as k / 1000 comes back to within 6e-5. A scheduler's fractional levels, which
    come in double, are further than that from a whole number, and stay.
    """
    import torch

    level_B = t_B.double() * 1000
    whole_B = level_B.round()
    return torch.where((level_B - whole_B).abs() < 1e-4, whole_B, level_B).float()


def check_sides(spec: ArchSpec, latents_BCHW: Tensor, longest: int) -> None:
    """UserError for latents with a side of more than `longest` positions, all that the model has."""
    from detour import UserError

    height, width = (side * spec.spatial_factor for side in latents_BCHW.shape[-2:])
    limit = longest * spec.spatial_factor
    if max(height, width) > limit:
        raise UserError(
            f"a picture of {width} x {height} pixels: this {spec.title} has positions for sides of up to {limit} "
            f"pixels; choose a smaller resolution, or leave out very long pictures"
        )


def padded(conditions: Sequence[Condition], length: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """tokens_BLD of prompts of any lengths, with zeros up to L = `length`, and mask_BL: 1 where there is a token.

    Both in the type of `like` and on its device.
    """
    import torch

    prompts = [condition["tokens_LD"] for condition in conditions]
    tokens_BLD = torch.zeros(len(prompts), length, prompts[0].shape[1], dtype=like.dtype, device=like.device)
    mask_BL = torch.zeros(len(prompts), length, dtype=like.dtype, device=like.device)
    for place, tokens_LD in enumerate(prompts):
        tokens_BLD[place, : len(tokens_LD)] = tokens_LD
        mask_BL[place, : len(tokens_LD)] = 1
    return tokens_BLD, mask_BL


class TextModels:
    """Text encoders with their tokenizers, by component name."""

    def __init__(self, models: Mapping[str, nn.Module], tokenizers: Mapping[str, Any]) -> None:
        self.models, self.tokenizers = dict(models), dict(tokenizers)

    def to(self, device: torch.device) -> TextModels:
        """Move the models; returns itself."""
        for model in self.models.values():
            model.to(device)
        return self


def not_a_checkpoint(file: Path, names: Iterable[str], title: str) -> UserError:
    """The error for a single file that holds another model than `title`, as far as its names tell which."""
    from detour import UserError
    from detour.nn.families import guess

    listed = list(names)
    if any(".lora_" in name for name in listed):
        return UserError(
            f"{file}: this is a LoRA, not a checkpoint of {title}; name the model it belongs to (a LoRA to go on "
            f"training is network.pretrained_lora_path)"
        )
    looks = guess(listed)
    if looks is None or title.startswith(looks):
        return UserError(f"{file}: not a checkpoint of {title}; is model.arch right, and is it the whole model?")
    return UserError(f"{file}: this looks like a checkpoint of {looks}, not of {title}; set model.arch accordingly")
