"""Pieces that several architectures share: loading the classes of diffusers and transformers, VAE arithmetic, grids.

Every module is built with its parameters on the meta device and streamed in (`weights.materialise`): memory never holds
a model twice. Buffers are computed when a module is built, so that those which no file stores are there.

Shapes: B batch, C channels, H W height and width (latent, of pictures: pixels).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    import torch
    from torch import Tensor, nn

    from detour.archs.base import Scheduler
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
    name: str, folder: Path, placement: Placement, rename: Callable[[str], str | None] = lambda key: key
) -> Any:  # noqa: ANN401
    """A text encoder of transformers' class `name`, streamed in.

    `rename` turns a stored tensor's name into the module's, or into None where the module has no place for it.
    """
    import transformers

    from detour.weights import component_config, materialise

    cls = getattr(transformers, name)
    component_config(folder, "model_type", cls.config_class.model_type)
    config = cls.config_class.from_pretrained(folder)
    model = on_meta(lambda: cls(config))
    renamed = ((rename(key), tensor) for key, tensor in folder_tensors(folder))
    materialise(model, ((key, tensor) for key, tensor in renamed if key), placement, where=str(folder))
    return model


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


class TextModels:
    """Text encoders with their tokenizers, by component name."""

    def __init__(self, models: Mapping[str, nn.Module], tokenizers: Mapping[str, Any]) -> None:
        self.models, self.tokenizers = dict(models), dict(tokenizers)

    def to(self, device: torch.device) -> TextModels:
        """Move the models; returns itself."""
        for model in self.models.values():
            model.to(device)
        return self
