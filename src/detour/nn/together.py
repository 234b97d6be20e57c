"""Denoiser and text encoders as one module, so that one adapter can act on all of them.

Names in that module begin with the component (`unet.mid_block...`, `text_encoder.encoder.layers...`). In LoRA files and
in `lora_formats.LoraFile` the denoiser's are bare, and no encoder's have the `text_model.` that some classes of
transformers put before their layers and others do not. Wherever there is the denoiser alone, names stay as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Mapping

_Value = TypeVar("_Value")
_WRAPPER = "text_model."


class Together(nn.Module):
    """Models by the names of their components."""

    def __init__(self, denoiser: str, models: Mapping[str, nn.Module]) -> None:
        """`denoiser`: which of them has bare names in files."""
        super().__init__()
        self.denoiser = denoiser
        for name, model in models.items():
            self.add_module(name, model)

    def to_file(self, name: str) -> str:
        """A name in files, of a layer or of what is in it."""
        component, _, rest = name.partition(".")
        return rest if component == self.denoiser else f"{component}.{rest.removeprefix(_WRAPPER)}"

    def from_file(self, name: str) -> str:
        """The inverse of `to_file`."""
        component, _, rest = name.partition(".")
        models = dict(self.named_children())
        if component not in models or component == self.denoiser:
            return f"{self.denoiser}.{name}"
        wrapped = _WRAPPER.rstrip(".") in dict(models[component].named_children())
        return f"{component}.{_WRAPPER if wrapped else ''}{rest}"


def with_encoders(name: str, denoiser: nn.Module, encoders: Mapping[str, nn.Module]) -> nn.Module:
    """The denoiser, whose component is `name`, together with text encoders; itself where there are none."""
    return Together(name, {name: denoiser} | dict(encoders)) if encoders else denoiser


def to_file(trained: nn.Module, named: Mapping[str, _Value]) -> dict[str, _Value]:
    """By names in files. `trained` is what the names are of: the denoiser alone, or several models together."""
    return {trained.to_file(name) if isinstance(trained, Together) else name: value for name, value in named.items()}


def from_file(trained: nn.Module, named: Mapping[str, _Value]) -> dict[str, _Value]:
    """The inverse of `to_file`."""
    return {trained.from_file(name) if isinstance(trained, Together) else name: value for name, value in named.items()}
