"""The yardstick: LoRA training of Z-Image as a plain script with diffusers and PEFT, no trainer around it.

The operations and their order are those of diffusers' `examples/dreambooth/train_dreambooth_lora_z_image.py` with
cached latents and embeddings. What accelerate does on one device (autocast around the forward pass, output in float32)
is written out. The noise and the times come from Detour's pure functions, so that both train on the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from diffusers import ZImageTransformer2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import cast_training_params
from peft import LoraConfig

from detour.train.objective import noise_like
from detour.train.timesteps import draw_times

if TYPE_CHECKING:
    from pathlib import Path

    from detour.config.job import TrainConfig
    from detour.data.loader import Batch


@dataclass(frozen=True)
class Recipe:
    """How the script is run."""

    dtype: torch.dtype
    """`weight_dtype` of the script: float32, or bfloat16 with `--mixed_precision bf16`."""
    lora_dtype: torch.dtype
    """The script leaves the LoRA in `weight_dtype`, except with fp16, where it calls `cast_training_params`."""
    targets: str
    rank: int
    shift: float


class PlainScript:
    """The body of the script: what stands before the loop in `__init__`, what stands inside it in `step`."""

    def __init__(self, model: Path, recipe: Recipe, train: TrainConfig, batches: list[Batch]) -> None:
        """`batches` hold the cached latents and embeddings of every step to come, in order."""
        self.recipe, self.train = recipe, train
        # The script keeps its caches in the type of the VAE, which is `weight_dtype`.
        self.latents = [batch.latents_BCHW.to(recipe.dtype) for batch in batches]
        self.embeddings = [[c["tokens_LD"].to(recipe.dtype) for c in batch.conditions] for batch in batches]
        self.global_step = 0

        transformer = ZImageTransformer2DModel.from_pretrained(model, subfolder="transformer", dtype=recipe.dtype)
        transformer.requires_grad_(False)
        transformer.add_adapter(LoraConfig(r=recipe.rank, lora_alpha=recipe.rank, target_modules=recipe.targets))
        cast_training_params([transformer], dtype=recipe.lora_dtype)
        transformer.train()
        self.transformer = transformer
        self.parameters = [p for p in transformer.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=train.lr, weight_decay=0.01)
        self.lr_scheduler = get_scheduler("constant", optimizer=self.optimizer)

    def step(self) -> float:
        """One step; returns its loss."""
        step, seed = self.global_step, self.train.seed
        model_input, prompt_embeds = self.latents[step], self.embeddings[step]
        noise = noise_like(model_input, seed, step, 0).to(model_input.dtype)
        times, weights = draw_times(self.train, self.recipe.shift, len(model_input), seed, step, 0)
        timesteps = times * 1000
        sigmas = times.view(-1, 1, 1, 1).to(model_input.dtype)
        noisy_model_input = (1.0 - sigmas) * model_input + sigmas * noise

        timestep_normalized = (1000 - timesteps) / 1000
        noisy_model_input_list = list(noisy_model_input.unsqueeze(2).unbind(dim=0))
        with torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.dtype == torch.bfloat16):
            model_pred_list = self.transformer(
                noisy_model_input_list, timestep_normalized, prompt_embeds, return_dict=False
            )[0]
        model_pred = -torch.stack([prediction.float() for prediction in model_pred_list], dim=0).squeeze(2)

        target = noise - model_input
        weighting = weights.view(-1, 1, 1, 1)
        squared = weighting.float() * (model_pred.float() - target.float()) ** 2
        loss = torch.mean(squared.reshape(target.shape[0], -1), 1).mean()

        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.transformer.parameters(), self.train.max_grad_norm)
        self.optimizer.step()
        self.lr_scheduler.step()
        self.optimizer.zero_grad()
        self.global_step += 1
        return loss.detach().item()
