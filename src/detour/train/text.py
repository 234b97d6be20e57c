"""Text encoders that are trained with the denoiser: what it goes together with, and which layers.

What is trained on them is a LoRA of the job's rank, on their attention and feed-forward layers. Captions are then
embedded in the training step, with a gradient, and the prompts of previews by the encoders as they are.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from torch import nn

from detour import UserError, archs
from detour.config.preserve import PLAIN, strategy_terms
from detour.nn import lora
from detour.nn.together import Together

if TYPE_CHECKING:
    from detour.archs.base import ArchSpec
    from detour.config.job import TrainProcess


def check(process: TrainProcess, spec: ArchSpec) -> None:
    """Refuse what does not go together with trained text encoders. For a resolved process."""
    train = process.train
    if not train.train_text_encoder:
        return
    if not spec.lora_keys.text:
        able = ", ".join(name for name in archs.built() if archs.spec(name).lora_keys.text)
        raise UserError(
            f"train.train_text_encoder: text encoders of {spec.title} are not trained, here or by its other trainers; "
            f"leave it out (those of {able} can be trained)"
        )
    if process.network.type != "lora":
        raise UserError(
            f"train.train_text_encoder: text encoders get a LoRA, not network.type: {process.network.type}; use lora"
        )
    if process.preserve.drift.measure or strategy_terms(process.preserve) != [PLAIN]:
        raise UserError(
            "train.train_text_encoder: preserve's strategies and its drift meter compare what the model makes of fixed "
            "embeddings; leave one of the two out"
        )
    if train.optimizer == "prodigy" and train.text_encoder_lr not in (None, train.lr):
        raise UserError(
            f"train.text_encoder_lr: {train.text_encoder_lr:g} with prodigy, which finds one learning rate for all; "
            f"leave it out, or take another optimizer"
        )


def layers(trained: nn.Module, spec: ArchSpec, denoiser_layers: list[str]) -> list[str]:
    """Names in `trained` of the layers that get an adapter: the denoiser's, and every one of the encoders'."""
    if not isinstance(trained, Together):
        return denoiser_layers
    chosen = {trained.from_file(name) for name in denoiser_layers}
    for component in spec.lora_keys.text:
        encoder = trained.get_submodule(component)
        own = {name for name, layer in encoder.named_modules() if isinstance(layer, nn.Linear)}
        pattern = rf"(text_model\.)?{spec.lora_keys.text_layers}"
        chosen |= {f"{component}.{name}" for name in own if re.fullmatch(pattern, name)}
    return [name for name, _ in trained.named_modules() if name in chosen]


def names(trained: nn.Module, spec: ArchSpec) -> list[str]:
    """Of the trained tensors that are the text encoders'."""
    return [name for name in lora.trainable(trained) if name.partition(".")[0] in spec.lora_keys.text]
