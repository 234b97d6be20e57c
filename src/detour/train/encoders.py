"""The encoders of a run: loaded when first needed, each moved off the card when its work is done."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from detour import archs, weights
from detour.data import cache
from detour.data.prepare import Encoders
from detour.nn import quant

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import nn

    from detour.config.job import QType
    from detour.train.build import Inputs


class Models:
    """VAE and text encoders."""

    def __init__(self, inputs: Inputs, store: cache.Store, dtype: torch.dtype) -> None:
        self._inputs, self._dtype = inputs, dtype
        self._vae: nn.Module | None = None
        self.text: Any = None
        model = inputs.process.model
        # Latents are made in float32 where memory allows: the VAE is small (84 M parameters for Z-Image).
        self._vae_dtype = dtype if model.low_vram else torch.float32
        self._te_quantizer = quantizer(model.qtype_te if model.quantize_te else None, "", inputs.device)
        self.keys = self._keys(store)

    def _keys(self, store: cache.Store) -> cache.Keys:
        source, model, spec = self._inputs.source, self._inputs.process.model, self._inputs.arch.spec

        def places(*kinds: str) -> list[Path]:
            parts = [part for part in spec.components if part.startswith(kinds)]
            file = source.single_file if set(parts) & set(spec.bundled) else None
            folders = [source.component(part) for part in parts if not source.lacks(part)]
            return folders + ([file] if file is not None else [])

        text = cache.identity(
            store.root,
            places("text_encoder", "tokenizer"),
            spec.name,  # architectures may share encoders but not how they ask them
            str(self._dtype),
            str(model.qtype_te if model.quantize_te else None),
            archs.variant_of(self._inputs.process)[1].text_tokens or spec.text_tokens,
            *(f"{name}={value}" for name, value in source.options(spec.options).items()),
        )
        vae = cache.identity(store.root, places("vae"), str(self._vae_dtype))
        embedded = not self._inputs.process.train.train_text_encoder
        return cache.Keys(vae=vae, text=text, spatial_factor=spec.spatial_factor, embedded=embedded)

    def encoders(self) -> Encoders:
        arch, device = self._inputs.arch, self._inputs.device
        return Encoders(arch=arch, load_vae=self.vae, load_text=self.load_text, keys=self.keys, device=device)

    def load_text(self) -> Any:  # noqa: ANN401  each architecture has a type of its own
        inputs = self._inputs
        placement = weights.Placement(self._dtype, inputs.device, self._te_quantizer)
        self.text = inputs.arch.load_text_encoders(inputs.source, placement)
        return self.text

    def vae(self) -> nn.Module:
        if self._vae is None:
            self._vae = self._inputs.arch.load_vae(self._inputs.source, self._vae_dtype, self._inputs.device)
        return self._vae

    def release(self) -> None:
        """Make room: free the text encoder, or keep it in main memory if so asked; with `low_vram` move the VAE out."""
        if self.text is not None:
            self.text = None if self._inputs.process.train.unload_text_encoder else self.text.to(torch.device("cpu"))
        if self._vae is not None and self._inputs.process.model.low_vram:
            self._vae.to("cpu")
        if self._inputs.device.type == "cuda":
            torch.cuda.empty_cache()


def quantizer(qtype: QType | None, exclude: str, device: torch.device) -> Callable[[str, nn.Linear], nn.Module] | None:
    """What `weights.Placement` calls for each linear layer; None where none is quantised."""
    return None if qtype is None else quant.quantizer(qtype, exclude, device)
